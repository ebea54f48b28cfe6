"""Tensors between the ranks of neighbouring stages at the same place of their meshes.

Each message has a tag of its own, so that no order of sending matters. Between ranks of one host it is a letter in the memory that they
share (by_memory.py), between hosts a message of torch.distributed's (by_messages.py). Between GPUs tags say what comes, and the order is
one of all ranks (by_device.py). A rank that waits looks at the job meanwhile: a death anywhere is told within a second, and one that sends
nothing for the mesh's timeout is PeerStalled, named by who waits for whom.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from ..errors import MeshError
from ..launch import world
from ..launch.hosts import host_numbers
from ..mesh import Mesh
from .by_device import ByDevice
from .by_memory import ByMemory
from .by_messages import DIMS, DTYPES, ByMessages


class Wire:
    """Of one rank; collective over `ranks`, the job's at this one's place in each pipeline rank. tags: how many there are, from 0; one rank
    sends under a tag to another, and may send under it to several."""

    def __init__(self, mesh: Mesh, ranks: list[int], tags: int) -> None:
        self.mesh = mesh
        job = world.current()
        assert job is not None
        host_of = host_numbers(job.hosts)
        self.elsewhere = [host_of[rank] != host_of[mesh.rank] for rank in ranks]
        if len(job.hosts) > 1:
            mesh.borders.setdefault("bytes_crossed", 0)
        near = [not each for each in self.elsewhere]
        self.by_device = ByDevice(mesh, ranks, tags, near) if mesh.job.has_gpu else None
        self.by_memory = None if mesh.job.has_gpu else ByMemory(mesh, ranks, tags, near)
        self.by_messages = ByMessages(mesh, ranks)
        self.sent: dict[tuple[int, int], Any] = {}  # by place and tag: what must live until it was taken, and how to wait for that

    @property
    def ordered(self) -> bool:
        """Whether messages are sent and asked for in one order of all ranks (orders.with_messages)."""
        return self.by_device is not None

    def _way(self, place: int) -> ByMemory | ByMessages:
        return self.by_memory if self.by_memory is not None and not self.elsewhere[place] else self.by_messages

    def send(self, x: torch.Tensor, place: int, tag: int, key: Hashable) -> None:
        """To a pipeline rank. key: what the shape follows from, which both sides know. A copy goes, since whoever made x may write to it
        before it is taken: a hook that adds up outputs, a layer that uses its memory again."""
        self.exchange([(x, place, tag, key)], [])

    def receive(self, place: int, tag: int, key: Hashable) -> Any:
        """Begins to receive what a pipeline rank sends; `wait` of the result gives the tensor."""
        return self.exchange([], [(place, tag, key)])[0]

    def exchange(self, sends: Sequence[tuple[Any, int, int, Hashable]], receives: Sequence[tuple[int, int, Hashable]]) -> list[Any]:
        """`send`s and `receive`s of which none waits for another."""
        copies = [(self._copy(x), place, tag, key) for x, place, tag, key in sends]
        if self.by_device is not None:
            number, come = self.by_device.exchange(copies, receives)
            self.sent |= {(place, tag): (number, x) for x, place, tag, _ in copies}
            return [(place, (number, x)) for (place, _, _), x in zip(receives, come, strict=True)]
        for x, place, tag, key in copies:
            self.sent[place, tag] = self._way(place).send(x, place, tag, key)
        return [(place, self._way(place).receive(place, tag, key)) for place, tag, key in receives]

    def _copy(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() > DIMS or x.dtype not in DTYPES:
            raise MeshError(f"pipeline: a tensor of {x.dim()} dims and {x.dtype} between stages; expected at most {DIMS} dims")
        self.mesh.borders["bytes_sent"] += x.numel() * x.element_size()
        return self.mesh.empty(x.shape, x.dtype).copy_(x.detach())

    def wait(self, begun: Any) -> torch.Tensor:
        place, message = begun
        if self.by_device is not None:
            number, x = message
            self.by_device.settle(number)
        else:
            x = self._way(place).wait(message)
        borders, size = self.mesh.borders, x.numel() * x.element_size()
        borders["bytes_received"] += size
        borders["messages"] += 1
        if self.elsewhere[place]:
            borders["bytes_crossed"] += size
        return x

    def finish(self) -> None:
        """Waits until all that was sent has gone; on GPUs the device does, not the host."""
        for place, tag in list(self.sent):
            self._release(place, tag)

    def answered(self, place: int, tag: int) -> None:
        """What was sent to a place under a tag has come, as something that came back tells."""
        self._release(place, tag)

    def _release(self, place: int, tag: int) -> None:
        sent = self.sent.pop((place, tag), None)
        if sent is None:
            return
        if self.by_device is not None:
            self.by_device.settle(sent[0])
        else:
            self._way(place).await_gone(sent)
