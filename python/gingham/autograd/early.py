"""W of the next linear, gathered on GPUs beside the products of this one.

A step whose W is cut over an axis begins with a gather of it, which no product of the step can hide. It depends on no activation,
so that where a layer has followed another twice in a row, forward or backward, the gather of its W is queued behind the messages of
that other's call, and runs beside its products. The bytes are the same, the order of sums is that of calls without it
(Group::leader in csrc/ops/pipeline.h), and a rank holds one more W, gathered, while a pass runs.

What was gathered is used if the parameter has not changed since, as `kept.key_of` sees it: its versions, its memory, writes by name.
Otherwise it is left, and the step gathers W itself. Ranks that differ in this are told by name, since both say so in their calls.
Followers are learnt in runs of calls in which no layer comes twice, so that neither the first layer of the next pass nor one that
is recomputed is guessed; a guess that was wrong costs one W on the links, counted as received, and must be seen twice again. Not
done inside of a graph capture, whose messages must not pass its borders, in a compiled graph, which has blocks in place of
parameters, with weights kept whole over data or made in inference mode, which count no versions, on a mesh of several hosts, and for
gathers below LEAST bytes, which cost the host a call: GINGHAM_EARLY_BYTES sets it, for instance so high that nothing is gathered
early where memory is short.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..mesh import Mesh
from .casts import block_in, casts_to, local_of
from .kept import key_of

# Bytes that a rank receives in a gather; smaller ones are not made early. 11 us at 380 GB/s.
LEAST = int(os.environ.get("GINGHAM_EARLY_BYTES", 4 << 20))
CONFIRMED = 2  # times that a layer has followed another


@dataclass
class Follower:
    """The layer whose call came after another's, and its weights."""

    plan: Any  # weakly
    parameters: list[Any]  # weakly
    dtype: torch.dtype | None  # of an autocast region
    seen: int = 1


@dataclass
class Ready:
    """Weights on their way. blocks: as they are multiplied by; weights: native.Early."""

    plan: Any  # weakly
    forward: bool
    dtype: torch.dtype | None
    keys: list[Any]
    blocks: list[torch.Tensor]
    weights: Any
    guess: Follower


class Ahead:
    """Of a mesh: which layer follows which, and what is on its way."""

    def __init__(self, mesh: Mesh, axis: Any) -> None:
        self.mesh, self.axis = mesh, axis
        self._followers: dict[tuple[int, bool], Follower] = {}  # by id of the plan before, and whether forward
        self._last: tuple[int, bool] | None = None
        self._run: set[int] = set()  # plans whose calls came since the direction changed
        self._ready: Ready | None = None
        self._prepared: Ready | None = None
        self._left: list[Ready] = []  # found in a capture, which cannot wait for their messages

    def take(self, plan: Any, forward: bool, parameters: Sequence[Any], dtype: torch.dtype | None) -> Ready | None:
        """What is on its way for this call, which is noted."""
        self._note(plan, forward, parameters, dtype)
        ready, self._ready, self._prepared = self._ready, None, None
        if ready is None:
            return None
        if self._capturing():
            self._left.append(ready)
            return None
        self._left.clear()
        if ready.plan() is not plan or ready.forward != forward:
            ready.guess.seen = 0
            return None
        known = ready.dtype == dtype and all(isinstance(each, DTensor) for each in parameters)  # a compiled graph has blocks in their place
        return ready if known and ready.keys == [key_of(each) for each in parameters] else None

    def forget(self) -> None:
        """What comes next follows nothing: a call that reads no W has been, or another part of the model begins."""
        self._last = self._prepared = None
        if self._ready is not None:
            self._ready.guess.seen = 0
            if self._capturing():
                self._left.append(self._ready)
            self._ready = None

    def prepare(self, plan: Any, forward: bool) -> None:
        """Makes room for the weights of the call that is expected after this one, before this one's kernels are queued."""
        guess = self._followers.get((id(plan), forward))
        checked = self.mesh.checks is not None and self.mesh.checks.on
        if guess is None or guess.seen < CONFIRMED or self._capturing() or checked:
            return
        other, parameters = guess.plan(), [each() for each in guess.parameters]
        if other is None or id(other) in self._run or not all(isinstance(each, DTensor) for each in parameters):
            return
        if forward and torch._C._current_graph_task_id() != -1:  # recomputed within a backward pass: what follows is not known
            return
        local = [local_of(each) for each in parameters]
        width = 2 if casts_to(local[0], guess.dtype) else local[0].itemsize  # regions are of 16 bits
        if self._received(other) * width < LEAST or not other.step.gathers_early or any(each.is_inference() for each in local):
            return
        blocks: list[Any] = [block_in(self.mesh, each, guess.dtype) for each in local]
        self.mesh.say(other.label)
        weights = other.step.early(blocks)
        self._prepared = Ready(guess.plan, forward, guess.dtype, [key_of(each) for each in parameters], blocks, weights, guess)

    def start(self) -> None:
        """Queues the gather that was prepared, behind the messages of the call that has been made since."""
        ready, self._prepared = self._prepared, None
        plan = None if ready is None else ready.plan()
        if ready is None or plan is None:
            return
        self.mesh.say(plan.label)
        plan.step.gather(ready.weights)
        self._ready = ready

    def _note(self, plan: Any, forward: bool, parameters: Sequence[Any], dtype: torch.dtype | None) -> None:
        before, self._last = self._last, (id(plan), forward)
        turned = before is None or before[1] != forward or id(plan) in self._run
        if turned:
            self._run.clear()
        self._run.add(id(plan))
        if turned or before is None:
            return
        known = self._followers.get(before)
        if known is not None and known.plan() is plan and known.dtype == dtype and _same(known.parameters, parameters):
            known.seen += 1
        elif all(isinstance(each, DTensor) for each in parameters):
            self._followers[before] = Follower(weakref.ref(plan), [weakref.ref(each) for each in parameters], dtype)

    def _received(self, plan: Any) -> float:
        """Elements that a rank receives in a gather of the plan's weights, on average: what ranks decide by, whose parts may be uneven."""
        return plan.k * sum(plan.n) * (self.axis.size - 1) / self.mesh.parts(sum(plan.weight_cuts, ()))

    def _capturing(self) -> bool:
        return not self.mesh.job.on_host and torch.cuda.is_current_stream_capturing()


def _same(weak: Sequence[Any], parameters: Sequence[Any]) -> bool:
    return len(weak) == len(parameters) and all(each() is other for each, other in zip(weak, parameters, strict=True))


def enter(plan: Any, forward: bool, parameters: Sequence[Any] | None, dtype: torch.dtype | None) -> Ready | None:
    """A linear's call on GPUs begins: its weights, if they are on their way. parameters: None where the call reads no W; dtype: of its
    autocast region. When the call has been made, `mesh.ahead.start()` follows, where there is one."""
    mesh = plan.mesh
    if mesh.axes.kept or mesh.program.spans or (axis := mesh.axis(mesh.axes.gathered)) is None:
        return None
    if mesh.ahead is None:
        mesh.ahead = Ahead(mesh, axis)
    ahead: Ahead = mesh.ahead
    if parameters is None:
        ahead.forget()
        return None
    ready = ahead.take(plan, forward, parameters, dtype)
    ahead.prepare(plan, forward)
    return ready


def turn(mesh: Mesh) -> None:
    """Another part of a model begins, such as a stage's pass for one of its micro-batches: what comes now follows nothing."""
    if mesh.ahead is not None:
        mesh.ahead.forget()
