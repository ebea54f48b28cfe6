"""Dropout by Philox: a mask that depends on the seed, the module's name, the call's number and each element's global index."""

from __future__ import annotations

from typing import Any

import torch

from . import _C
from .layout import Layout
from .mesh import Mesh, check_local


def dropout(
    x: torch.Tensor, p: float, key: tuple[int, int, int], mesh: Mesh | None, layout: str = "outer", dims: tuple[int, int] = (0, -1)
) -> torch.Tensor:
    """x * keep / (1 - p), keep drawn by Philox from key = (seed, name, call) and the global index of each element.

    dims: the dims of x that hold rows and features. No bytes but the control message that tells the rows' offset.
    """
    check_local(x, "dropout's x", mesh)
    return _Dropout.apply(x, p, key, *dropout_place(x, mesh, layout, dims), None if mesh is None else mesh.job)


def dropout_place(x: torch.Tensor, mesh: Mesh | None, layout: str, dims: tuple[int, int]) -> tuple[list[int], list[int]]:
    """The global shape of an activation and where x begins in it."""
    shape, start = list(x.shape), [0] * x.dim()
    if mesh is not None and mesh.size > 1:
        row, feature = (dim % x.dim() for dim in dims)
        named = mesh.layout(layout)
        if row == feature:
            named = Layout(named.rows, ())
        rows, total, columns, width = mesh.extents(named, x.shape[row], x.shape[feature] if row != feature else 0)
        start[row], shape[row] = rows[0], total
        if row != feature:
            start[feature], shape[feature] = columns[0], width
    return shape, start


def dropout_again(x: torch.Tensor, p: float, numbers: torch.Tensor, mesh: Mesh | None) -> torch.Tensor:
    """dropout by numbers [3 + 2 dims]: the key, the global shape and the start; without a gradient."""
    seed, name, call, *place = numbers.tolist()
    return _C.dropout(x.contiguous(), p, seed, name, call, place[: x.dim()], place[x.dim() :], None if mesh is None else mesh.job)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, p: float, key: tuple[int, int, int], shape: list[int], start: list[int], job: Any
    ) -> torch.Tensor:
        ctx.arguments = p, key, shape, start, job
        return _C.dropout(x.contiguous(), p, *key, shape, start, job)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Dropout.apply(grad, *ctx.arguments), None, None, None, None, None
