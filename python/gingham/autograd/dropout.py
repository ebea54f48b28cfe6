"""Dropout by Philox: a mask that depends on the seed, the module's name, the call's number and each element's global index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch

from .. import native
from ..errors import MeshError, ShapeError
from ..function import Function
from ..mesh import Mesh, check_local
from ..mesh.layout import Interval, Layout, blocks_from_shapes, chunks, odd_ranks, runs
from .linear import backward_passes

Key = tuple[int, int, int]  # seed, name, call number


class Masks(Protocol):
    """What a dropout module is to functions that draw its masks themselves."""

    p: float
    handle: str

    def key(self) -> Key: ...


masks: WeakValueDictionary[str, Any] = WeakValueDictionary()  # the modules by their handle, for compiled graphs


def dropout(
    x: torch.Tensor, p: float, key: Key, mesh: Mesh | None, layout: str = "outer", dims: tuple[int, int] = (0, -1), zigzag: bool = False
) -> torch.Tensor:
    """x * keep / (1 - p), keep drawn by Philox from key = (seed, name, call) and the global index of each element.

    dims: the dims of x that hold rows and features. No bytes but the control message that tells the rows' offset, once for all
    activations of a forward pass that are cut alike (mesh/told.py); it carries the seed too, of which rank 0's counts, so that ranks
    with generators of their own (torch.manual_seed(seed + rank)) draw one mask. zigzag: the rows are a sequence in that order
    (mesh/zigzag.py), their index is the place in the sequence. Raises MeshError where the ranks differ in p, the name or the call's
    number.
    """
    check_local(x, "dropout's x", mesh)
    key, shape, start = dropout_place(x, mesh, layout, dims, p, key)
    program = None if mesh is None else mesh.program
    row, runs = row_runs(x, mesh, layout, dims, shape, start, zigzag)
    parts = x.split([count for _, count in runs], row) if len(runs) > 1 else [x]
    starts = [[*start[:row], position, *start[row + 1 :]] for position, _ in runs]
    dropped = [_Dropout.apply(part, p, key, shape, start, program) for part, start in zip(parts, starts, strict=True)]
    return dropped[0] if len(dropped) == 1 else torch.cat(dropped, row)


def row_runs(
    x: torch.Tensor, mesh: Mesh | None, layout: str, dims: tuple[int, int], shape: list[int], start: list[int], zigzag: bool
) -> tuple[int, list[Interval]]:
    """The dim of x's rows, and where they stand in the whole: (position, count) of one run, or of two of a sequence in zigzag order.
    Raises ShapeError where a rank's rows are not those that scatter gives it."""
    row, names = dims[0] % x.dim(), () if mesh is None else mesh.layout(layout).rows
    if mesh is not None and mesh.layout(layout).time and x.dim() > 2:
        row, names = row or 1, mesh.layout(layout).time
    if mesh is None or not zigzag or not mesh.parts(names) > 1:
        return row, [(start[row], x.shape[row])]
    lengths = chunks(shape[row], [mesh.sizes[name] for name in names])
    place = mesh.interval(len(lengths), names)[0]
    if lengths[place] != x.shape[row]:
        got = f"got {x.shape[row]} along dim {row}"
        raise ShapeError(f"dropout on rank {mesh.rank}: {got}, expected {lengths[place]} of {shape[row]} places with order='zigzag'")
    return row, runs(lengths, place, True)


def dropout_place(
    x: torch.Tensor, mesh: Mesh | None, layout: str, dims: tuple[int, int], p: float, key: Key
) -> tuple[Key, list[int], list[int]]:
    """The key on which the ranks agree, the global shape of an activation and where x begins in it."""
    shape, start = list(x.shape), [0] * x.dim()
    if mesh is not None and mesh.size > 1:
        row, feature = (dim % x.dim() for dim in dims)
        named = mesh.layout(layout)
        if row == feature:
            named = Layout(named.rows, ())
        label = f"Dropout(p={p}, layout={layout!r}, dims={dims}, name {key[1]:x})"
        block = (tuple(shape), row, feature, named, key[0])
        heard = mesh.told.find(block, key[1], backward_passes()) if x.dim() > 2 else None
        if heard is not None:
            seed, shape, start = heard
            mesh.program.note(native.Label(f"{label} call {key[2]} of a block as told before"))
            return (seed, *key[1:]), list(shape), list(start)
        places: tuple[int, ...] = row, feature
        cuts = named.rows, named.features
        if named.time and x.dim() > 2:
            places, cuts = (0, row or 1), (tuple(name for name in named.rows if name not in named.time), named.time)
        places = places[:1] if places[0] == places[1] else places
        mesh.say(label)
        told = mesh.world.sizes([*key, mesh.told.is_the_batch(shape[places[0]]), *(shape[dim] for dim in places)])
        total, blocks = blocks_from_shapes([each[4:] for each in told], cuts[: len(places)], mesh.sizes)
        key = _agreed([(seed, name, call) for seed, name, call, *_ in told], mesh)
        for dim, size, (first, _) in zip(places, total, blocks[mesh.index], strict=True):
            shape[dim], start[dim] = size, first
        same = (places, named, *(tuple(each[4:]) for each in told))
        mesh.told.keep(block, key[1], same, (key[0], list(shape), list(start)), all(each[3] for each in told))
    return key, shape, start


def _agreed(keys: Sequence[Key], mesh: Mesh) -> Key:
    """Rank 0's. Raises MeshError where the ranks make other calls."""
    calls = [call for _, _, call in keys]
    odd, usual = odd_ranks(calls, mesh.ranks)
    if odd:
        theirs = [calls[mesh.ranks.index(rank)] for rank in odd]
        raise MeshError(
            f"dropout on rank {mesh.rank}: ranks {odd} make call {theirs} of it, the others call {usual};"
            " every rank must make the same calls in training mode"
        )
    return keys[0]


def dropout_again(x: torch.Tensor, p: float, numbers: torch.Tensor, mesh: Mesh | None) -> torch.Tensor:
    """dropout by `numbers_of`; without a gradient."""
    (seed, name, call, row, count, second), n = numbers[:6].tolist(), x.dim()
    shape, start = numbers[6 : 6 + n].tolist(), numbers[6 + n :].tolist()
    program = None if mesh is None else mesh.program
    parts = x.split([count, x.shape[row] - count], row) if count < x.shape[row] else [x]
    starts = [start, [*start[:row], second, *start[row + 1 :]]][: len(parts)]
    made = [native.dropout(part.contiguous(), p, seed, name, call, shape, at, program) for part, at in zip(parts, starts, strict=True)]
    return made[0] if len(made) == 1 else torch.cat(made, row)


def numbers_of(key: Key, row: int, runs: list[Interval], shape: list[int], start: list[int]) -> torch.Tensor:
    """[6 + 2 dims]: the key, the dim of the rows, how many of them the first run has, where the second begins, the global shape, and where
    x begins in it."""
    (position, count), second = runs[0], runs[-1][0]
    return torch.tensor([*key, row, count, second, *shape, *start[:row], position, *start[row + 1 :]], device="cpu")


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, key: Key, shape: list[int], start: list[int], job: Any) -> torch.Tensor:
        ctx.arguments = p, key, shape, start, job
        return native.dropout(x.contiguous(), p, *key, shape, start, job)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Dropout.apply(grad, *ctx.arguments), None, None, None, None, None
