"""Gradients that can be differentiated again, and the versions of parameters that a gradient is computed from.

A backward pass under create_graph=True makes the forward pass once more out of the functions of this file and takes its
gradients from torch.autograd (`replay`). They are closed: the gradient of each is made of others of them.

    forward                          backward
    product   Y = X W                input_gradient dX = dY W^T, weight_gradient dW = X^T dY
    summed    sum over ranks         as it is       (what every rank holds alike has the same gradient on all)
    shared    as it is               sum over ranks (what every rank holds alike but uses for its own part)
    gathered  the ranks' rows        reduce-scatter, or where all ranks hold the same gradient, this rank's rows
    to_block  a parameter's block    to_parameter

Example: the mean of features that 2 ranks cut is shared(summed(x.sum(-1)) / n): both have it, each subtracts it from
its own half, so that the mean's gradient is the sum of what both halves give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..errors import MeshError
from ..function import Function, asked
from ..mesh import Mesh
from ..mesh.layout import Names


def shaped(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """x in another shape of as many elements, not as a view of it: what an autograd function returns may then be changed in place."""
    return x if tuple(x.shape) == tuple(shape) else torch.ops.aten._unsafe_view.default(x, list(shape))


def alias(x: torch.Tensor) -> torch.Tensor:
    """Another tensor on the same memory that is no view of x: autograd does not follow it."""
    return torch.ops.aten._unsafe_view.default(x, list(x.shape))


Versions = list[tuple[str, Any, int]]


def versions_of(parameters: Sequence[tuple[str, Any]]) -> Versions:
    """(name, parameter, version) of the DTensors among them. An in-place operation on a DTensor counts up its own version, not that
    of the block which an autograd function saves."""
    return [(name, each, each._version) for name, each in parameters if isinstance(each, DTensor) and not each.is_inference()]


def changed(versions: Versions) -> bool:
    """Whether one of the parameters was changed in place since."""
    return any(parameter._version != version for _, parameter, version in versions)


def check_versions(what: str, mesh: Mesh, versions: Versions) -> None:
    """Raises RuntimeError, in torch's words, where a parameter was changed in place since forward."""
    for name, parameter, version in versions:
        if parameter._version != version:
            raise RuntimeError(
                f"one of the variables needed for gradient computation has been modified by an inplace operation: {what}'s {name}"
                f" {tuple(parameter.shape)} on rank {mesh.rank} is at version {parameter._version}; expected version {version}, that of the"
                " forward pass, instead. Run backward before the step, load or other change in place, or forward again after it."
            )


def replay(
    compose: Callable[..., Sequence[torch.Tensor]],
    tensors: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
    cotangents: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """The gradients of compose(*tensors) for those of the tensors that need one, as functions of tensors and cotangents.

    compose takes this rank's blocks, is made of torch's local operations and of this file's, and returns one output a
    cotangent. Gradients are in the form of their tensors.
    """
    with torch.enable_grad():
        # other names for them, so that what one of them was computed from another is not followed here
        own = [None if each is None else to_block(each) if isinstance(each, DTensor) else each.view_as(each) for each in tensors]
        outputs = compose(*own)
        pairs = [(y, dy) for y, dy in zip(outputs, cotangents, strict=True) if dy is not None and y.requires_grad]
        wanted = [each for each, need in zip(own, needs, strict=True) if need and each is not None]
        if not pairs or not wanted:
            return [None] * len(tensors)
        found = iter(
            torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs], create_graph=True, allow_unused=True)  # type: ignore[arg-type]
        )
        gradients = [next(found) if need and each is not None else None for each, need in zip(own, needs, strict=True)]
        return [to_parameter(each, tensor) for each, tensor in zip(gradients, tensors, strict=True)]


def refuse_deferred(what: str, mesh: Mesh, deferred: bool) -> None:
    """Raises NotImplementedError where no_sync left out a sum that a second gradient would need."""
    if deferred:
        raise NotImplementedError(
            f"{what} on rank {mesh.rank}: create_graph=True inside gingham.no_sync, or before the backward pass that makes its sums;"
            " leave no_sync out around gradients that are differentiated again"
        )


