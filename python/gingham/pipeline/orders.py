"""The order in which one rank makes the forward and backward passes of its stages: torch.distributed.pipelining's schedules.

Example: rank 0 of 2 with 3 micro-batches in 1f1b: F0 F1 B0 F2 B1 B2, rank 1: F0 B0 F1 B1 F2 B2. Schedules that split a backward pass
have I (gradients of inputs) and W (of weights) in place of B.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
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


@dataclass(frozen=True)
class Message:
    """A moment at which one rank queues what it sends, or what it receives, of a message between two."""

    sends: bool
    forward: bool  # an activation, else the gradient of one
    stage: int  # to which it comes
    part: int


UNITS = {FORWARD: 1, BACKWARD: 2, INPUTS: 1, WEIGHTS: 1}  # of time, about


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


def of_rank(rank: int, size: int, schedule: str, microbatches: int, stages: int, train: bool, ordered: bool) -> list[Action | Message]:
    """`order`, without train its forward passes alone; ordered: with messages."""
    some = range(size) if ordered else (rank,)
    orders = [[each for each in order(schedule, one, size, microbatches, stages) if train or each.kind == FORWARD] for one in some]
    if ordered:
        return with_messages(orders, [rank_of(stage, size, schedule) for stage in range(size * stages)])[rank]
    return list(orders[0])


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


def with_messages(orders: Sequence[Sequence[Action]], place_of: Sequence[int]) -> list[list[Action | Message]]:
    """Of all pipeline ranks: their actions, and between them the moments at which they queue messages. They are one order of the whole
    pipeline, by a clock: an action begins as soon as it can and takes its UNITS, and when it ends both ranks of the message that it makes
    queue that, one in the middle of an action behind it. What stands first in this order waits for nothing behind it, so that no two ranks
    can wait for each other, however few messages a device carries at a time.
    Example: 1f1b, rank 0 of 2: F0 send F1 send receive B0 F2 send .., rank 1: receive F0 receive B0 send receive F1 B1 .."""
    found: list[list[Action | Message]] = [[] for _ in orders]
    left, busy, last = [list(reversed(order)) for order in orders], [False] * len(orders), len(place_of) - 1
    came: set[tuple[bool, int, int] | None] = {None}
    ends: list[tuple[int, int, Action]] = []  # by rank, of the actions under way
    now = 0
    while any(left) or ends:
        for rank, waiting in enumerate(left):
            if not busy[rank] and waiting and _needed(waiting[-1], last) in came:
                action = waiting.pop()
                found[rank].append(action)
                heapq.heappush(ends, (now + UNITS[action.kind], rank, action))
                busy[rank] = True
        now = ends[0][0]
        while ends and ends[0][0] == now:
            _, rank, action = heapq.heappop(ends)
            busy[rank], made = False, _made(action, last)
            came.add(made)
            if made is not None and place_of[made[1]] != rank:
                found[rank].append(Message(True, *made))
                found[place_of[made[1]]].append(Message(False, *made))
    return found


def _needed(action: Action, last: int) -> tuple[bool, int, int] | None:
    """The direction of what an action takes from another stage, with its own stage and micro-batch."""
    forward = action.kind == FORWARD
    begins = action.kind == WEIGHTS or action.stage == (0 if forward else last)
    return None if begins else (forward, action.stage, action.part)


def _made(action: Action, last: int) -> tuple[bool, int, int] | None:
    """The same of what it gives to another stage, with that stage."""
    forward = action.kind == FORWARD
    ends = action.kind == WEIGHTS or action.stage == (last if forward else 0)
    return None if ends else (forward, action.stage + (1 if forward else -1), action.part)
