"""What a stretch of a model costs on a grid, in a step of one micro-batch or several: bytes, messages, words held and kept, flops.

A pipeline's stage is such a stretch, and a model without a pipeline one stage. Example: two micro-batches of 4 samples receive what two
steps of 4 samples would, less the sums over replicas, which are made once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ..mesh.layout import Layout, chunks
from ..mesh.modes import GridShape, axes_of
from . import formulas
from .formulas import largest
from .workload import Attention, Linears, Norm, Part, Table, Workload


@dataclass(frozen=True)
class Cost:
    """received: bytes of all ranks; messages: of one rank; held: words of parameters on the fullest rank; whole: words that shard="state"
    keeps whole there; kept: words it keeps of one micro-batch, the largest, for backward; flops: its."""

    received: int = 0
    messages: int = 0
    held: int = 0
    whole: int = 0
    kept: int = 0
    flops: int = 0

    def plus(self, other: Cost, times: int = 1) -> Cost:
        return Cost(
            self.received + times * other.received,
            self.messages + times * other.messages,
            self.held + times * other.held,
            self.whole + times * other.whole,
            self.kept + times * other.kept,
            self.flops + times * other.flops,
        )


def stretch_cost(
    grid: GridShape, parts: Sequence[tuple[int, Part]], workload: Workload, rows: Sequence[int], accumulates: bool = False
) -> Cost:
    """Of `parts`, (how often, what), with micro-batches of so many rows; accumulates: as gingham.pipeline's step does, also with one."""
    total = Cost()
    sizes = sorted(set(rows), reverse=True)
    for times, part in parts:
        found = [_known_cost(grid, part, size, workload.context, workload.item, accumulates) for size in sizes]
        cost = Cost(held=found[0].held, whole=found[0].whole, kept=found[0].kept)
        for size, each in zip(sizes, found, strict=True):
            cost = cost.plus(replace(each, held=0, whole=0, kept=0), rows.count(size))
        saved = _saved(grid, part, workload, len(rows)) if accumulates else (0, 0)
        total = total.plus(replace(cost, received=cost.received - saved[0], messages=cost.messages - saved[1]), times)
    return total


def shape_of(tensor: Mapping[str, Any], data: int = 1, shard: str | None = None) -> GridShape:
    """The grid of axes_of's arguments, the same one each time."""
    return _shape(tuple(sorted(tensor.items())), data, shard)


@lru_cache(maxsize=1 << 12)
def _shape(tensor: tuple[tuple[str, Any], ...], data: int, shard: str | None) -> GridShape:
    return GridShape(axes_of(**dict(tensor), data=data, shard=shard))


@lru_cache(maxsize=1 << 16)
def _known_cost(grid: GridShape, part: Part, batch: int, context: int, item: int, accumulates: bool) -> Cost:
    """Hybrids share stretches: their layers are alike, and so are many micro-batches."""
    return _part_cost(grid, part, Workload((), batch, context, item), accumulates)


def impossible(grid: GridShape, part: Part, context: int) -> str:
    """Why the grid cannot have such a part, over sequences of `context` places; "" where it can."""
    if isinstance(part, Attention):
        if min(chunks(context, [grid.parts(grid.inner.time)])) == 0:
            return f"{context} places of a sequence on {grid.parts(grid.inner.time)} ranks that cut it: some would have none"
        ranks = grid.parts(grid.inner.features)
        for name, heads in (("heads", part.heads), ("key and value heads", part.kv_heads)):
            if heads % ranks:
                return f"{heads} {name} do not divide by {ranks} feature ranks"
    return ""


def _saved(grid: GridShape, part: Part, workload: Workload, parts: int) -> tuple[int, int]:
    """(bytes of all ranks, messages of one) that a step of so many micro-batches receives less than as many steps."""
    item, depth, kept = workload.item, grid.parts(grid.axes.depth), grid.parts(grid.axes.kept)
    if isinstance(part, Linears):
        swapped = is_swapped(grid, part)
        words = formulas.linear_saved(grid, part.k, part.n, swapped, part.bias, parts)
        return item * words, formulas.linear_messages_saved(grid, len(part.n), swapped, part.bias, parts)
    if isinstance(part, Table):
        words = (parts - 1) * formulas.embedding_sums(grid, part.count, part.width)
        return item * words, (parts - 1) * (2 * (depth - 1) + 2 * (kept - 1))
    if isinstance(part, Norm):
        words = (parts - 1) * part.tensors * formulas.feature_words(grid, part.features, grid.outer)
        # put off, each tensor's gradient is summed on its own
        return max(4, item) * words, (parts - part.tensors) * 2 * (grid.parts(grid.outer.rows) - 1)
    return 0, 0


