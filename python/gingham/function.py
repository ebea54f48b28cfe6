"""The base of this package's autograd functions: what torch.func would make of them, and traces without them, are refused by name.

They call other ranks, which vmap, jvp and grad of torch.func cannot transform. torch.autograd.grad(create_graph=True) and
torch.autograd.functional (without vectorize=True) give the same derivatives, right on every grid. torch.jit.trace and make_fx would
keep one call's results as constants; torch.compile has operations for what calls other ranks. A call of which nothing will be
differentiated runs forward alone, without autograd's node around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.autograd import forward_ad


class Context:
    """Stands for autograd's ctx where there is no node."""

    needs_input_grad: tuple[bool, ...] = (False,) * 64
    next_functions: tuple[Any, ...] = ((None, 0),) * 64
    saved_tensors: tuple[torch.Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass


def asked(ctx: Any) -> Sequence[bool]:
    """Which inputs' gradients this backward pass is asked for, one bool an argument of forward. ctx.needs_input_grad knows what forward
    knew; torch.autograd.grad(y, x) and a pass of inputs alone ask for less, and what nobody asked for is neither computed nor sent."""
    needs: Sequence[bool] = ctx.needs_input_grad
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    if _will_execute is None or len(nodes) != sum(needs):  # an op of a compiled graph, which has no nodes
        return needs
    found = iter(nodes)
    return [need and _is_asked(next(found)) for need in needs]


def nodes_of(ctx: Any, tensors: Sequence[Any]) -> list[Any]:
    """The autograd nodes that receive the gradients of the last arguments of forward that are tensors; None of one that has none."""
    given = [node for node, _ in ctx.next_functions]
    found = iter(given[len(given) - sum(each is not None for each in tensors) :])
    return [None if each is None else next(found, None) for each in tensors]


def _is_asked(node: Any) -> bool:
    try:
        return bool(_will_execute(node))
    except RuntimeError:  # a leaf under torch.autograd.grad that was asked for
        return True


# private to torch: without it all that forward knew of is computed
_will_execute: Any = getattr(torch._C, "_will_engine_execute_node", None)


class Function(torch.autograd.Function):
    """Raises NotImplementedError inside torch.func's transforms, is_grads_batched and forward-mode differentiation."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "backward" in cls.__dict__:
            cls.backward = staticmethod(_refusing(cls.__name__, cls.__dict__["backward"].__func__))  # type: ignore[method-assign]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if _are_functorch_transforms_active() or _is_tracing() or _len_torch_dispatch_stack():
            refuse_transforms(cls.__name__.strip("_"))
        if forward_ad._current_level < 0:
            if not torch.is_grad_enabled():
                return cls.forward(Context(), *args)
            for each in args:
                if isinstance(each, Tensor) and each.requires_grad:
                    break
            else:
                return cls.forward(Context(), *args)
        return super().apply(*args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _refusal("forward-mode differentiation")


def refuse_transforms(what: str) -> None:
    """Raises NotImplementedError for a call of `what` inside a transform of torch.func, torch.jit.trace or make_fx."""
    if torch.compiler.is_compiling():
        return
    if _are_functorch_transforms_active():
        raise _refusal(what)
    if _is_tracing():
        raise untraceable(what, "torch.jit.trace")
    if _len_torch_dispatch_stack():
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        if get_proxy_mode() is not None:
            raise untraceable(what, "make_fx")


def untraceable(what: str, by: str) -> NotImplementedError:
    """The error for `what`, met `by` a tool that records torch's operations."""
    return NotImplementedError(
        f"gingham: {what} in {by}, which records torch's operations only: {what} calls other ranks, and would be left out or become a"
        " constant. Use torch.compile(model), whose graphs have gingham's operations; to hand the weights to a tool that needs a plain"
        " model, gingham.export_safetensors(model, path) and load them into the original in one process"
    )


def _refusing(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(backward)
    def call(ctx: Any, *gradients: Any) -> Any:
        for each in gradients:
            if each is not None and (is_batchedtensor(each) or is_legacy_batchedtensor(each)):
                raise _refusal(f"{name}.backward")
            if type(each) is not torch.Tensor and hasattr(type(each), "checks_operations"):
                return backward(ctx, *map(_plain, gradients))
        return backward(ctx, *gradients)

    return call


def _plain(gradient: Any) -> Any:
    """A gradient that a backward of the user's own made of tensors of the first step's check is one like any other here."""
    if hasattr(type(gradient), "checks_operations"):
        with torch._C.DisableTorchFunctionSubclass():
            return gradient.as_subclass(torch.Tensor)
    return gradient


def _refusal(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"gingham: {what.strip('_')} inside vmap, jvp or grad of torch.func, is_grads_batched=True, vectorize=True or forward-mode"
        " differentiation: it calls other ranks, which these transforms cannot follow. torch.autograd.grad(create_graph=True), called"
        " once for each vector, and torch.autograd.functional without vectorize give the same derivatives"
    )
