"""Changes of place: an activation's layout, a parameter's cuts. What a rank has it keeps; the rest comes from one holder.

Example, 2 ranks, 4 columns, halved -> replicated: each sends its 2 columns to the other; back: nobody sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .. import graph_ops
from ..errors import ShapeError
from ..function import Function
from ..graph_ops import names_of, traced
from ..mesh import Mesh
from ..mesh.layout import (
    Block,
    Cuts,
    Layout,
    Names,
    Piece,
    Relayout,
    block,
    coordinates_of,
    intersection,
    interval,
    members,
    relative,
    slices,
    volume,
)
from ..mesh.layout import relayout as relayout_plan
from .casts import like, local_of
from .second_order import check_versions, shaped, to_parameter, versions_of


def relayout(x: torch.Tensor, mesh: Mesh, source: Layout, target: Layout, features: int) -> torch.Tensor:
    """x [rows, ..., features] moved from one layout to the other; `features`: the global size of the last dim.

    Its gradient is the opposite relayout. Bytes: every word that a rank's new block has and its old one had not, at
    most one message a peer; nothing where the layouts are equal or the new block lies inside the old one.
    """
    if source is target or source == target:
        return x
    checks = mesh.checks
    if checks is not None and hasattr(x, "checks"):
        before, after = ((layout.features,) if x.dim() == 1 else layout.cuts(x.dim()) for layout in (source, target))
        return checks.give(relayout(checks.take(x, before, "relayout"), mesh, source, target, features), after)
    if torch.compiler.is_compiling():
        names = (source.rows, source.features, target.rows, target.features)
        return traced("relayout", [mesh.handle, *(",".join(each) for each in names), str(features)], [x])[0]
    return _Relayout.apply(x, mesh, source, target, features)


class _Relayout(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Mesh, source: Layout, target: Layout, features: int) -> torch.Tensor:
        ctx.arguments = mesh, target, source, features
        held = mesh.interval(features, source.features)[1]
        if x.shape[-1] != held:
            raise ShapeError(f"relayout: rank {mesh.rank} got x of shape {tuple(x.shape)}, expected [..., {held}], its block of {features}")
        flat = x.reshape(x.shape[0] if x.dim() > 1 else 1, x.shape[1:-1].numel(), held)
        moved = set(source.features + target.features) | set(source.rows) ^ set(target.rows)
        names = tuple(name for name in mesh.sizes if name in moved)
        blocks = _blocks(mesh, names, (source, target), flat, features)
        me = members(names, mesh.sizes, mesh.coordinates).index(mesh.index)
        plan = relayout_plan(blocks[0], blocks[1], me)
        new = mesh.empty([length for _, length in blocks[1][me]], x.dtype)
        new[slices(plan.kept[1])] = flat[slices(plan.kept[0])]
        # decided by the layouts, never by sizes: all ranks of the job must make the same calls
        if set(names) & set(source.rows + source.features):
            sends = [(piece.peer, flat[slices(piece.block)].contiguous()) for piece in plan.sends]
            receives = [(piece.peer, [length for _, length in piece.block]) for piece in plan.receives]
            agreed = -1 if set(names) & set(source.rows + target.rows) else flat.shape[0]
            arrived = mesh.joint(names).exchange(sends, receives, str(x.dtype).removeprefix("torch."), rows=agreed, features=features)
            for piece, tensor in zip(plan.receives, arrived, strict=True):
                new[slices(piece.block)] = tensor
        return shaped(new, (new.shape[0], *x.shape[1:-1], new.shape[-1]) if x.dim() > 1 else (new.numel(),))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return relayout(grad, *ctx.arguments), None, None, None, None


def _relayout_arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    names = [names_of(word) for word in words[1:5]]
    return [tensors[0], graph_ops.find(words[0]), Layout(*names[:2]), Layout(*names[2:]), int(words[5])]


def _relayout_results(words: list[str], tensors: list[torch.Tensor]) -> list[graph_ops.Meta]:
    x, mesh, source, target, features = _relayout_arguments(words, tensors)
    width = mesh.interval(features, target.features)[1]
    return [([graph_ops.evenly(mesh, x.shape[0], source.rows, target.rows), *x.shape[1:-1], width] if x.dim() > 1 else [width], x.dtype)]


graph_ops.KNOWN["relayout"] = graph_ops.Traced(_Relayout, _relayout_arguments, _relayout_results, saves=False)


def _blocks(mesh: Mesh, names: Names, layouts: tuple[Layout, Layout], flat: torch.Tensor, features: int) -> list[list[Block]]:
    """Every member's block of [rows, between, features] before and after, rows counted among the members."""
    places = [coordinates_of(rank, mesh.sizes) for rank in members(names, mesh.sizes, mesh.coordinates)]
    source, target = (tuple(name for name in layout.rows if name in names) for layout in layouts)
    total = flat.shape[0]
    before = [(0, total)] * len(places)
    if source:
        counts = [count for (count,) in mesh.joint(names).sizes([total])]
        before, total = [(sum(counts[:index]), count) for index, count in enumerate(counts)], sum(counts)
    after = [interval(total, target, mesh.sizes, place) for place in places]
    return [
        [(row, (0, flat.shape[1]), interval(features, layout.features, mesh.sizes, place)) for row, place in zip(rows, places, strict=True)]
        for rows, layout in zip((before, after), layouts, strict=True)
    ]


