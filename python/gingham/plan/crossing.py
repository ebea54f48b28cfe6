"""What a step receives from other hosts, in bytes of all ranks: the collectives of costs.py, each along its lines of ranks.

What has the loop's dim streams round an axis: where a rank's predecessor is elsewhere, all that it receives comes from there. What has it
not is gathered into each host once, or summed in the branches of a tree of which each that lies on one host sends one sum (docs/theory.md
section 3, collectives/route.h). Example: an all-reduce of 4 words over 4 ranks, two on each of 2 hosts: 4 words cross as sums, 4 as
the other host's sums, of 24 that are received.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from ..mesh.layout import Layout, Names, chunks, coordinates_of, interval, members
from ..mesh.modes import GridShape, groups_of, neighbours
from . import formulas
from .costs import is_swapped, way_of
from .hosts import branches
from .pipeline import balance, borders_of, rank_of
from .workload import Attention, Linears, Loss, Norm, Part, Table, Workload

Words = Callable[[int], int]  # of the block of the rank at a place of the mesh
FOUR, EIGHT = 4, 8  # bytes


class Crossing:
    """Of a grid whose place i is on host hosts[i]. found: bytes that crossed along axes without data and with it; times: how often what is
    counted next is made."""

    def __init__(self, grid: GridShape, hosts: Sequence[int], item: int) -> None:
        self.grid, self.hosts, self.item, self.times = grid, tuple(hosts), item, 1
        self.found = {"tensor": 0, "data": 0}

    def piece(self, size: int, names: Names, place: int) -> int:
        return _piece(self.grid, size, names, place)

    def lines(self, names: Names) -> list[tuple[int, ...]]:
        return _lines(self.grid, self.hosts, names)

    def count(self, names: Names, words: int, item: int = 0) -> None:
        axis = "data" if "data" in names and self.grid.sizes.get("data", 1) > 1 else "tensor"
        self.found[axis] += self.times * words * (item or self.item)

    def gather(self, names: Names, words: Words, item: int = 0) -> None:
        for line in self.lines(names):
            self.count(names, sum(map(words, line)) * (len({self.hosts[each] for each in line}) - 1), item)

    def scatter(self, names: Names, words: Words, item: int = 0) -> None:
        """A reduce-scatter; words: of the sum that a place gets."""
        for line in self.lines(names):
            of = [self.hosts[each] for each in line]
            heads = [of[first] for first in branches(of)]
            self.count(names, sum(words(each) * sum(host != self.hosts[each] for host in heads) for each in line), item)

    def all_reduce(self, names: Names, words: Words, item: int = 0) -> None:
        """words: of the tensor, the same along the line, which is cut anew."""
        for line in self.lines(names):
            shares = dict(zip(line, chunks(words(line[0]), [len(line)]), strict=True))
            of = [self.hosts[each] for each in line]
            heads = [of[first] for first in branches(of)]
            summed = sum(shares[each] * sum(host != self.hosts[each] for host in heads) for each in line)
            self.count(names, summed + sum(shares.values()) * (len(set(of)) - 1), item)

    def stream(self, names: Names, words: Words, summed: bool = False, item: int = 0) -> None:
        """A ring; summed: of sums that pass, to their owners."""
        for line in self.lines(names):
            total = sum(map(words, line))
            for at, place in enumerate(line):
                if self.hosts[line[at - 1]] != self.hosts[place]:
                    self.count(names, total - words(line[at - 1] if summed else place), item)


@lru_cache(maxsize=1 << 16)
def _piece(grid: GridShape, size: int, names: Names, place: int) -> int:
    return interval(size, names, grid.sizes, coordinates_of(place, grid.sizes))[1]


@lru_cache(maxsize=1 << 12)
def _lines(grid: GridShape, hosts: tuple[int, ...], names: Names) -> list[tuple[int, ...]]:
    """The places along axes, in the order of their communicator; those on one host are left out."""
    wanted = {name for name in names if grid.sizes[name] > 1}
    if not wanted:
        return []
    groups = groups_of(grid.axes)
    world = groups.pop("world")  # that of all axes where no other group has them
    fitting = [each for each in (world, *groups.values()) if {name for name in each if grid.sizes[name] > 1} == wanted]
    order = fitting[-1] if fitting else names
    found = {tuple(members(order, grid.sizes, coordinates_of(place, grid.sizes))) for place in range(grid.size)}
    return [line for line in sorted(found) if len({hosts[each] for each in line}) > 1]


@lru_cache(maxsize=1 << 16)
def crossed(
    grid: GridShape, part: Part, rows: tuple[int, ...], context: int, item: int, hosts: tuple[int, ...], accumulates: bool
) -> tuple[int, int]:
    """(tensor, data) of a part of a model in a step of micro-batches of so many rows. Raises NotImplementedError for what is not priced."""
    found = Crossing(grid, hosts, item)
    if isinstance(part, Linears):
        _linears(found, part, rows, context, accumulates)
    elif isinstance(part, Table):
        _table(found, part, len(rows), accumulates)
    elif isinstance(part, Norm):
        _norm(found, part, rows, context, accumulates)
    elif isinstance(part, Loss):
        _loss(found, rows, context, accumulates)
    elif isinstance(part, Attention):
        _attention(found, part, rows, context)
    return found.found["tensor"], found.found["data"]


def _block(found: Crossing, rows: int, context: int, layout: Layout, features: int, place: int) -> int:
    """Words of an activation [rows, context, features]."""
    names = tuple(name for name in layout.rows if name not in layout.time)
    time = found.piece(context, layout.time, place)
    return found.piece(rows, names, place) * time * found.piece(features, layout.features, place)


def _linears(found: Crossing, part: Linears, rows: Sequence[int], context: int, accumulates: bool) -> None:
    grid, axes = found.grid, found.grid.axes
    swapped = is_swapped(grid, part)
    x, y = (grid.inner, grid.outer) if swapped else (grid.outer, grid.inner)
    first, second = (axes.k, axes.n) if swapped else (axes.n, axes.k)  # over which X, and Y, travel
    over_x, over_y = (axes.k, axes.n) if not swapped else (axes.n, axes.k)  # that cut W along k and n
    by_rows = bool({*axes.n, *axes.k} & {*grid.outer.rows, *grid.inner.rows})
    source, target = (grid.layout(end) for end in part.layout.split("->"))
    if (source, target) != (x, y) and any(found.lines(tuple(grid.sizes))):
        raise NotImplementedError(f"a linear {part.layout} that moves its blocks before or after is not priced across hosts")

    def weight(place: int, size: int, kept: Names = ()) -> int:
        out, into = (over_y + axes.gathered, over_x) if swapped else (over_y, over_x + axes.gathered)
        return found.piece(size, out + kept, place) * found.piece(part.k, into, place)

    for count, found.times in Counter(rows).items():

        def of_x(place: int, count: int = count) -> int:
            return _block(found, count, context, x, part.k, place)

        _operand(found, first, of_x, not swapped or by_rows, formulas.x_is_whole(grid, swapped), 2, 1)
        for size in part.n:

            def of_y(place: int, count: int = count, size: int = size) -> int:
                return _block(found, count, context, y, size, place)

            _operand(found, second, of_y, swapped or by_rows, formulas.x_is_whole(grid, not swapped), 1, 1)
            for _ in range(2):
                found.stream(axes.gathered, lambda place, size=size: weight(place, size))  # type: ignore[misc]
            found.stream(axes.gathered, lambda place, size=size: weight(place, size), summed=True)  # type: ignore[misc]
    for size in part.n:
        found.times = 1 if accumulates else len(rows)
        found.gather(axes.kept, lambda place, size=size: weight(place, size, axes.kept))  # type: ignore[misc]
        found.scatter(axes.kept, lambda place, size=size: weight(place, size, axes.kept))  # type: ignore[misc]
        found.all_reduce(axes.depth, lambda place, size=size: weight(place, size, axes.kept))  # type: ignore[misc]
        if part.bias:
            _bias(found, size, y, over_y, len(rows), accumulates)


def _operand(found: Crossing, names: Names, words: Words, streams: bool, whole: bool, gathers: int, sums: int) -> None:
    """X or Y of a linear map, forward and backward: gathered so many times and summed so many; whole: it is one sum of the whole block."""
    if whole:
        for _ in range(sums):
            found.all_reduce(names, words)
        return
    for _ in range(gathers):
        found.stream(names, words) if streams else found.gather(names, words)
    for _ in range(sums):
        found.stream(names, words, summed=True) if streams else found.scatter(names, words)


def _bias(found: Crossing, size: int, y: Layout, over: Names, parts: int, accumulates: bool) -> None:
    grid, axes = found.grid, found.grid.axes

    def words(place: int) -> int:
        return found.piece(size, over, place)

    found.times = 1
    if accumulates and y.features == over:
        found.all_reduce(y.rows, words)
        return
    found.times = parts
    if not axes.replicas or not grid.parts(axes.gathered) > 1:
        found.all_reduce(axes.m, words)
        return

    def part(place: int) -> int:
        return chunks(words(place), [grid.parts(axes.gathered)])[_index(found, axes.gathered, place)]

    found.scatter(axes.gathered, part)
    found.all_reduce(axes.replicas, part)
    found.gather(axes.gathered, part)


def _index(found: Crossing, names: Names, place: int) -> int:
    index = 0
    for name in names:
        index = index * found.grid.sizes[name] + coordinates_of(place, found.grid.sizes)[name]
    return index


def _table(found: Crossing, part: Table, parts: int, accumulates: bool) -> None:
    grid, axes = found.grid, found.grid.axes
    cut, summed = formulas.table_axes(grid)

    def words(place: int, kept: Names = ()) -> int:
        return found.piece(part.count, cut + kept, place) * found.piece(part.width, grid.outer.features, place)

    found.times = parts
    found.gather(cut, words)
    if summed:
        found.scatter(cut, words)
    found.times = 1 if accumulates else parts
    found.gather(axes.kept, lambda place: words(place, axes.kept))
    found.scatter(axes.kept, lambda place: words(place, axes.kept))
    found.all_reduce(axes.depth, lambda place: words(place, axes.kept))


def _norm(found: Crossing, part: Norm, rows: Sequence[int], context: int, accumulates: bool) -> None:
    layout, stored = found.grid.outer, formulas.norm_axes(found.grid, found.grid.outer)
    alone = Layout(layout.rows, (), layout.time)
    for count, times in Counter(rows).items():
        found.times = 2 * times  # forward and backward
        found.gather(layout.features, lambda place, count=count: part.sums * _block(found, count, context, alone, 1, place), EIGHT)  # type: ignore[misc]
    copies = tuple(name for name in layout.features if name not in stored)
    # put off, each tensor is summed by itself
    found.times, together = (part.tensors, 1) if accumulates else (len(rows), part.tensors)
    for names in (layout.rows, copies):
        found.all_reduce(names, lambda place: together * found.piece(part.features, stored, place), max(FOUR, found.item))


def _attention(found: Crossing, part: Attention, rows: Sequence[int], context: int) -> None:
    """Keys and values over the ranks of a sequence, their gradients back; a ring that hosts cut has no windows, and passes all on."""
    grid, item, wide = found.grid, found.item, max(FOUR, found.item)
    time, head, way = grid.inner.time, part.width // part.heads, way_of(found.grid, part, found.item)
    for count, found.times in Counter(rows).items():

        def keys(place: int, count: int = count) -> int:
            return _block(found, count, context, grid.inner, 2 * part.kv_heads * head, place)

        if way == "ring":
            for _ in range(2):
                found.stream(time, keys, item=item)
            found.stream(time, keys, summed=True, item=wide)
        elif way == "gathered":
            found.gather(time, keys, item)
            found.scatter(time, keys, wide)
        else:
            each = 2 * part.kv_heads + 2 * part.heads  # of q, k, v and the output, there and back
            for line in found.lines(time):
                shares = dict(zip(line, formulas.shares(part.kv_heads, len(line)), strict=True))
                for place in line:
                    far = sum(shares[other] for other in line if found.hosts[other] != found.hosts[place])
                    words = _block(found, count, context, grid.inner, head, place) * each * 2 * far // part.kv_heads
                    found.count(time, words)


def more_received(grid: GridShape, parts: Sequence[tuple[int, Part]], workload: Workload, rows: Sequence[int], hosts: Sequence[int]) -> int:
    """Bytes of rings of attention that hosts cut, beyond what windows would bring: all keys and values pass all ranks."""
    found, total = Crossing(grid, hosts, workload.item), 0
    for times, part in parts:
        if not isinstance(part, Attention) or way_of(grid, part, workload.item) != "ring":
            continue
        for line in found.lines(grid.inner.time):
            lengths, samples = chunks(workload.context, [len(line)]), tuple(each for each in grid.inner.rows if each not in grid.inner.time)
            for count in rows:
                words = found.piece(count, samples, line[0]) * (part.width // part.heads)
                both = [
                    formulas.sequence_bytes("ring", lengths, part.heads, part.kv_heads, words, workload.item, window, part.causal)
                    for window in (False, True)
                ]
                total += times * (both[0] - both[1])
    return total


def _loss(found: Crossing, rows: Sequence[int], context: int, accumulates: bool) -> None:
    grid = found.grid
    given, needed = (Layout(layout.rows, (), layout.time) for layout in (grid.outer, grid.inner))
    for count, found.times in Counter(rows).items():
        found.gather(grid.inner.features, lambda place, count=count: 4 * _block(found, count, context, needed, 1, place), EIGHT)  # type: ignore[misc]
        found.gather(grid.inner.rows, lambda place: 2, EIGHT)
        if accumulates and given.rows != needed.rows:  # in pipelines labels come in outer's rows
            apart = tuple(name for name in given.rows if name not in needed.rows)
            for line in found.lines(apart):
                for place in line:
                    others = [each for each in line if found.hosts[each] != found.hosts[place]]
                    found.count(apart, sum(_block(found, count, context, given, 1, each) for each in others), EIGHT)


def step_crossed(
    grid: GridShape, parts: Sequence[tuple[int, Part]], workload: Workload, rows: Sequence[int], hosts: Sequence[int], accumulates: bool
) -> dict[str, int]:
    """Bytes of a stretch of a model by axis, tensor and data; rows: of each micro-batch. Raises NotImplementedError as `crossed`."""
    total = {"tensor": 0, "data": 0}
    for times, part in parts:
        found = crossed(grid, part, tuple(rows), workload.context, workload.item, tuple(hosts), accumulates)
        for axis, each in zip(total, found, strict=True):
            total[axis] += times * each
    return total


def tied_words(grid: GridShape, table: Table, place: int) -> int:
    """Of the block of a table at rest."""
    cut = formulas.table_axes(grid)[0] + grid.axes.kept
    return _piece(grid, table.count, cut, place) * _piece(grid, table.width, grid.outer.features, place)


def tied_places(workload: Workload, stages: int, pipeline: int, schedule: str) -> list[tuple[Table, list[int]]]:
    """Tied tables that several pipeline ranks have, with those ranks, which tell each other their gradients."""
    begins, found = begins_of(workload, stages) if workload.ties else [], []
    for table, at in workload.ties:
        users = [max(stage for stage in range(stages) if begins[stage] <= each) for each in at]
        found.append((table, list(dict.fromkeys(rank_of(stage, pipeline, schedule) for stage in users))))
    return [(table, places) for table, places in found if len(places) > 1]


def begins_of(workload: Workload, stages: int) -> list[int]:
    """Where each stage begins in the row, as pipeline/cut.py cuts it, and the row's length."""
    flops = [float(sum(times * 2 * part.k * sum(part.n) for times, part in parts if isinstance(part, Linears))) for parts in workload.row]
    return balance(flops, stages)


