"""matmul: C = A B on blocks that every axis of the mesh cuts, differentiable twice.

Each of the three products' gradients is made of the other two, on the same operand layouts (THEORY.md section 1).
"""

from __future__ import annotations

from typing import Any

import torch

from .errors import ShapeError
from .functional import make_step
from .mesh import Mesh, check_local, current
from .redistribute import cast_for_autocast


def matmul(a: torch.Tensor, b: torch.Tensor, mesh: Mesh | None = None, shape: tuple[int, int, int] | None = None) -> torch.Tensor:
    """C[M,N] = A[M,K] B[K,N] on the blocks of mesh.scatter(operand="a"), "b"; returns this rank's block "c".

    Differentiable twice. shape=(M, K, N) is needed where K or N does not divide by its axes, else ShapeError. Bytes:
    the step of THEORY.md section 1 with no operand replicated: [MK(pn-1) + KN(pm-1) + MN(pk-1)] / P words forward.
    torch.autocast casts a and b, as it does torch.matmul's.
    """
    mesh = current(mesh)
    for tensor, name in ((a, "a"), (b, "b")):
        check_local(tensor, f"matmul's {name}", mesh)
        if tensor.dim() != 2:
            raise ShapeError(f"matmul: {name} has shape {tuple(tensor.shape)}, expected a matrix")
    a, b = cast_for_autocast(a), cast_for_autocast(b)
    _, pn, pk = mesh.grid
    # wrong blocks are left to the step to refuse: it tells the other ranks, which are about to wait for this one
    _, k, n = shape or (0, a.shape[1] * pk * pn, b.shape[1] * pn)
    key = ("matmul", k, n)
    if key not in mesh.steps:
        mesh.steps[key] = make_step(mesh, "matmul", k, [n], False, None)
    try:
        return _Product.apply(a, b, mesh.steps[key])
    except ShapeError as error:
        if shape is not None:
            raise
        raise ShapeError(f"{error}; where K or N does not divide by the mesh's axes pass shape=(M, K, N)") from None


class _Product(torch.autograd.Function):
    """Y = X W. Each of the three products' gradients is made of the other two, on the same operand layouts."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, step: Any) -> torch.Tensor:
        ctx.step = step
        ctx.save_for_backward(x, w)
        return step.forward(x.contiguous(), [w.contiguous()], [None])[0]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        need_x, need_w, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dx = _InputGradient.apply(dy, w, ctx.step) if need_x else None
            return dx, _WeightGradient.apply(x, dy, ctx.step) if need_w else None, None
        dx, dws, _ = ctx.step.backward(x.contiguous(), [w.contiguous()], [dy.contiguous()], need_x, need_w, [False])
        return dx, dws[0], None


class _InputGradient(torch.autograd.Function):
    """dX = dY W^T."""

    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, w: torch.Tensor, step: Any) -> torch.Tensor:
        ctx.step = step
        ctx.save_for_backward(dy, w)
        return step.backward(None, [w.contiguous()], [dy.contiguous()], True, False, [False])[0]

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        dy, w = ctx.saved_tensors
        need_dy, need_w, _ = ctx.needs_input_grad
        ddy = _Product.apply(g, w, ctx.step) if need_dy else None
        return ddy, _WeightGradient.apply(g, dy, ctx.step) if need_w else None, None


class _WeightGradient(torch.autograd.Function):
    """dW = X^T dY."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dy: torch.Tensor, step: Any) -> torch.Tensor:
        ctx.step = step
        ctx.save_for_backward(x, dy)
        return step.backward(x.contiguous(), [None], [dy.contiguous()], False, True, [False])[1][0]

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, dy = ctx.saved_tensors
        need_x, need_dy, _ = ctx.needs_input_grad
        dx = _InputGradient.apply(dy, g, ctx.step) if need_x else None
        return dx, _Product.apply(x, g, ctx.step) if need_dy else None, None
