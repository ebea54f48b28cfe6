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
from ..mesh.modes import GridShape, axes_of
from .costs import impossible, stretch_cost
from .workload import Workload


@dataclass(frozen=True)
class Machine:
    """latency: seconds a message; bandwidth: bytes a second that a rank receives; speed: its flops a second; memory: bytes
    of tensors that a rank may hold; between: bytes a second that a rank receives from other hosts (None: bandwidth)."""

    latency: float = 5e-6
    bandwidth: float = 45e9
    speed: float = 100e12
    memory: float = float("inf")
    between: float | None = None

    def seconds(self, flops: float, messages: float, received: float, crossed: float = 0.0) -> float:
        """Of a rank, nothing overlapping; crossed: of the bytes received those from other hosts."""
        far = crossed / (self.between or self.bandwidth)
        return flops / self.speed + messages * self.latency + (received - crossed) / self.bandwidth + far

    def lacks(self, memory: float) -> str:
        """Why a rank cannot hold so many bytes; "" where it can."""
        return "" if memory <= self.memory else f"needs {memory / 1e9:.3g} GB a rank, allowed {self.memory / 1e9:.3g}"


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
        return name_of(self.arguments)


def name_of(arguments: dict[str, Any]) -> str:
    """Of a mesh that axes_of's arguments make: "2.5d depth=2"."""
    extras = [f"depth={arguments['depth']}"] if "depth" in arguments else []
    return " ".join([arguments.get("mode") or "grid", *extras, *[name for name in ("sequence", "shard_depth") if arguments.get(name)]])


def every_grid(ranks: int, samples: bool = False) -> Iterator[dict[str, Any]]:
    """init's arguments of every grid that `ranks` ranks can form, modes first; sizes that no mode has are left out. samples: of those whose
    rows are whole samples."""
    yield dict(mode="1d", size=ranks)
    if ranks > 1 and not samples:
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


def of_sequence(ranks: int) -> dict[str, Any]:
    """init's arguments of mode "sequence"."""
    return dict(mode="sequence", size=ranks, attention="auto")


def plans(workload: Workload, ranks: int, machine: Machine | None = None) -> list[Choice]:
    """Every grid of `ranks` ranks, and mode "sequence" where the model's code may see a part of each sequence; the possible ones first,
    cheapest first."""
    machine = machine or Machine()
    arguments = [*every_grid(ranks, workload.samples), *([of_sequence(ranks)] if workload.sequences and ranks > 1 else [])]
    found = [_cost(each, workload, machine) for each in arguments]
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
    cost = stretch_cost(grid, workload.parts, workload, [workload.batch])
    memory = workload.item * ((2 + workload.states) * cost.held + cost.kept)
    reason = next((text for _, part in workload.parts if (text := impossible(grid, part, workload.context))), "")
    seconds = machine.seconds(cost.flops, cost.messages, cost.received / grid.size)
    return Choice(arguments, grid.grid, cost.received, cost.messages, memory, seconds, reason or machine.lacks(memory))
