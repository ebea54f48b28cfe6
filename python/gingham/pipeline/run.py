"""The forward and backward passes of one rank's stages over the micro-batches of a batch, in the order of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..autograd.gradients import weights_later
from ..checks import plain
from ..errors import MeshError
from .cut import Part
from .orders import BACKWARD, FORWARD, INPUTS, WEIGHTS, Action, Message
from .wire import Wire

AHEAD = 2  # passes whose messages are asked for before they are needed


@dataclass
class Held:
    """Of one micro-batch in one stage, from its forward pass to its backward pass."""

    x: Any
    y: Any
    later: list[Callable[[], None]] = field(default_factory=list)


class Runner:
    """stages: of this rank, by number; total: of all ranks; place_of: the pipeline rank of each; parts: the number of micro-batches;
    begin: told the rows and the number of each whose pass begins in a stage."""

    def __init__(
        self,
        stages: dict[int, Sequence[Part]],
        total: int,
        place_of: Sequence[int],
        place: int,
        parts: int,
        wire: Wire | None,
        begin: Callable[[int, int], None],
    ):
        self.begin = begin
        self.stages, self.total, self.place_of, self.place, self.parts, self.wire = stages, total, place_of, place, parts, wire

    def run(
        self,
        order: Sequence[Action | Message],
        inputs: Sequence[Any],
        keys: Sequence[Hashable],
        lose: Callable[[Any, int], torch.Tensor],
        train: bool,
    ) -> list[torch.Tensor]:
        """order: with the moments of messages where the wire keeps them in order; inputs: of the first stage, by micro-batch; keys: what
        shapes follow from; lose(y, part): the share of the loss that is differentiated, or, train=False, whatever is kept of the
        outputs. Returns what it gave, on the rank of the last stage, else []."""
        self.inputs, self.keys, self.lose, self.train = inputs, keys, lose, train
        self.held: dict[tuple[int, int], Held] = {}
        # by direction, stage to which it comes and micro-batch: begun, handed on within this rank, made but not sent yet
        self.arriving: dict[tuple[bool, int, int], Any] = {}
        self.here: dict[tuple[bool, int, int], torch.Tensor] = {}
        self.leaving: dict[tuple[bool, int, int], torch.Tensor] = {}
        self.results: dict[int, torch.Tensor] = {}
        for at, action in enumerate(order):
            if isinstance(action, Message):
                self._queue(action)
                continue
            if self.wire is not None and not self.wire.ordered:
                for near in order[at : at + 1 + AHEAD]:
                    self._ask(near)  # type: ignore[arg-type]
            if action.kind == FORWARD:
                self._forward(action)
            elif action.kind in (BACKWARD, INPUTS):
                self._backward(action)
            else:
                for make in self.held.pop((action.stage, action.part)).later:
                    make()
        if self.wire is not None:
            self.wire.finish()
        return [self.results[part] for part in range(self.parts)] if self.results else []

    def _ask(self, action: Action) -> None:
        """Begins to receive what a pass needs from another rank."""
        forward = action.kind == FORWARD
        other = action.stage + (-1 if forward else 1)
        if action.kind == WEIGHTS or not 0 <= other < self.total or self.place_of[other] == self.place:
            return
        if (forward, action.stage, action.part) not in self.arriving:
            self._receive(forward, action.stage, action.part)

    def _queue(self, message: Message) -> None:
        """Sends what was made, or begins to receive."""
        forward, stage, part = message.forward, message.stage, message.part
        if not message.sends:
            if forward or self.held[stage, part].y.is_floating_point():
                self._receive(forward, stage, part)
        elif (x := self.leaving.pop((forward, stage, part), None)) is not None:  # None: of ids, which have no gradient
            self._send(x, forward, stage, part)

    def _receive(self, forward: bool, stage: int, part: int) -> None:
        assert self.wire is not None
        place = self.place_of[stage + (-1 if forward else 1)]
        self.arriving[forward, stage, part] = self.wire.receive(place, *self._tag(forward, stage, part))

    def _send(self, x: torch.Tensor, forward: bool, stage: int, part: int) -> None:
        assert self.wire is not None
        self.wire.send(x, self.place_of[stage], *self._tag(forward, stage, part))

    def _tag(self, forward: bool, stage: int, part: int) -> tuple[int, Hashable]:
        """Of what comes to a stage."""
        return (2 * stage + forward) * self.parts + part, (forward, stage, self.keys[part], self.train)

    def _arrived(self, forward: bool, stage: int, part: int) -> Any:
        begun = self.arriving.pop((forward, stage, part), None)
        if begun is None:
            return self.here.pop((forward, stage, part))
        assert self.wire is not None
        return self.wire.wait(begun)

    def _hand(self, x: torch.Tensor, forward: bool, stage: int, part: int) -> None:
        """To `stage`, which takes it as its input or as the gradient of its output."""
        if self.place_of[stage] == self.place:
            self.here[forward, stage, part] = x.detach().clone()
            return
        assert self.wire is not None
        if self.wire.ordered:
            self.leaving[forward, stage, part] = x
        else:
            self._send(x, forward, stage, part)

    def _take_up(self, x: Any, part: int) -> None:
        self.begin(x.shape[0] if isinstance(x, torch.Tensor) and x.dim() else 0, part)

    def _forward(self, action: Action) -> None:
        stage, part = action.stage, action.part
        x = self.inputs[part] if stage == 0 else self._arrived(True, stage, part)
        self._take_up(x, part)
        if stage and self.train and x.is_floating_point():
            x.requires_grad_()
        y = x
        for each in self.stages[stage]:
            y = each.run(y)
        y = plain(y)
        last = stage == self.total - 1
        if not last and not isinstance(y, torch.Tensor):
            raise MeshError(f"gingham.pipeline: stage {stage} gives a {type(y).__name__} to the next, expected one tensor")
        if last:
            y = self.lose(y, part)
            self.results[part] = y.detach()
        else:
            self._hand(y, True, stage + 1, part)
        if self.train:
            self.held[stage, part] = Held(x, y)

    def _backward(self, action: Action) -> None:
        stage, part = action.stage, action.part
        held = self.held[stage, part] if action.kind == INPUTS else self.held.pop((stage, part))
        last = stage == self.total - 1 or not held.y.is_floating_point()  # ids have no gradient
        gradient = None if last else self._arrived(False, stage, part)
        if self.wire is not None and gradient is not None:
            self.wire.answered(self.place_of[stage + 1], self._tag(True, stage + 1, part)[0])
        x = held.x if stage else None
        self._take_up(held.x, part)  # which checkpointed layers compute again
        if held.y.requires_grad:
            if action.kind == INPUTS:
                with weights_later() as held.later:
                    torch.autograd.backward(held.y, gradient)
            else:
                torch.autograd.backward(held.y, gradient)
        held.y = held.x = None
        if x is not None and x.is_floating_point():
            self._hand(torch.zeros_like(x) if x.grad is None else plain(x.grad), False, stage - 1, part)
            x.grad = None