def stages_crossed(
    grid: GridShape,
    stages: Sequence[Sequence[tuple[int, Part]]],
    ends: Sequence[tuple[int, str]],
    workload: Workload,
    rows: Sequence[int],
    hosts: Sequence[int],
    pipeline: int,
    schedule: str,
) -> list[dict[str, int]]:
    """By stage and axis, "pipeline" being what crosses behind it, and "more" what more_received says. ends: (features, layout) of what each
    hands on; hosts: of the job's ranks, by pipeline, data and tensor. Raises NotImplementedError as `crossed`."""
    of = [[hosts[grid.size * place + rank] for rank in neighbours(grid.axes)] for place in range(pipeline)]
    accumulates, count = pipeline > 1 or len(rows) > 1, len(stages)
    found = [step_crossed(grid, each, workload, rows, of[rank_of(at, pipeline, schedule)], accumulates) for at, each in enumerate(stages)]
    for at, each in enumerate(found):
        each["more"] = more_received(grid, stages[at], workload, rows, of[rank_of(at, pipeline, schedule)])
        each["pipeline"] = 0
    for table, places in tied_places(workload, count, pipeline, schedule) if pipeline > 1 else []:
        for first in places:
            for second in (each for each in places if each != first):
                apart = [place for place in range(grid.size) if of[first][place] != of[second][place]]
                found[0]["pipeline"] += workload.item * sum(tied_words(grid, table, place) for place in apart)
    for stage, first, second in borders_of(pipeline, schedule, count // pipeline) if pipeline > 1 else []:
        found[stage]["pipeline"] += borders_crossed(grid, rows, workload.context, *ends[stage], workload.item, of[first], of[second])
    return found


def borders_crossed(
    grid: GridShape, rows: Sequence[int], context: int, width: int, layout: str, item: int, here: Sequence[int], there: Sequence[int]
) -> int:
    """Bytes of activations [rows, context, width] that a stage's ranks hand to the next one's, and of their gradients, from host to host.
    here, there: the hosts of both stages' ranks, in mesh order."""
    found, ends = Crossing(grid, here, item), grid.layout(layout)
    apart = [place for place in range(grid.size) if here[place] != there[place]]
    return 2 * item * sum(_block(found, count, context, ends, width, place) for count in rows for place in apart)