def to_block(parameter: torch.Tensor) -> torch.Tensor:
    """A DTensor's own block, with a gradient; a plain tensor is its own."""
    return _ToBlock.apply(parameter) if isinstance(parameter, DTensor) else parameter


def to_parameter(local: torch.Tensor | None, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """`like`, with a gradient."""
    return _ToParameter.apply(local, parameter._spec) if local is not None and isinstance(parameter, DTensor) else local


class _ToBlock(Function):
    @staticmethod
    def forward(ctx: Any, parameter: Any) -> torch.Tensor:
        ctx.spec = parameter._spec
        return alias(parameter._local_tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _ToParameter.apply(grad, ctx.spec)


class _ToParameter(Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, spec: Any) -> torch.Tensor:
        ctx.spec = spec
        return DTensor(local.detach().contiguous(), spec, requires_grad=False)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if not isinstance(grad, DTensor):
            raise MeshError(
                f"the gradient of a parameter's gradient is a {type(grad).__name__}, expected a DTensor of the parameter's mesh"
            )
        # what torch's own operations on the gradient gave may lie elsewhere
        moved = grad if grad.placements == ctx.spec.placements else grad.redistribute(placements=ctx.spec.placements)
        return to_block(moved), None


def summed(x: torch.Tensor, mesh: Mesh, names: Names) -> torch.Tensor:
    """The sum over the ranks of the axes `names`, the same on all; its gradient is the same on all too."""
    return x if mesh.parts(names) == 1 else _Summed.apply(x, mesh, names)


def shared(x: torch.Tensor, mesh: Mesh, names: Names) -> torch.Tensor:
    """x, which the ranks of the axes `names` hold alike and each uses for its own part: gradients are summed over them."""
    return x if mesh.parts(names) == 1 else _Shared.apply(x, mesh, names)


def _sum(x: torch.Tensor, mesh: Mesh, names: Names) -> torch.Tensor:
    wide = x.to(torch.float32 if x.dtype.itemsize == 2 else x.dtype, memory_format=torch.contiguous_format, copy=True)
    for axis in mesh.axes_over(names):
        axis.all_reduce_(wide)
    return wide.to(x.dtype)


class _Summed(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Mesh, names: Names) -> torch.Tensor:
        ctx.arguments = mesh, names
        return _sum(x, mesh, names)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Shared.apply(grad, *ctx.arguments), None, None


class _Shared(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Mesh, names: Names) -> torch.Tensor:
        ctx.arguments = mesh, names
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Summed.apply(grad, *ctx.arguments), None, None


def gathered(x: torch.Tensor, mesh: Mesh, names: Names, lengths: Sequence[int], parts: bool = True) -> torch.Tensor:
    """The members' rows, `lengths` of them, one after the other. parts: each rank's gradient is a part, to be summed; else all hold the
    same and each keeps its own rows."""
    return x if mesh.axis(names) is None else _Gathered.apply(x, mesh, names, tuple(lengths), parts)


def scattered(x: torch.Tensor, mesh: Mesh, names: Names, lengths: Sequence[int], parts: bool = True) -> torch.Tensor:
    """The gradient of `gathered`: this rank's rows of the sum of all ranks' x, or of x where all hold the same."""
    return x if mesh.axis(names) is None else _Scattered.apply(x, mesh, names, tuple(lengths), parts)


class _Gathered(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Mesh, names: Names, lengths: tuple[int, ...], parts: bool) -> torch.Tensor:
        ctx.arguments = mesh, names, lengths, parts
        return torch.cat(mesh.joint(names).all_gather(x.contiguous()))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Scattered.apply(grad, *ctx.arguments), None, None, None, None


class _Scattered(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Mesh, names: Names, lengths: tuple[int, ...], parts: bool) -> torch.Tensor:
        ctx.arguments = mesh, names, lengths, parts
        axis = mesh.joint(names)
        if parts:
            wide = x.float() if x.dtype.itemsize == 2 else x
            return axis.reduce_scatter(wide.contiguous(), list(lengths)).to(x.dtype)
        return x.narrow(0, sum(lengths[: axis.rank]), lengths[axis.rank]).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Gathered.apply(grad, *ctx.arguments), None, None, None, None


class Unsummed:
    """A step whose gradients of weights are this rank's parts of sums over replicas, which are made elsewhere."""

    def __init__(self, step: Any) -> None:
        self.forward, self._backward = step.forward, step.backward

    def backward(self, *arguments: Any) -> Any:
        return self._backward(*arguments, False)


def product(x: torch.Tensor, weights: Sequence[torch.Tensor], step: Any, out_dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """Y_i = X W_i on the operands of one C++ step. out_dtype: of Y where it is not X's; its gradient is cast to X's."""
    ys: tuple[torch.Tensor, ...] = Product.apply(step, len(weights), out_dtype, x, *weights)
    return ys


def _contiguous(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [each.contiguous() for each in tensors]


class Product(Function):
    """Y = X W. Each of the three products' gradients is made of the other two, on the same operand layouts."""

    @staticmethod
    def forward(ctx: Any, step: Any, count: int, out_dtype: torch.dtype | None, x: torch.Tensor, *weights: torch.Tensor) -> Any:
        ctx.step, ctx.count = step, count
        ctx.save_for_backward(x, *weights)
        wide = {} if out_dtype is None else {"out_dtype": str(out_dtype).removeprefix("torch.")}
        ys = step.forward(x.contiguous(), _contiguous(weights), [None] * count, **wide)
        return tuple([_with_dims_of(y, x) for y in ys[:count]])

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        step, count = ctx.step, ctx.count
        x, *weights = ctx.saved_tensors
        dys = tuple(dy.to(x.dtype) for dy in dys)
        needs = asked(ctx)
        need_x, need_w = needs[3], any(needs[4:])
        if torch.is_grad_enabled():
            dx = _InputGradient.apply(step, count, x.detach(), *weights, *dys) if need_x else None
            dws = _WeightGradient.apply(step, count, x, *(w.detach() for w in weights), *dys) if need_w else [None] * count
            return None, None, None, dx, *dws
        dx, dws, _ = step.backward(x.contiguous(), _contiguous(weights), _contiguous(dys), need_x, need_w, [False] * count)
        return None, None, None, None if dx is None else dx.view(x.shape), *dws


class _InputGradient(Function):
    """dX = sum of dY_i W_i^T; `x` tells its shape only."""

    @staticmethod
    def forward(ctx: Any, step: Any, count: int, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.step, ctx.count = step, count
        ctx.save_for_backward(*tensors)
        weights, dys = _contiguous(tensors[:count]), _contiguous(tensors[count:])
        return shaped(step.backward(x.contiguous(), weights, dys, True, False, [False] * count)[0], x.shape)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        step, count = ctx.step, ctx.count
        weights, dys = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needs = asked(ctx)
        need_w, need_dy = any(needs[3 : 3 + count]), any(needs[3 + count :])
        dws = _WeightGradient.apply(step, count, g, *(w.detach() for w in weights), *dys) if need_w else [None] * count
        return None, None, None, *dws, *(Product.apply(step, count, None, g, *weights) if need_dy else [None] * count)


class _WeightGradient(Function):
    """dW_i = X^T dY_i; the weights tell their shapes only."""

    @staticmethod
    def forward(ctx: Any, step: Any, count: int, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        ctx.step, ctx.count = step, count
        weights, dys = _contiguous(tensors[:count]), _contiguous(tensors[count:])
        ctx.save_for_backward(x, *tensors[count:])
        return tuple(step.backward(x.contiguous(), weights, dys, False, True, [False] * count)[1])

    @staticmethod
    def backward(ctx: Any, *gs: torch.Tensor) -> Any:
        step, count = ctx.step, ctx.count
        x, *dys = ctx.saved_tensors
        needs = asked(ctx)
        dx = _InputGradient.apply(step, count, x.detach(), *gs, *dys) if needs[2] else None
        need_dy = any(needs[3 + count :])
        ddys = Product.apply(step, count, None, x, *gs) if need_dy else [None] * count
        return None, None, dx, *[None] * count, *ddys


def _with_dims_of(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Y's rows may come flat, [rows, features], where their number changes; the dims between are X's."""
    if y.dim() == x.dim():
        return y
    inner = x.shape[1:-1]
    return shaped(y, (y.shape[0] // max(1, inner.numel()), *inner, y.shape[-1]))
