"""The block of a per-feature parameter that belongs to an activation's features, with its gradient summed over rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..autograd.background import all_reduced, summed
from ..autograd.casts import like, local_of
from ..autograd.gradients import deferring, sum_or_defer
from ..autograd.second_order import refuse_deferred, replay, shared
from ..function import Function, nodes_of
from ..graph_ops import KNOWN, Meta, Traced, block_of, find, names_of, traced
from ..mesh import Mesh
from ..mesh.layout import Layout, Names


def stored_axes(mesh: Mesh, features: Names) -> Names:
    """The axes that cut a per-feature parameter at rest: those of the features, in full where a DTensor can say so (in
    the mesh's order), else the first."""
    return features if list(features) == [name for name in mesh.sizes if name in features] else features[:1]


def place_of_features(mesh: Mesh, features: Names, stored: Names, size: int) -> slice:
    """This rank's features, of `size`, within its block of a parameter that may be cut over fewer axes."""
    start, length = mesh.interval(size, features)
    origin, _ = mesh.interval(size, stored)
    return slice(start - origin, start - origin + length)


def users_of(layout: Layout, stored: Names) -> tuple[Names, Names]:
    """The axes of those who hold other rows, and of those who hold other features of the same stored block."""
    return layout.rows, tuple(name for name in layout.features if name not in stored)


def sum_parts(mesh: Mesh, users: tuple[Names, Names], parameter: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Sums of rows over all `users`, made or left out by the rule of no_sync."""
    return sum_or_defer(mesh, users[0] + users[1], parameter, sums.contiguous(), partial(all_reduced(*users), mesh.axis))


def block_of_features(parameter: torch.Tensor, mesh: Mesh, layout: Layout, stored: Names, size: int) -> torch.Tensor:
    """[features here] of a DTensor [size] cut over `stored`. Backward all-reduces the gradient over the rows' axes, in
    float32 at least: 2 size/pf (pm-1)/pm words of it over pf feature and pm row ranks."""
    if torch.compiler.is_compiling():
        names = (layout.rows, layout.features, stored)
        return traced("block_of_features", [mesh.handle, *(",".join(each) for each in names), str(size)], [block_of(parameter)])[0]
    return _BlockOfFeatures.apply(parameter, mesh, layout, stored, size)


class _BlockOfFeatures(Function):
    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, mesh: Mesh, layout: Layout, stored: Names, size: int) -> torch.Tensor:
        ctx.parameter, ctx.arguments = parameter, (mesh, layout, stored)
        ctx.place = place_of_features(mesh, layout.features, stored, size)
        return local_of(parameter)[ctx.place].clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        local = local_of(ctx.parameter)
        mesh, layout, stored = ctx.arguments
        if torch.is_grad_enabled():
            refuse_deferred("a bias", mesh, deferring([ctx.parameter]))
            names = (*layout.rows, *(name for name in layout.features if name not in stored))
            return *replay(lambda block: [shared(block, mesh, names)[ctx.place]], [ctx.parameter], [True], [grad]), None, None, None, None
        sums = torch.zeros(local.shape, dtype=grad.dtype if grad.dtype == torch.float64 else torch.float32, device=grad.device)
        sums[ctx.place] = grad.to(sums.dtype)
        users, total = users_of(layout, stored), None
        if deferring([ctx.parameter]):
            total = sum_parts(mesh, users, ctx.parameter, sums)
        else:
            total = summed(mesh, [ctx.parameter], nodes_of(ctx, [ctx.parameter]), sums, all_reduced(*users), "a bias")
        return like(None if total is None else total.to(local.dtype), ctx.parameter), None, None, None, None


def _arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    rows, features, stored = map(names_of, words[1:4])
    return [tensors[0], find(words[0]), Layout(rows, features), stored, int(words[4])]


def _results(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    parameter, mesh, layout, _, size = _arguments(words, tensors)
    return [([mesh.interval(size, layout.features)[1]], parameter.dtype)]


KNOWN["block_of_features"] = Traced(_BlockOfFeatures, _arguments, _results)
