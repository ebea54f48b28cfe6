"""The order in which one rank makes the forward and backward passes of its stages: torch.distributed.pipelining's schedules.

Example: rank 0 of 2 with 3 micro-batches in 1f1b: F0 F1 B0 F2 B1 B2, rank 1: F0 B0 F1 B1 F2 B2. Schedules that split a backward pass
have I (gradients of inputs) and W (of weights) in place of B.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.pipelining import schedules

from ..errors import MeshError
from ..plan.pipeline import LOOPED, SCHEDULES, rank_of, usual_stages

FORWARD, BACKWARD, INPUTS, WEIGHTS = "F", "B", "I", "W"
LOOPS = {"interleaved": schedules.ScheduleInterleaved1F1B, "zero_bubble": schedules.ScheduleInterleavedZeroBubble}
VS = {"zbv": schedules.ScheduleZBVZeroBubble, "dual": schedules.ScheduleDualPipeV}
NAMES = {
    schedules._ComputationType.FORWARD: FORWARD,
    schedules._ComputationType.FULL_BACKWARD: BACKWARD,
    schedules._ComputationType.BACKWARD_INPUT: INPUTS,
    schedules._ComputationType.BACKWARD_WEIGHT: WEIGHTS,
}


@dataclass(frozen=True)
class Action:
    kind: str
    stage: int
    part: int  # the micro-batch's number


def stages_of(schedule: str, stages: int | None) -> int:
    """How many stages each rank has. Raises MeshError for an unknown schedule, or a number that it cannot have."""
    if schedule not in SCHEDULES:
        raise MeshError(f"schedule={schedule!r}: expected {', '.join(map(repr, SCHEDULES))}")
    usual = usual_stages(schedule)
    if stages is None:
        return usual
    least = 2 if schedule in LOOPED else usual
    if not isinstance(stages, int) or stages < least or (schedule not in LOOPED and stages != usual):
        expected = f"at least {least}" if schedule in LOOPED else usual
        raise MeshError(f"schedule {schedule!r} with stages={stages!r} a rank: expected {expected}")
    return stages


def order(schedule: str, rank: int, size: int, microbatches: int, stages: int) -> list[Action]:
    """Of one pipeline rank; stages: of each rank. Raises MeshError where the schedule has no order for these numbers."""
    if size == 1:
        return [Action(kind, 0, part) for part in range(microbatches) for kind in (FORWARD, BACKWARD)]
    if schedule in LOOPS | VS:
        return _torchs(schedule, rank, size, microbatches, stages)
    # of the micro-batches that are under way at once: all, or as many as there are ranks from here on
    ahead = microbatches if schedule == "gpipe" else min(microbatches, size - rank)
    found = [Action(FORWARD, rank, part) for part in range(ahead)]
    for part in range(microbatches):
        found.append(Action(BACKWARD, rank, part))
        if part + ahead < microbatches:
            found.append(Action(FORWARD, rank, part + ahead))
    return found


def _torchs(schedule: str, rank: int, size: int, microbatches: int, stages: int) -> list[Action]:
    total = size * stages
    mine = [stage for stage in range(total) if rank_of(stage, size, schedule) == rank]
    named: Any = [
        SimpleNamespace(stage_index=stage, num_stages=total, group_size=size, group_rank=rank, submod=torch.nn.Identity()) for stage in mine
    ]
    try:
        made = (LOOPS | VS)[schedule](named, microbatches, lambda y, target: y)
    except ValueError as error:
        raise MeshError(f"schedule {schedule!r} of {size} ranks with {total} stages and microbatches={microbatches}: {error}") from None
    actions = [each for action in made.pipeline_order[rank] if action is not None for each in action.sub_actions or (action,)]
    return [Action(NAMES[each.computation_type], each.stage_index, each.microbatch_index or 0) for each in actions]
