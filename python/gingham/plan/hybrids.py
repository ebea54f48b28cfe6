"""Which data x pipeline x tensor ranks a model should train on: the cost of every hybrid that the ranks can form.

A pipeline's stages are cut as gingham.pipeline cuts them. A step's seconds are those of the dearest pipeline rank, and the bubble's share
on top: t / (1 - bubble). Bytes by axis: tensor, what each data rank's own rows would move without the others; data, what is moved
beyond that; pipeline, what crosses the borders of stages. Memory is that of the rank that holds most: parameters, gradients, states,
with shard="state" the whole weights and, for several micro-batches, the whole sums of their gradients, and what layers keep for backward of
all micro-batches that are under way at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import MeshError
from ..mesh.layout import chunks
from ..mesh.modes import GridShape
from .choose import Machine, every_grid, name_of, of_sequence
from .costs import Cost, impossible, shape_of, stretch_cost
from .crossing import begins_of, stages_crossed, tied_places, tied_words
from .pipeline import SCHEDULES, border_bytes, borders_of, bubble, in_flight, rank_of, refused, sizes_of_parts, usual_stages
from .workload import Linears, Norm, Part, Table, Workload, merged

AXES = ("tensor", "data", "pipeline")
SHARDS = (None, "state", "all")
TIMES = (1, 2, 4, 8)  # micro-batches that are tried, as many times the pipeline's ranks


@dataclass(frozen=True)
class Hybrid:
    """A hybrid and what a step costs on it. tensor: axes_of's arguments of a data rank; received: bytes of all ranks, by axis; messages: of
    the rank that receives most, by axis; memory: bytes by kind of the rank that holds most, one of the pipeline rank `fullest`; bubble: the
    share of a step in which a rank waits for others; reason: why it is not possible, "" where it is; crossed: of `received` what comes from
    other hosts."""

    tensor: Mapping[str, Any]
    data: int
    shard: str | None
    pipeline: int
    schedule: str
    microbatches: int
    grid: tuple[int, ...]
    received: Mapping[str, int]
    messages: Mapping[str, int]
    memory: Mapping[str, int]
    bubble: float
    seconds: float
    reason: str = ""
    fullest: int = 0
    crossed: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 0))

    @property
    def ranks(self) -> int:
        return self.data * self.pipeline * int(self.tensor["size"])

    @property
    def name(self) -> str:
        """ "2 pipeline (1f1b, 4) x 2 data (all) x 2d"; axes of one rank are left out."""
        names = []
        if self.pipeline > 1 or self.microbatches > 1:
            how = f"{self.schedule}, {self.microbatches}" if self.pipeline > 1 else f"{self.microbatches} micro-batches"
            names.append(f"{self.pipeline} pipeline ({how})")
        if self.data > 1:
            names.append(f"{self.data} data" + (f" ({self.shard})" if self.shard else ""))
        if self.tensor["size"] > 1:
            shape = f" {'x'.join(map(str, self.grid_of_tensor))}" if name_of(dict(self.tensor)) == "grid" else f" of {self.tensor['size']}"
            names.append(name_of(dict(self.tensor)) + shape)
        return " x ".join(names) or "one rank"

    @property
    def grid_of_tensor(self) -> tuple[int, ...]:
        return tuple(self.tensor.get("grid", ()))

    @property
    def parallel(self) -> dict[str, Any]:
        """gingham.init's parallel= of it."""
        found: dict[str, Any] = {"data": {"size": self.data, "shard": self.shard}, "tensor": dict(self.tensor)}
        if self.pipeline > 1 or self.microbatches > 1:
            found["pipeline"] = {"size": self.pipeline, "schedule": self.schedule, "microbatches": self.microbatches}
        return found


@dataclass(frozen=True)
class Wish:
    """What is said of a hybrid; None: anything. tensor: axes_of's arguments; microbatches: None: those of TIMES; shards: of data above 1;
    mode, size: of the tensor mesh, where the rest of it is open; hosts: of as many ranks each."""

    data: int | None = None
    shards: Sequence[str | None] = SHARDS
    pipeline: int | None = None
    schedules: Sequence[str] = SCHEDULES
    microbatches: int | None = None
    tensor: Mapping[str, Any] | None = None
    mode: str | None = None
    size: int | None = None
    hosts: int = 1


def hybrids(workload: Workload, ranks: int, machine: Machine | None = None, wish: Wish | None = None) -> list[Hybrid]:
    """Every hybrid of `ranks` ranks that a wish allows, the possible ones first, cheapest first; at a tie the one that holds less,
    then fewer pipeline ranks, fewer data ranks, weights that are cut less."""
    machine, wish = machine or Machine(), wish or Wish()
    found = [hybrid for arguments in _every(ranks, wish, workload) for hybrid in _costs(workload, machine, wish, *arguments)]

    def order(each: Hybrid) -> tuple[bool, float, int, int, int, int]:
        return bool(each.reason), each.seconds, sum(each.memory.values()), each.pipeline, each.data, SHARDS.index(each.shard)

    return sorted(found, key=order)


