"""Arithmetic of pipelines: which rank has which stage, where a model is cut, what crosses the borders, how long ranks are idle.

Example: 2 ranks, 2 stages each: in a loop rank 0 has stages 0 and 2, rank 1 stages 1 and 3; in a V (zbv, dual) rank 0 has 0 and 3, and
rank 1 has 1 and 2, between which nothing travels.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..mesh.modes import GridShape

V_SHAPED = ("zbv", "dual")
LOOPED = ("interleaved", "zero_bubble")
SCHEDULES = ("gpipe", "1f1b", *LOOPED, *V_SHAPED)


def usual_stages(schedule: str) -> int:
    """The stages of a rank where nobody says how many."""
    return 1 if schedule in ("gpipe", "1f1b") else 2


def sizes_of_parts(rows: int, microbatches: int) -> list[int]:
    """Rows of each micro-batch, as torch.tensor_split cuts them: 9 in 4 are 3, 2, 2, 2."""
    return [rows // microbatches + (part < rows % microbatches) for part in range(microbatches)]


def rank_of(stage: int, size: int, schedule: str) -> int:
    """The pipeline rank, of `size`, that has a stage."""
    turn, place = divmod(stage, size)
    return size - 1 - place if schedule in V_SHAPED and turn % 2 else place


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """Where each stage begins, and len(costs) at the end: stages of at least one part, in order, whose dearest is as cheap as can be, and
    among those the earliest cuts. Example: balance([0, 4, 4, 4, 4, 1], 2) is [0, 3, 6]. Raises ValueError for fewer parts than stages."""
    count = len(costs)
    if not 1 <= stages <= count:
        raise ValueError(f"{count} parts cannot make {stages} stages")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[k][i]: (the dearest, where the last begins) of parts 0..i in k stages
    best: list[list[tuple[float, int]]] = [[(sums[end], 0) for end in range(count + 1)]]
    for made in range(1, stages):
        row = [(float("inf"), 0)] * (count + 1)
        for end in range(made + 1, count + 1):
            row[end] = min((max(best[-1][cut][0], sums[end] - sums[cut]), cut) for cut in range(made, end))
        best.append(row)
    cuts = [count]
    for row in reversed(best):
        cuts.append(row[cuts[-1]][1])
    return cuts[::-1]


def borders_of(size: int, schedule: str, stages: int = 1) -> list[tuple[int, int, int]]:
    """(stage, its rank, the next one's rank) of each border that activations cross from rank to rank."""
    places = [rank_of(stage, size, schedule) for stage in range(size * stages)]
    return [(stage, *pair) for stage, pair in enumerate(zip(places, places[1:], strict=False)) if pair[0] != pair[1]]


def border_words(words: int, rank: int, size: int, schedule: str, stages: int = 1) -> int:
    """That a rank receives in a step: `words` activations of the whole batch cross each border between stages of two ranks and as many
    gradients come back. words: of this rank's block; stages: of each rank."""
    return words * sum((first == rank) + (second == rank) for _, first, second in borders_of(size, schedule, stages))


def border_bytes(
    grid: GridShape, tokens: int, widths: Sequence[int], size: int, schedule: str, layout: str = "outer", item: int = 4
) -> int:
    """Of all ranks in a step, for activations [tokens, widths[i]] after stage i: each rank of a stage hands its block on, and its gradient
    comes back. grid: of a stage."""
    stages = len(widths) // size
    ends = grid.layout(layout)
    alike = grid.size // (grid.parts(ends.rows) * grid.parts(ends.features))
    return item * 2 * tokens * alike * sum(widths[stage] for stage, _, _ in borders_of(size, schedule, stages))


def in_flight(schedule: str, rank: int, size: int, microbatches: int, stages: int = 1) -> int:
    """Of a rank at most so many (stage, micro-batch) pairs whose forward pass is done and of whose backward pass something is left:

    gpipe         n                        1f1b           P - rank
    interleaved   (v-1) n/(n div P) + 2 (P-1-rank) + 1    zero_bubble    (v-1) n/(n div P) + P
    zbv           2 P                      dual           2 P + 1
    """
    count, turn = stages * microbatches, microbatches // max(1, microbatches // size)
    if size == 1:
        return 1
    most = {
        "gpipe": count,
        "1f1b": size - rank,
        "interleaved": (stages - 1) * turn + 2 * (size - 1 - rank) + 1,
        "zero_bubble": (stages - 1) * turn + size,
        "zbv": 2 * size,
        "dual": 2 * size + 1,
    }
    return min(count, most[schedule])


def refused(schedule: str, size: int, microbatches: int) -> str:
    """Why torch's schedule has no order for these numbers; "" where it has one."""
    turns = max(1, microbatches // size)
    if schedule in LOOPED and microbatches % turns:
        return f"{schedule} takes {turns} rounds of micro-batches, which do not divide {microbatches}"
    if schedule == "dual" and microbatches < 2 * size:
        return f"dual takes at least as many micro-batches as stages, {2 * size}, got {microbatches}"
    return ""


def bubble(schedule: str, size: int, microbatches: int, stages: int = 1) -> float:
    """The share of a step in which a rank is idle, where a forward, its gradient of inputs and its gradient of weights take the same time
    and messages none. P ranks, n micro-batches, v stages a rank, in units of one of the three:

    gpipe, 1f1b     3 (P-1) of 3 (n + P - 1)
    interleaved     3 (P-1) of 3 (v n + P - 1)
    zero_bubble     P - 1 of 3 v n + P - 1: gradients of weights fill all but the way of the first forward
    zbv, dual       P - 1 of 6 n + P - 1
    """
    work = 3 * stages * microbatches
    idle = 3 * (size - 1) if schedule in ("gpipe", "1f1b", "interleaved") else size - 1
    return idle / (work + idle)