def reshard(weight: torch.Tensor, mesh: Mesh, source_cuts: Cuts, target_cuts: Cuts, shape: Sequence[int] | None = None) -> torch.Tensor:
    """This rank's block, cut as target_cuts, of a parameter whose block here is cut as source_cuts: a plain tensor.

    weight: a DTensor, or a local block of a tensor of global `shape`; a DTensor with a `shape` is seen as that one, of
    which its block must be a view (the weight of a convolution as a matrix). Differentiable: the gradient of every block is
    whole on each rank that holds it and goes back to the source's cuts, in the form of `weight`. Bytes: every word that
    the new block has and the old had not, from one rank each, at most one message a peer; ranks that differ only in
    axes neither cut names (replicas) do the same among themselves. Raises ShapeError where the block does not fit.
    """
    local = graph_ops.block_of(weight) if torch.compiler.is_compiling() else local_of(weight)
    held = tuple(local.shape)
    if shape is None and not isinstance(weight, DTensor):
        raise ShapeError(f"reshard: rank {mesh.rank} got a local block {held} without shape=, the global shape")
    seen = shape is not None and isinstance(weight, DTensor)
    shape = tuple(weight.shape) if shape is None else shape
    expected = tuple(length for _, length in block(shape, source_cuts, mesh.sizes, mesh.coordinates))
    if held != expected and not (seen and prod(held) == prod(expected)):
        raise ShapeError(f"reshard: rank {mesh.rank} got a block {held}, expected {expected} of {tuple(shape)}")
    if torch.compiler.is_compiling():
        return traced("reshard", [mesh.handle, _text(source_cuts), _text(target_cuts), _text((tuple(map(str, shape)),))], [local])[0]
    return _Reshard.apply(weight, mesh, source_cuts, target_cuts, tuple(shape))