def choose_hybrid(workload: Workload, ranks: int, machine: Machine | None = None, wish: Wish | None = None) -> tuple[Hybrid, str]:
    """The cheapest possible hybrid, and why it is: what it costs beside the next ones. Raises MeshError, with reasons, where none is
    possible."""
    ranked = hybrids(workload, ranks, machine, wish)
    if not ranked:
        raise MeshError(f"no hybrid of {ranks} ranks is what was asked for: {wish}; sizes must multiply to the number of ranks")
    if ranked[0].reason:
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in ranked[:6])
        raise MeshError(f"no hybrid of {ranks} ranks fits: {reasons}; take more ranks, a smaller batch or other heads")
    return ranked[0], why(ranked)


def why(ranked: Sequence[Hybrid]) -> str:
    """Of the first of hybrids(): its cost, the cheapest one of another shape, and how many were not possible."""
    first, out = ranked[0], sum(bool(each.reason) for each in ranked)
    text = f"{first.name}: {first.seconds:.3g} s a step, the least of {len(ranked) - out} hybrids of {first.ranks} ranks"
    other = next((each for each in ranked[1:] if not each.reason and each.name != first.name), None)
    if other is not None:
        text += f"; next {other.name}: {other.seconds:.3g} s"
    return text + (f"; {out} more are not possible, for example {ranked[-1].name}: {ranked[-1].reason}" if out else "")


