"""Sizes of activations that all ranks have told each other, so that a forward pass asks for them once and not at every layer.

Where an activation begins in the whole depends on what the other ranks hold, which may change with every batch. In one forward pass
(between two calls of one module, scatters, steps of an optimizer or backward passes) the first caller asks; those that told the same sizes
as it when they last asked take what was heard and say so without a message, if
  every rank has told that the activation has the rows of all that it scattered since the last step: no second batch is about, and
  this rank holds the same block again; one that does not asks, and the next call that moves something names both.
Activations of two dims are asked for each time, since selected tokens, h[mask], have two.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class Told:
    """Of one mesh."""

    def __init__(self) -> None:
        self._passes = 0  # forward passes that are known to have begun
        self._rows: set[int] = set()  # of what was scattered since the last step
        self._step = 0
        self._before: tuple[int, ...] = (0, 0, 0)
        self._callers: set[Hashable] = set()
        self._first: dict[Hashable, Hashable] = {}  # of this pass, the first caller whose ranks told these sizes
        self._as: dict[Hashable, Hashable] = {}  # of each caller, forward or again, the one whose ranks told the same when it asked last
        self._heard: dict[Hashable, Any] = {}  # of this pass, by block and first caller

    def begin(self, rows: int) -> None:
        """A micro-batch of so many rows here comes into a stage of a pipeline, or its gradient, before which layers may be recomputed."""
        self._passes += 1
        self._rows, self._step = {rows}, _steps

    def scattered(self, rows: int) -> None:
        self._passes += 1
        if self._step != _steps:
            self._rows, self._step = set(), _steps
        self._rows.add(rows)

    def is_the_batch(self, rows: int) -> bool:
        """Whether an activation has the rows of all that was scattered."""
        return self._rows == {rows} and self._step == _steps

    def find(self, block: Hashable, caller: Hashable, backward_passes: int) -> Any:
        """What was heard in this forward pass by the caller that asks for this one, or None; in a recomputation, in the pass before or,
        where a pipeline took up another micro-batch since, in this one. backward_passes: how many this process has made."""
        again = _recomputes()
        now = self._passes, *(self._before[1:] if again else (_steps, backward_passes))
        if now != self._before or (caller in self._callers and not again):
            self._before = now
            for each in (self._callers, self._first, self._heard):
                each.clear()
        if not again:
            self._callers.add(caller)
        return self._heard.get((block, self._as.get((caller, again))))

    def keep(self, block: Hashable, caller: Hashable, sizes: Hashable, heard: Any, everywhere: bool) -> None:
        """sizes: what all ranks told, which all know; heard: what this one makes of it; everywhere: is_the_batch of all ranks."""
        first = self._as[caller, _recomputes()] = self._first.setdefault(sizes, caller)
        if everywhere:
            self._heard[block, first] = heard


def _recomputes() -> bool:
    return torch._C._current_graph_task_id() != -1
