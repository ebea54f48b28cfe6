"""Linears that share one input: the first call computes all, the others take their result."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..autograd.casts import local_of
from ..autograd.linear import LinearPlan, backward_passes, linear
from ..checks import origin
from .layer import own_plan


class SharedInput:
    """What share_input puts into `group`: results of one step, kept until their own layer asks for them.

    A result is given only to a call that would have computed the same: the very tensor x at the same version, the same
    weights, the same modes of autograd and autocast, the same hooks on saved tensors (activation checkpointing counts
    them), the same backward pass or none, and no backward pass of a linear since (it frees what the result needs).
    Every other call computes anew, also where backward hooks on modules hand each module its own copy of x. At most one
    set of results is kept; it goes when x goes or another x comes.
    """

    def __init__(self, plan: LinearPlan, linears: Sequence[Any]) -> None:
        self.plan, self.linears = plan, list(linears)
        self.key: Any = None
        self.x: Any = None
        self.kept: dict[int, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no results: they belong to calls of the original."""
        return {**self.__dict__, "key": None, "x": None, "kept": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.plan = own_plan(self.plan, self.linears[0])

    def __call__(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        index = next(index for index, each in enumerate(self.linears) if each is layer)
        # compiled graphs have no object to tie results to, inference tensors no version; what stands in a parameter's place is cut anew
        own = isinstance(layer._parameters.get("weight"), DTensor)
        if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor) or x.is_inference() or not own:
            weights, biases = layer.operands()
            return linear(x, weights, biases, layer.plan, layer.epilogue)[0]
        key, given = self._state(x), origin(x)
        if not (index in self.kept and self.x is not None and self.x() is given and self.key == key):
            operands = [each.operands() for each in self.linears]
            self.kept.clear()
            results = linear(x, [w for (w,), _ in operands], [b for _, (b,) in operands], self.plan, layer.epilogue)
            kept = self.kept = dict(enumerate(results))
            self.key, self.x = key, weakref.ref(given, lambda _: kept.clear())
        result = self.kept.pop(index)
        if not self.kept:
            self.key = self.x = None
        return result

    def _state(self, x: torch.Tensor) -> Any:
        device = x.device.type
        autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) if device in ("cpu", "cuda") else None
        operands = (tensor for each in self.linears for part in each.operands() for tensor in part if tensor is not None)
        parameters = [getattr(each, "kept", each) for each in operands]  # a new one at each use stands for what is kept
        return (
            x._version,
            x.requires_grad,
            torch.is_grad_enabled(),
            autocast,
            torch._C._autograd._top_saved_tensors_default_hooks(True),
            torch._C._current_graph_task_id(),
            backward_passes(),
            [(id(each), id(local_of(each)), local_of(each)._version, each._version, each.requires_grad) for each in parameters],
        )