def _every(ranks: int, wish: Wish, workload: Workload) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(pipeline, data, tensor) whose product is `ranks`, as far as the model may be cut so."""
    sizes = [count for count in range(1, ranks + 1) if ranks % count == 0]
    for pipeline in sizes if wish.pipeline is None else [wish.pipeline]:
        for data in sizes if wish.data is None else [wish.data]:
            if ranks % (pipeline * data):
                continue
            size = ranks // (pipeline * data)
            if wish.tensor is not None:
                if shape_of(wish.tensor).size == size:
                    yield pipeline, data, {"size": size, **wish.tensor}
            elif wish.mode == "sequence":
                yield pipeline, data, of_sequence(size)
            elif wish.size in (None, size):
                # grids that are a mode under another name are left out
                seen = set()
                along = [of_sequence(size)] if workload.sequences and wish.mode is None else []
                for tensor in [*every_grid(size, workload.samples), *along] if size > 1 else [dict(mode=None, size=1)]:
                    shape = shape_of(tensor).grid
                    if wish.mode in (None, tensor["mode"]) and not (tensor.get("grid") and shape in seen):
                        yield pipeline, data, tensor
                    seen.add(shape)


def _costs(workload: Workload, machine: Machine, wish: Wish, pipeline: int, data: int, tensor: dict[str, Any]) -> Iterator[Hybrid]:
    """Of one shape, by shard, schedule and number of micro-batches."""
    counts = [wish.microbatches] if wish.microbatches else [1] if pipeline == 1 else [pipeline * times for times in TIMES]
    counts = [count for count in counts if count <= workload.batch] or counts[:1]
    for shard in [shard for shard in wish.shards if data > 1] or [None]:
        for schedule in wish.schedules if pipeline > 1 else ["1f1b"]:
            for count in counts:
                ranks = pipeline * shape_of(tensor, data, shard).size
                hosts = [rank * wish.hosts // ranks for rank in range(ranks)] if wish.hosts > 1 else ()
                yield hybrid_cost(workload, machine, tensor, data, shard, pipeline, schedule, count, hosts)


def hybrid_cost(
    workload: Workload,
    machine: Machine,
    tensor: Mapping[str, Any],
    data: int = 1,
    shard: str | None = None,
    pipeline: int = 1,
    schedule: str = "1f1b",
    microbatches: int = 1,
    hosts: Sequence[int] = (),
) -> Hybrid:
    """Of one hybrid; with a pipeline or several micro-batches as gingham.pipeline makes them. hosts: of the job's ranks, by pipeline,
    data and tensor, where they are on several."""
    grid, alone = shape_of(tensor, data, shard), shape_of(tensor)
    rows, accumulates = sizes_of_parts(workload.batch, microbatches), pipeline > 1 or microbatches > 1
    reason = _reason(workload, grid, tensor, pipeline, schedule, microbatches)
    stages = pipeline * usual_stages(schedule) if pipeline > 1 else 1
    parts = _stages(workload, stages)
    if parts is None:
        nothing = dict.fromkeys(AXES, 0)
        return Hybrid(tensor, data, shard, pipeline, schedule, microbatches, grid.grid, nothing, nothing, {}, 0.0, float("inf"), reason)
    places = [rank_of(stage, pipeline, schedule) for stage in range(stages)]
    costs = [stretch_cost(grid, each, workload, rows, accumulates) for each in parts]
    apart = [_apart(alone, each, workload, rows, data, accumulates) for each in parts]
    ends = [_end(parts[: stage + 1], parts[stage + 1 :]) for stage in range(stages)]
    crossed = _crossed(grid, workload, ends, pipeline, schedule)
    received = {"tensor": sum(each.received for each in apart)}
    received["data"] = sum(each.received for each in costs) - received["tensor"]
    tied = tied_places(workload, stages, pipeline, schedule) if pipeline > 1 else []
    shared = [_of_ties(grid, workload.item, tied, rank) for rank in range(pipeline)]
    received["pipeline"] = sum(crossed) + sum(size for size, _ in shared)
    of_rank = [[stage for stage, place in enumerate(places) if place == rank] for rank in range(pipeline)]
    borders = [count + more for count, (_, more) in zip(_border_messages(pipeline, schedule, stages, microbatches), shared, strict=True)]
    messages = _messages([[apart[s] for s in mine] for mine in of_rank], [[costs[s] for s in mine] for mine in of_rank], borders)
    memories = [
        _memory(workload, [costs[stage] for stage in mine], in_flight(schedule, rank, pipeline, microbatches, len(mine)), accumulates)
        for rank, mine in enumerate(of_rank)
    ]
    idle = bubble(schedule, pipeline, microbatches, usual_stages(schedule)) if pipeline > 1 else 0.0
    far, unknown = _far(grid, parts, ends, workload, rows, hosts, pipeline, schedule)
    reason = reason or unknown
    received["tensor"] += sum(each["more"] for each in far)
    behind = [each["pipeline"] for each in far]
    ins = [_of_rank(crossed, rank, pipeline, schedule, stages) + shared[rank][0] for rank in range(pipeline)]
    outs = [_of_rank(behind, rank, pipeline, schedule, stages) for rank in range(pipeline)]
    busy = [
        _seconds(machine, [costs[s] for s in mine], [far[s] for s in mine], borders[rank], ins[rank], outs[rank], grid.size)
        for rank, mine in enumerate(of_rank)
    ]
    fullest = max(range(pipeline), key=lambda rank: sum(memories[rank].values()))
    memory, seconds = memories[fullest], max(busy) / (1 - idle)
    reason = reason or machine.lacks(sum(memory.values()))
    across = {axis: sum(each[axis] for each in far) for axis in AXES}
    return Hybrid(
        tensor, data, shard, pipeline, schedule, microbatches, grid.grid, received, messages, memory, idle, seconds, reason, fullest, across
    )


def _messages(apart: Sequence[Sequence[Cost]], costs: Sequence[Sequence[Cost]], borders: Sequence[int]) -> dict[str, int]:
    """By axis, of the pipeline rank whose ranks receive most."""
    inside = [[sum(each.messages for each in mine) for mine in of] for of in (apart, costs)]
    busiest = max(range(len(borders)), key=lambda rank: inside[1][rank] + borders[rank])
    own, both = inside[0][busiest], inside[1][busiest]
    return {"tensor": min(own, both), "data": max(0, both - own), "pipeline": borders[busiest]}


def _seconds(
    machine: Machine, costs: Sequence[Cost], far: Sequence[Mapping[str, int]], messages: int, received: float, crossed: float, ranks: int
) -> float:
    """Of a pipeline rank of so many ranks, without waiting; messages, received, crossed: at its borders."""
    inside = sum(each[axis] for each in far for axis in ("tensor", "data"))
    return machine.seconds(
        sum(each.flops for each in costs),
        sum(each.messages for each in costs) + messages,
        (sum(each.received for each in costs) + sum(each["more"] for each in far) + received) / ranks,
        (inside + crossed) / ranks,
    )


def _far(
    grid: GridShape,
    parts: Sequence[Sequence[tuple[int, Part]]],
    ends: Sequence[tuple[int, str]],
    workload: Workload,
    rows: Sequence[int],
    hosts: Sequence[int],
    pipeline: int,
    schedule: str,
) -> tuple[list[dict[str, int]], str]:
    """What comes from other hosts by stage and axis, and why it is not known, "" where it is."""
    nothing = [dict.fromkeys((*AXES, "more"), 0) for _ in parts]
    if len(set(hosts)) < 2:
        return nothing, ""
    try:
        return stages_crossed(grid, parts, ends, workload, rows, hosts, pipeline, schedule), ""
    except NotImplementedError as error:
        return nothing, str(error)


def _reason(workload: Workload, grid: GridShape, tensor: Mapping[str, Any], pipeline: int, schedule: str, microbatches: int) -> str:
    if microbatches > workload.batch:
        return f"{microbatches} micro-batches of {workload.batch} samples: at most one a sample"
    text = next((text for _, part in workload.parts if (text := impossible(grid, part, workload.context))), "")
    if text or pipeline == 1:
        return text
    stages = pipeline * usual_stages(schedule)
    if not workload.row:
        return "the model is not known to be layers in a row, which stages are cut from"
    if len(workload.row) < stages:
        return f"{len(workload.row)} layers in a row cannot make {stages} stages"
    return refused(schedule, pipeline, microbatches)


def _stages(workload: Workload, stages: int) -> list[list[tuple[int, Part]]] | None:
    """The parts of each stage, as pipeline/cut.py cuts them; None where it cannot."""
    if stages == 1:
        return [list(workload.parts)]
    if len(workload.row) < stages:
        return None
    begins = begins_of(workload, stages)
    return [list(merged(workload.row[begin:end])) for begin, end in zip(begins, begins[1:], strict=False)]


def _apart(
    alone: GridShape, parts: Sequence[tuple[int, Part]], workload: Workload, rows: Sequence[int], data: int, accumulates: bool
) -> Cost:
    """What the data ranks' own rows cost without the others: bytes of all of them, messages of the first."""
    total = Cost()
    for replica in range(data):
        mine = [chunks(each, [data])[replica] for each in rows]
        cost = stretch_cost(alone, parts, workload, mine, accumulates)
        total = total.plus(cost) if replica == 0 else total.plus(Cost(received=cost.received))
    return total


