"""Embedding: a table cut over rows and features of the mesh."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..functional import like, local_of
from ..layout import chunks
from ..mesh import Mesh, ShapeError, check_local, current


class Embedding(torch.nn.Module):
    """torch.nn.Embedding: ids [...] (cut like rows, mesh.scatter(ids)) -> [..., width], a block in the outer layout.

    weight: a DTensor [count, width]; width lies on outer's feature axes, count on the axes that the activations' rows
    lie on (not depth, where weights are replicated) or, in classic 1d, on tp. Forward gathers this rank's columns of
    the table, backward reduce-scatters their gradient. Bytes: count x width words gathered over the row ranks, the same
    again reduce-scattered, an all-reduce over depth; classic 1d: the gather alone.
    """

    def __init__(self, count: int, width: int, mesh: Mesh | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.mesh, self.count, self.width = current(mesh), count, width
        axes, outer = self.mesh.axes, self.mesh.outer
        self.summed = tuple(name for name in outer.rows if name not in axes.depth)
        self.cut = self.summed or tuple(name for name in axes.n + axes.k if name not in outer.features)
        weight = torch.empty(count, width, dtype=dtype)
        torch.nn.init.normal_(weight)
        self.weight = self.mesh.parameter(weight, (self.cut, outer.features))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        check_local(ids, "Embedding's ids", self.mesh)
        if ids.is_floating_point():
            raise TypeError(f"Embedding: got ids of {ids.dtype}, expected an integer dtype")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.count:
            raise ShapeError(f"Embedding({self.count}): ids lie in {int(ids.min())}..{int(ids.max())}, expected 0..{self.count - 1}")
        return _Embedding.apply(self.weight, ids, self)

    def extra_repr(self) -> str:
        return f"{self.count}, {self.width}"


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor, layer: Embedding) -> torch.Tensor:
        ctx.layer, ctx.weight = layer, weight
        ctx.save_for_backward(ids)
        axis, local = layer.mesh.axis(layer.cut), local_of(weight)
        table = torch.cat(axis.all_gather(local, layer.mesh.source)) if axis is not None else local
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (ids,), layer, mesh = ctx.saved_tensors, ctx.layer, ctx.layer.mesh
        table = dy.new_zeros(layer.count, dy.shape[-1])
        table.index_add_(0, ids.reshape(-1), dy.reshape(ids.numel(), dy.shape[-1]))
        axis = mesh.axis(layer.cut)
        if axis is not None and layer.summed:
            table = axis.reduce_scatter(table, chunks(layer.count, [mesh.sizes[name] for name in layer.cut]), mesh.source)
        elif axis is not None:
            table = table.narrow(0, *mesh.interval(layer.count, layer.cut)).contiguous()
        depth = mesh.axis(mesh.axes.depth)
        if depth is not None:
            depth.all_reduce_(table, mesh.source)
        return like(table, ctx.weight), None, None
