"""Which grid a model should train on: the cost of docs/theory.md section 4 for every grid that the ranks can form.

A step's seconds are those of the busiest rank's products, of the messages and of the bytes that a rank receives on average;
nothing is taken to overlap. Of the grids whose tensors fit the memory the cheapest is chosen, named modes before other
grids at a tie. Example: GPT of 4 layers, width 256, 8 ranks: with 8 x 128 tokens a step 1d is the cheapest, with 32 x 128 tokens
2.5d of depth 2. Memory is weights, gradients, optimizer and what layers keep for backward; panels under way are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Any

from ..errors import MeshError
from ..mesh.layout import Layout
from ..mesh.modes import GridShape, axes_of
from . import formulas
from .formulas import largest
from .workload import Attention, Linears, Norm, Part, Table, Workload


@dataclass(frozen=True)
class Machine:
    """latency: seconds a message; bandwidth: bytes a second that a rank receives; speed: its flops a second; memory: bytes
    of tensors that a rank may hold."""

    latency: float = 5e-6
    bandwidth: float = 45e9
    speed: float = 100e12
    memory: float = float("inf")


@dataclass(frozen=True)
class Choice:
    """A grid and what it costs. arguments: gingham.init's. received: bytes of a step, all ranks together; messages: of one
    rank; memory: bytes on the rank that holds most; reason: why the grid is not possible, "" where it is."""

    arguments: dict[str, Any]
    grid: tuple[int, ...]
    received: int
    messages: int
    memory: int
    seconds: float
    reason: str = ""

    @property
    def name(self) -> str:
        mode = self.arguments.get("mode") or "grid"
        extras = [f"depth={self.arguments['depth']}"] if "depth" in self.arguments else []
        return " ".join([mode, *extras, *[name for name in ("sequence", "shard_depth") if self.arguments.get(name)]])


def every_grid(ranks: int) -> Iterator[dict[str, Any]]:
    """init's arguments of every grid that `ranks` ranks can form, modes first; sizes that no mode has are left out."""
    yield dict(mode="1d", size=ranks)
    if ranks > 1:
        yield dict(mode="1d", size=ranks, sequence=True)
    if isqrt(ranks) ** 2 == ranks:
        yield dict(mode="2d", size=ranks)
    for depth in range(2, ranks + 1):
        if ranks % depth == 0 and isqrt(ranks // depth) ** 2 == ranks // depth:
            yield dict(mode="2.5d", size=ranks, depth=depth)
            yield dict(mode="2.5d", size=ranks, depth=depth, shard_depth=True)
    if round(ranks ** (1 / 3)) ** 3 == ranks:
        yield dict(mode="3d", size=ranks)
    for pm in range(1, ranks + 1):
        for pn in range(1, ranks // pm + 1):
            if ranks % (pm * pn) == 0:
                yield dict(mode=None, size=ranks, grid=(pm, pn, ranks // (pm * pn)))


def plans(workload: Workload, ranks: int, machine: Machine | None = None) -> list[Choice]:
    """Every grid of `ranks` ranks, the possible ones first, cheapest first."""
    machine = machine or Machine()
    found = [_cost(arguments, workload, machine) for arguments in every_grid(ranks)]
    return sorted(found, key=lambda choice: (bool(choice.reason), choice.seconds))


def choose(workload: Workload, ranks: int, machine: Machine | None = None) -> Choice:
    """The cheapest possible grid. Raises MeshError, with the reason of each, where none is possible."""
    ranked = plans(workload, ranks, machine)
    if ranked[0].reason:
        reasons = "; ".join(f"{choice.name} {choice.grid}: {choice.reason}" for choice in ranked[:6])
        raise MeshError(f"no grid of {ranks} ranks fits: {reasons}; take more ranks, a smaller batch or other heads")
    return ranked[0]


def _cost(arguments: dict[str, Any], workload: Workload, machine: Machine) -> Choice:
    grid = GridShape(axes_of(**arguments))
    costs = [(times, _part_cost(grid, part, workload)) for times, part in workload.parts]
    received, messages, parameters, kept, flops = (sum(times * cost[index] for times, cost in costs) for index in range(5))
    memory = workload.item * ((2 + workload.states) * parameters + kept)
    seconds = flops / machine.speed + messages * machine.latency + received / grid.size / machine.bandwidth
    reason = next((text for _, part in workload.parts if (text := _impossible(grid, part))), "")
    if not reason and memory > machine.memory:
        reason = f"needs {memory / 1e9:.3g} GB a rank, allowed {machine.memory / 1e9:.3g}"
    return Choice(arguments, grid.grid, received, messages, memory, seconds, reason)


def _impossible(grid: GridShape, part: Part) -> str:
    if isinstance(part, Attention):
        ranks = grid.parts(grid.inner.features)
        for name, heads in (("heads", part.heads), ("key and value heads", part.kv_heads)):
            if heads % ranks:
                return f"{heads} {name} do not divide by {ranks} feature ranks"
    return ""


def _part_cost(grid: GridShape, part: Part, workload: Workload) -> tuple[int, int, int, int, int]:
    """(bytes of all ranks, messages of one, words of parameters on the fullest rank, words it keeps for backward, its flops)."""
    item, tokens = workload.item, workload.batch * workload.context
    if isinstance(part, Linears):
        return _linears_cost(grid, part, workload)
    if isinstance(part, Table):
        held = largest(grid, part.count, formulas.table_axes(grid)[0]) * largest(grid, part.width, grid.outer.features)
        return item * formulas.embedding_words(grid, part.count, part.width), formulas.embedding_messages(grid), held, 0, 0
    if isinstance(part, Norm):
        received = formulas.norm_bytes(grid, tokens, part.features, max(4, item), grid.outer, part.sums, part.tensors)
        held = part.tensors * largest(grid, part.features, formulas.norm_axes(grid, grid.outer))
        return received, formulas.norm_messages(grid, grid.outer), held, _block(grid, workload, part.features, grid.outer), 0
    if isinstance(part, Attention):
        head = part.width // part.heads
        keys = _block(grid, workload, part.kv_heads * head, grid.inner)
        queries = _block(grid, workload, part.width, grid.inner)
        # q k^T and its product with v, forward and twice backward, each 2 x context flops a word of q
        return 0, 0, 0, queries + 2 * keys, 12 * workload.context * queries
    received = formulas.cross_entropy_bytes(grid, tokens, grid.inner)
    kept = _block(grid, workload, part.vocabulary, grid.inner)
    return received, formulas.cross_entropy_messages(grid, grid.inner), 0, kept, 0


def _block(grid: GridShape, workload: Workload, features: int, layout: Layout) -> int:
    """Words of the largest block of an activation [batch, context, features], cut along the batch."""
    return largest(grid, workload.batch, layout.rows) * workload.context * largest(grid, features, layout.features)


def _linears_cost(grid: GridShape, part: Linears, workload: Workload) -> tuple[int, int, int, int, int]:
    swapped = formulas.is_swapped(grid, part.k, part.n, part.layout, None if part.layout == "outer->outer" else "auto")
    given, into = (grid.layout(end) for end in part.layout.split("->"))
    x, y = (grid.inner, grid.outer) if swapped else (grid.outer, grid.inner)
    moved = formulas.linear_relayouts(grid, workload.batch, part.k, part.n, (given, x), (y, into))
    words = formulas.linear_words(grid, workload.batch * workload.context, part.k, part.n, swapped, part.bias)
    words += workload.context * sum(moved)
    # a relayout is one message a peer at most: to all of an axis where rows or whole features move, else a permutation
    slices = formulas.usual_slices(grid, part.k, part.n)
    messages = formulas.linear_messages(grid, len(part.n), swapped, part.bias, slices)
    messages += sum(map(bool, moved)) * (1 if grid.outer.features else grid.size - 1)
    held = formulas.linear_parameters(grid, part.k, part.n, swapped, part.bias)
    kept = _block(grid, workload, part.k, x) + part.kept * sum(_block(grid, workload, size, y) for size in part.n)
    first, second = (grid.axes.n, grid.axes.k) if swapped else (grid.axes.k, grid.axes.n)
    rows = largest(grid, workload.batch, grid.axes.m) * workload.context
    flops = 6 * rows * largest(grid, part.k, first) * sum(largest(grid, size, second) for size in part.n)
    return workload.item * words, messages, held, kept, flops