def _end(stages: Sequence[Sequence[tuple[int, Part]]], others: Sequence[Sequence[tuple[int, Part]]]) -> tuple[int, str]:
    """(features, layout) of what the last of these stages gives: of the last layer that makes one, or where none is described (patches of
    images), what the first of the others takes."""
    for _, part in reversed([part for parts in stages for part in parts]):
        if isinstance(part, Linears):
            return part.n[-1], part.layout.split("->")[1]
        if isinstance(part, Table):
            return part.width, "outer"
        if isinstance(part, Norm):
            return part.features, "outer"
    taken = next((part for parts in others for _, part in parts if isinstance(part, Linears | Norm)), None)
    return (0, "outer") if taken is None else (taken.k if isinstance(taken, Linears) else taken.features, "outer")


def _crossed(grid: GridShape, workload: Workload, ends: Sequence[tuple[int, str]], pipeline: int, schedule: str) -> list[int]:
    """Bytes that cross behind each stage, there and back, of all ranks."""
    found = [0] * len(ends)
    tokens, stages = workload.batch * workload.context, len(ends) // pipeline
    for stage, *_ in borders_of(pipeline, schedule, stages) if pipeline > 1 else []:
        width, layout = ends[stage]
        alone = [width if at == stage else 0 for at in range(len(ends))]
        found[stage] = border_bytes(grid, tokens, alone, pipeline, schedule, layout, workload.item)
    return found


def _of_rank(crossed: Sequence[int], rank: int, pipeline: int, schedule: str, stages: int) -> float:
    """Of _crossed the bytes that the ranks of one stage receive."""
    pairs = borders_of(pipeline, schedule, stages // pipeline) if pipeline > 1 else []
    return sum(crossed[stage] / 2 * ((first == rank) + (second == rank)) for stage, first, second in pairs)


def _of_ties(grid: GridShape, item: int, tied: Sequence[tuple[Table, Sequence[int]]], rank: int) -> tuple[int, int]:
    """(bytes that the ranks of a pipeline rank receive of the gradients of tied tables, messages of one of them)."""
    mine = [(table, len(places) - 1) for table, places in tied if rank in places]
    size = sum(others * sum(tied_words(grid, table, place) for place in range(grid.size)) for table, others in mine)
    return item * size, sum(others for _, others in mine)


def _border_messages(pipeline: int, schedule: str, stages: int, microbatches: int) -> list[int]:
    """Of each pipeline rank, in a step."""
    pairs = borders_of(pipeline, schedule, stages // pipeline) if pipeline > 1 else []
    return [microbatches * sum((first == rank) + (second == rank) for _, first, second in pairs) for rank in range(pipeline)]


def _memory(workload: Workload, stages: Sequence[Cost], pairs: int, accumulates: bool) -> dict[str, int]:
    """Bytes by kind. pairs: (stage, micro-batch) that are under way at once."""
    held, whole = sum(each.held for each in stages), sum(each.whole for each in stages)
    words = {
        "parameters": held + whole,
        "gradients": held + (whole if accumulates else 0),
        "states": workload.states * held,
        "activations": -(-pairs // len(stages)) * sum(each.kept for each in stages),
    }
    return {kind: workload.item * count for kind, count in words.items()}