def _part_cost(grid: GridShape, part: Part, workload: Workload, accumulates: bool) -> Cost:
    item, tokens = workload.item, workload.batch * workload.context
    if isinstance(part, Linears):
        return _linears_cost(grid, part, workload)
    if isinstance(part, Table):
        cut, width = formulas.table_axes(grid)[0], largest(grid, part.width, grid.outer.features)
        held = largest(grid, part.count, cut + grid.axes.kept) * width
        whole = largest(grid, part.count, cut) * width if grid.axes.kept else 0
        received = item * formulas.embedding_words(grid, part.count, part.width)
        return Cost(received, formulas.embedding_messages(grid), held, whole)
    if isinstance(part, Norm):
        received = formulas.norm_bytes(grid, tokens, part.features, max(4, item), grid.outer, part.sums, part.tensors)
        held = part.tensors * largest(grid, part.features, formulas.norm_axes(grid, grid.outer))
        kept = _block(grid, workload, part.features, grid.outer)
        return Cost(received, formulas.norm_messages(grid, grid.outer), held, 0, kept)
    if isinstance(part, Attention):
        return _attention_cost(grid, part, workload)
    received = formulas.cross_entropy_bytes(grid, tokens, grid.inner)
    messages = formulas.cross_entropy_messages(grid, grid.inner)
    if accumulates and grid.inner.rows != grid.outer.rows:
        received += formulas.targets_bytes(grid, workload.batch, workload.context, grid.inner)
        messages += grid.parts(tuple(name for name in grid.outer.rows if name not in grid.inner.rows)) - 1
    return Cost(received, messages, kept=_block(grid, workload, part.vocabulary, grid.inner))


def _attention_cost(grid: GridShape, part: Attention, workload: Workload) -> Cost:
    head = part.width // part.heads
    keys = _block(grid, workload, part.kv_heads * head, grid.inner)
    queries = _block(grid, workload, part.width, grid.inner)
    # q k^T and its product with v, forward and twice backward, each 2 x context flops a word of q
    cost = Cost(kept=queries + 2 * keys, flops=12 * workload.context * queries)
    pieces = grid.parts(grid.inner.time)
    if pieces == 1:
        return cost
    sizes = part.heads, part.kv_heads, workload.batch * head, workload.item
    way = way_of(grid, part, workload.item)
    received = formulas.sequence_bytes(way, chunks(workload.context, [pieces]), *sizes, True, part.causal)
    # the last of causal ranks sees all, and nobody else its own keys
    return replace(cost, received=received, messages=MESSAGES[way] * (pieces - 1) - (way == "ring" and part.causal))


def way_of(grid: GridShape, part: Attention, item: int) -> str:
    """How keys and values reach queries where axes cut the sequence: of formulas.WAYS."""
    way = grid.axes.attention or "ring"
    if way != "auto":
        return way
    return formulas.cheapest_way(grid.parts(grid.inner.time), part.heads, part.kv_heads, item, True, part.causal)


# for each other rank, on one that sees all: keys and values forward, again backward, and sums of their gradients; gathered once and summed
# once; q, k and v, and the output, forward and backward
MESSAGES = {"ring": 3, "gathered": 2, "heads": 4}


def _block(grid: GridShape, workload: Workload, features: int, layout: Layout) -> int:
    """Words of the largest block of an activation [batch, context, features], cut along the batch, or where axes cut time along that."""
    rows = tuple(name for name in layout.rows if name not in layout.time)
    time = largest(grid, workload.context, layout.time)
    return largest(grid, workload.batch, rows) * time * largest(grid, features, layout.features)


def is_swapped(grid: GridShape, part: Linears) -> bool:
    """As the layer of such a part trades n and k."""
    return formulas.is_swapped(grid, part.k, part.n, part.layout, None if part.layout == "outer->outer" else "auto")


def _linears_cost(grid: GridShape, part: Linears, workload: Workload) -> Cost:
    swapped = is_swapped(grid, part)
    given, into = (grid.layout(end) for end in part.layout.split("->"))
    x, y = (grid.inner, grid.outer) if swapped else (grid.outer, grid.inner)
    moved = formulas.linear_relayouts(grid, workload.batch, part.k, part.n, (given, x), (y, into))
    words = formulas.linear_words(grid, workload.batch * workload.context, part.k, part.n, swapped, part.bias)
    words += workload.context * sum(moved)
    # a relayout is one message a peer at most: to all of an axis where rows or whole features move, else a permutation
    slices = formulas.usual_slices(grid, part.k, part.n)
    messages = formulas.linear_messages(grid, len(part.n), swapped, part.bias, slices)
    tensor = grid.size // grid.sizes.get("data", 1)
    messages += sum(map(bool, moved)) * (1 if grid.outer.features else tensor - 1)
    held = formulas.linear_parameters(grid, part.k, part.n, swapped, part.bias)
    first, second = (grid.axes.n, grid.axes.k) if swapped else (grid.axes.k, grid.axes.n)
    whole = formulas.linear_whole(grid, part.k, part.n, swapped) if grid.axes.kept else 0
    kept = _block(grid, workload, part.k, x) + part.kept * sum(_block(grid, workload, size, y) for size in part.n)
    rows = largest(grid, workload.batch, tuple(name for name in grid.axes.m if name not in grid.outer.time))
    rows *= largest(grid, workload.context, grid.outer.time)
    flops = 6 * rows * largest(grid, part.k, first) * sum(largest(grid, size, second) for size in part.n)
    return Cost(workload.item * words, messages, held, whole, kept, flops)
