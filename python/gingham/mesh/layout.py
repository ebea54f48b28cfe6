"""Which dim of a tensor lies on which mesh axes, and the arithmetic of it: axis names and sizes only, nothing of ours.

A tensor's `cuts` is one tuple of axis names per dim. Cuts are torch.chunk applied axis by axis: 37 rows cut over two
axes of 2 and 3 are 7, 7, 5, 6, 6, 6 rows; blocks may be empty. A `Block` is one (offset, length) per dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

Names = tuple[str, ...]
Cuts = tuple[Names, ...]
Interval = tuple[int, int]
Block = tuple[Interval, ...]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Layout:
    """How an activation [rows, ..., features] is cut: the axes that cut its rows and its features, in cutting order. time: those of
    `rows` that cut the sequence of an activation [batch, time, ..], the others cutting its samples."""

    rows: Names
    features: Names
    time: Names = ()

    def cuts(self, ndim: int, dim: int = 0, ids: bool = False) -> Cuts:
        """Cuts of a tensor of `ndim` dims whose rows lie along `dim` and whose features, if it has more dims, along the last. Where axes
        cut time, it lies along `dim`, by default 1, of [batch, time, ..], of ids also [batch, time]; else all rows lie along `dim`."""
        named: list[Names] = [()] * ndim
        if self.time and (ndim > 2 or ids):
            named[0] = tuple(name for name in self.rows if name not in self.time)
            if ndim > 1:
                named[dim or 1] = self.time
            return tuple(named)
        if ndim > 1:
            named[-1] = self.features
        named[dim] = self.rows
        return tuple(named)


def chunks(size: int, parts: Sequence[int]) -> list[int]:
    """Lengths of the prod(parts) pieces of `size`, cut by torch.chunk once per entry of `parts`; trailing pieces may be 0."""
    pieces = [size]
    for count in parts:
        pieces = [max(0, min(-(-piece // count), piece - index * -(-piece // count))) for piece in pieces for index in range(count)]
    return pieces


def offsets(size: int, parts: Sequence[int]) -> list[int]:
    """The prod(parts) + 1 cut points of `chunks`."""
    return [0, *accumulate(chunks(size, parts))]


def runs(lengths: Sequence[int], place: int, zigzag: bool = False) -> list[Interval]:
    """(first position, count) of the contiguous parts of a sequence's piece: one, or in zigzag order (mesh/zigzag.py) two."""
    if not zigzag:
        return [(sum(lengths[:place]), lengths[place])]
    fronts = [length - length // 2 for length in lengths]
    back = sum(fronts) + sum(length // 2 for length in lengths[place + 1 :])
    return [(sum(fronts[:place]), fronts[place]), (back, lengths[place] // 2)]


def position(names: Names, sizes: Sizes, coordinates: Mapping[str, int]) -> int:
    """Index of a coordinate among the pieces that the axes `names` cut, the first axis varying slowest."""
    index = 0
    for name in names:
        index = index * sizes[name] + coordinates[name]
    return index


def interval(size: int, names: Names, sizes: Sizes, coordinates: Mapping[str, int]) -> Interval:
    """(offset, length) of a coordinate's piece of a dim of `size` cut over the axes `names`."""
    points = offsets(size, [sizes[name] for name in names])
    index = position(names, sizes, coordinates)
    return points[index], points[index + 1] - points[index]


def block(shape: Sequence[int], cuts: Cuts, sizes: Sizes, coordinates: Mapping[str, int]) -> Block:
    """A coordinate's block of a tensor of global `shape`."""
    return tuple(interval(size, names, sizes, coordinates) for size, names in zip(shape, cuts, strict=True))


def coordinates_of(rank: int, sizes: Sizes) -> dict[str, int]:
    """Coordinates of a rank; ranks are row-major in mesh order."""
    found: dict[str, int] = {}
    for name in reversed(list(sizes)):
        rank, found[name] = divmod(rank, sizes[name])
    return {name: found[name] for name in sizes}


def members(names: Names, sizes: Sizes, coordinates: Mapping[str, int]) -> list[int]:
    """Ranks that differ from `coordinates` in the axes `names` only, the first axis varying slowest."""
    ranks = []
    for index in range(prod(sizes[name] for name in names)):
        inner = coordinates_of(index, {name: sizes[name] for name in names})
        ranks.append(position(tuple(sizes), sizes, {**coordinates, **inner}))
    return ranks


def dims_of_axes(axes: Sequence[str], cuts: Cuts) -> list[int | None]:
    """Per mesh axis the dim that it cuts (a DTensor's Shard) or None (Replicate). Raises ValueError where a dim's axes
    are not in mesh order, which DTensor can express only with strided shards."""
    for names in cuts:
        if [name for name in axes if name in names] != list(names):
            raise ValueError(f"axes {names} cut one dim but stand in another order in the mesh {tuple(axes)}")
    return [next((dim for dim, names in enumerate(cuts) if axis in names), None) for axis in axes]


def blocks_from_shapes(shapes: Sequence[Sequence[int]], cuts: Cuts, sizes: Sizes) -> tuple[list[int], list[Block]]:
    """Global shape and every rank's block, from the shapes that the ranks (in rank order) really hold.

    Needs no rule for the cuts: pieces stand side by side in the order of `cuts`. Raises ValueError where ranks that
    should hold pieces of the same size do not.
    """
    places = [coordinates_of(rank, sizes) for rank in range(len(shapes))]
    total, intervals = [], []
    for dim, names in enumerate(cuts):
        indices = [position(names, sizes, place) for place in places]
        lengths = [0] * prod(sizes[name] for name in names)
        for index, shape in zip(indices, shapes, strict=True):
            lengths[index] = shape[dim]
        odd = [rank for rank, (index, shape) in enumerate(zip(indices, shapes, strict=True)) if shape[dim] != lengths[index]]
        if odd:
            raise ValueError(f"ranks disagree on dim {dim}: shapes {[tuple(shape) for shape in shapes]}, cuts {cuts}")
        points = [0, *accumulate(lengths)]
        total.append(points[-1])
        intervals.append([(points[index], lengths[index]) for index in indices])
    return total, [tuple(rank) for rank in zip(*intervals, strict=True)]


@dataclass(frozen=True)
class Piece:
    """What travels between me and the member `peer`: a block of my old (sent) or new (received, kept) tensor."""

    peer: int
    block: Block


@dataclass(frozen=True)
class Relayout:
    """One rank's part of a change of layout: `kept` copies inside the rank as (old block, new block)."""

    kept: tuple[Block, Block]
    sends: list[Piece]
    receives: list[Piece]


def relayout(source: Sequence[Block], target: Sequence[Block], me: int) -> Relayout:
    """Who sends what when every member p changes from the block source[p] to target[p] of one tensor.

    A member that already holds its new block receives nothing. Example, 2 members, 4 columns replicated -> halved:
    nobody sends; halved -> replicated: each sends its 2 columns to the other (an all-gather).
    """

    def received(member: int) -> list[Piece]:
        if within(target[member], source[member]):
            return []
        parts = [Piece(peer, intersection(block, target[member])) for peer, block in enumerate(source) if peer != member]
        return [part for part in parts if volume(part.block)]

    kept = intersection(source[me], target[me])
    sends = [
        Piece(peer, relative(part.block, source[me]))
        for peer in range(len(target))
        if peer != me
        for part in received(peer)
        if part.peer == me
    ]
    receives = [Piece(part.peer, relative(part.block, target[me])) for part in received(me)]
    return Relayout((relative(kept, source[me]), relative(kept, target[me])), sends, receives)


def intersection(one: Block, other: Block) -> Block:
    """What two blocks share; every length is 0 where they share nothing."""
    starts = [max(a, b) for (a, _), (b, _) in zip(one, other, strict=True)]
    lengths = [min(a + length, b + width) - start for (a, length), (b, width), start in zip(one, other, starts, strict=True)]
    if any(length <= 0 for length in lengths):
        return tuple((offset, 0) for offset, _ in one)
    return tuple(zip(starts, lengths, strict=True))


def within(inner: Block, outer: Block) -> bool:
    """Whether a block (empty ones always) lies inside another."""
    return not volume(inner) or intersection(inner, outer) == inner


def volume(block: Block) -> int:
    return prod(length for _, length in block)


def relative(block: Block, origin: Block) -> Block:
    """The same block counted from another block's corner; an empty one lies at the corner."""
    if not volume(block):
        return tuple((0, 0) for _ in block)
    return tuple((offset - start, length) for (offset, length), (start, _) in zip(block, origin, strict=True))


def slices(block: Block) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in block)


def odd_ranks(values: Sequence[Any], ranks: Sequence[int] | None = None) -> tuple[list[int], Any]:
    """The ranks (by default 0, 1, ..) whose value is not the usual one, and the usual one: of several as frequent the first."""
    usual = max(values, key=list(values).count)
    return [rank for rank, value in zip(range(len(values)) if ranks is None else ranks, values, strict=True) if value != usual], usual


def list_of(ranks: Sequence[int]) -> str:
    """For people: "rank 3", "ranks 0, 1"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def words(cuts: Cuts) -> str:
    """ "dim 0 over row, dim 1 over col"."""
    cut = [f"dim {dim} over {', '.join(names)}" for dim, names in enumerate(cuts) if names]
    return ", ".join(cut) or "nowhere (whole on every rank)"
