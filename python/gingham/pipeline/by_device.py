"""Messages between stages on GPUs: the bytes go from device to device over the pipeline's axis, what they are is told by the hosts.

NCCL has no tags: messages between two ranks come in the order in which they were queued, and one that is not taken holds back all behind
it, those of the layers too (csrc/transport/queued.h). So a rank queues each at a moment on which all ranks agree
(orders.with_messages). The host that receives waits until the host that sends has queued its part, which tells the shape; neither waits
for a device.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from ..mesh import Mesh
from .by_memory import opened
from .by_messages import ByMessages


class ByDevice:
    """Collective over `ranks`, of which `near` share this one's memory; others tell shapes by torch.distributed's messages."""

    def __init__(self, mesh: Mesh, ranks: Sequence[int], letters: int, near: Sequence[bool]) -> None:
        assert mesh.whole is not None
        self.mesh, self.near = mesh, near
        self.axis = mesh.whole.joint(("pipeline",))
        self.box, self.members = opened(mesh, ranks, letters, near)
        self.far = ByMessages(mesh, ranks)

    def exchange(self, sends: Sequence[Any], receives: Sequence[Any]) -> tuple[int, list[torch.Tensor]]:
        """One group: (tensor, place, tag, key) of each that leaves, (place, tag, key) of each that comes. Returns its number for `settle`,
        and what comes, to be read after that."""
        told = [self._tell(*each) for each in sends]
        come = [self.mesh.empty(*self._hear(*each)) for each in receives]
        out = [(place, x) for x, place, _, _ in sends]
        number = self.axis.post(out, [(place, x) for (place, _, _), x in zip(receives, come, strict=True)])
        for each in told:
            self.far.await_gone(each)
        return number, come

    def settle(self, number: int) -> None:
        """Kernels queued from here on come after that group, and memory that is freed here is used again after it."""
        self.axis.settle(number)

    def _tell(self, x: torch.Tensor, place: int, tag: int, key: Hashable) -> Any:
        if not self.near[place]:
            return self.far.tell(x, place, tag, key)
        self.box.tell(self.members[place], tag, x)
        return []

    def _hear(self, place: int, tag: int, key: Hashable) -> tuple[tuple[int, ...], torch.dtype]:
        if not self.near[place]:
            return self.far.hear(place, tag, key)
        shape, dtype = self.box.hear(self.members[place], tag)
        return tuple(shape), getattr(torch, dtype)
