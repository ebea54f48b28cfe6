"""Tensors between the ranks of neighbouring stages at the same place of their meshes.

Each message has a tag of its own, so that no order of sending matters. Between ranks of one host it is a letter in the memory that they
share (by_memory.py), between hosts a message of torch.distributed's (by_messages.py). A rank that waits looks at the job meanwhile: a
death anywhere is told within a second, and one that sends nothing for the mesh's timeout is PeerStalled, named by who waits for whom.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ..errors import MeshError
from ..launch import world
from ..launch.hosts import host_numbers
from ..mesh import Mesh
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
        self.by_memory = ByMemory(mesh, ranks, tags, [not each for each in self.elsewhere])
        self.by_messages = ByMessages(mesh, ranks)
        self.sent: dict[tuple[int, int], Any] = {}  # by place and tag: what must live until it was taken, and how to wait for that

    def _way(self, place: int) -> ByMemory | ByMessages:
        return self.by_messages if self.elsewhere[place] else self.by_memory

    def send(self, x: torch.Tensor, place: int, tag: int, key: Hashable) -> None:
        """To a pipeline rank. key: what the shape follows from, which both sides know. A copy goes, since whoever made x may write to it
        before it is taken: a hook that adds up outputs, a layer that uses its memory again."""
        if x.dim() > DIMS or x.dtype not in DTYPES:
            raise MeshError(f"pipeline: a tensor of {x.dim()} dims and {x.dtype} between stages; expected at most {DIMS} dims")
        copy = self.mesh.empty(x.shape, x.dtype).copy_(x.detach())
        self.sent[place, tag] = self._way(place).send(copy, place, tag, key)
        borders = self.mesh.borders
        borders["bytes_sent"] += x.numel() * x.element_size()

    def receive(self, place: int, tag: int, key: Hashable) -> Any:
        """Begins to receive what a pipeline rank sends; `wait` of the result gives the tensor."""
        return place, self._way(place).receive(place, tag, key)

    def wait(self, begun: Any) -> torch.Tensor:
        place, message = begun
        x = self._way(place).wait(message)
        borders, size = self.mesh.borders, x.numel() * x.element_size()
        borders["bytes_received"] += size
        borders["messages"] += 1
        if self.elsewhere[place]:
            borders["bytes_crossed"] += size
        return x

    def finish(self) -> None:
        """Waits until all that was sent has gone."""
        for place, tag in list(self.sent):
            self._release(place, tag)

    def answered(self, place: int, tag: int) -> None:
        """What was sent to a place under a tag has come, as something that came back tells."""
        self._release(place, tag)

    def _release(self, place: int, tag: int) -> None:
        sent = self.sent.pop((place, tag), None)
        if sent is not None:
            self._way(place).await_gone(sent)