class _Reshard(Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, mesh: Mesh, source: Cuts, target: Cuts, shape: tuple[int, ...]) -> torch.Tensor:
        ctx.weight, ctx.arguments = weight, (mesh, source, target, shape)
        # what is made of the weight here stands for it where a torch.nn layer would save the weight itself
        ctx.versions = versions_of([("weight", weight)])
        held = [length for _, length in block(shape, source, mesh.sizes, mesh.coordinates)]
        return move_block(local_of(weight).view(held), mesh, source, target, shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        mesh, source, target, shape = ctx.arguments
        check_versions("a resharded layer", mesh, ctx.versions)
        if torch.is_grad_enabled():
            moved = _Reshard.apply(grad, mesh, target, source, shape)
            return to_parameter(moved.reshape(local_of(ctx.weight).shape), ctx.weight), None, None, None, None
        moved = move_block(grad, mesh, target, source, shape)
        return like(moved.view(local_of(ctx.weight).shape), ctx.weight), None, None, None, None


def _text(cuts: Cuts) -> str:
    return ";".join(",".join(names) for names in cuts)


def _reshard_arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    source, target, shape = (tuple(map(names_of, word.split(";"))) for word in words[1:])
    return [tensors[0], graph_ops.find(words[0]), source, target, tuple(map(int, shape[0]))]


def _reshard_results(words: list[str], tensors: list[torch.Tensor]) -> list[graph_ops.Meta]:
    weight, mesh, _, target, shape = _reshard_arguments(words, tensors)
    return [([length for _, length in block(shape, target, mesh.sizes, mesh.coordinates)], weight.dtype)]


graph_ops.KNOWN["reshard"] = graph_ops.Traced(_Reshard, _reshard_arguments, _reshard_results, reads=lambda words, needs: (0,))


def move_block(local: torch.Tensor, mesh: Mesh, source: Cuts, target: Cuts, shape: tuple[int, ...]) -> torch.Tensor:
    """reshard without a gradient."""
    key = ("reshard", source, target, shape)
    if key not in mesh.steps:
        mesh.steps[key] = _moves(mesh, source, target, shape)
    axis, plan, new_shape = mesh.steps[key]
    new = mesh.empty(new_shape, local.dtype)
    new[slices(plan.kept[1])] = local[slices(plan.kept[0])]
    if axis is None:
        return new
    sends = [(piece.peer, local[slices(piece.block)].contiguous()) for piece in plan.sends]
    receives = [(piece.peer, [length for _, length in piece.block]) for piece in plan.receives]
    arrived = axis.exchange(sends, receives, str(local.dtype).removeprefix("torch."), features=prod(shape))
    for piece, tensor in zip(plan.receives, arrived, strict=True):
        new[slices(piece.block)] = tensor
    return new


def _moves(mesh: Mesh, source: Cuts, target: Cuts, shape: tuple[int, ...]) -> tuple[Any, Relayout, list[int]]:
    """The communicator (None: nobody sends), this rank's part of the exchange and the shape of its new block. A piece
    comes from the holder that differs from the receiver in the fewest axes, so that replicas keep to themselves."""
    places = [coordinates_of(rank, mesh.sizes) for rank in range(mesh.size)]
    before, after = ([block(shape, cuts, mesh.sizes, place) for place in places] for cuts in (source, target))
    moves = []
    for rank, wanted in enumerate(after):
        for held in dict.fromkeys(before):
            part = intersection(held, wanted)
            if held != before[rank] and volume(part):
                holders = [other for other, theirs in enumerate(before) if theirs == held]
                sender = min(holders, key=lambda other: sum(places[other][name] != places[rank][name] for name in mesh.sizes))
                moves.append((sender, rank, part))
    crossed = {name for sender, rank, _ in moves for name in mesh.sizes if places[sender][name] != places[rank][name]}
    names = _covering(mesh, crossed)
    ranks = members(names, mesh.sizes, mesh.coordinates)
    mine, kept = mesh.index, intersection(before[mesh.index], after[mesh.index])
    plan = Relayout(
        (relative(kept, before[mine]), relative(kept, after[mine])),
        [Piece(ranks.index(rank), relative(part, before[mine])) for sender, rank, part in moves if sender == mine],
        [Piece(ranks.index(sender), relative(part, after[mine])) for sender, rank, part in moves if rank == mine],
    )
    return mesh.axis(names), plan, [length for _, length in after[mine]]


def _covering(mesh: Mesh, crossed: set[str]) -> Names:
    """The fewest axes that hold `crossed` and have a communicator of their own."""
    candidates = [(), *((name,) for name in mesh.sizes), mesh.axes.m, mesh.outer.features, tuple(mesh.sizes)]
    names = min((names for names in candidates if crossed <= set(names)), key=mesh.parts)
    return tuple(name for name in mesh.sizes if name in names)
