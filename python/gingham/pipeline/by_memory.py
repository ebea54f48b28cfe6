"""Messages between stages on one host: the sender says where its tensor stands in the shared memory, the receiver copies it from there."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from .. import native
from ..mesh import Mesh


def opened(mesh: Mesh, ranks: Sequence[int], letters: int, near: Sequence[bool]) -> tuple[native.Mailbox, list[int]]:
    """This rank's mailbox, with those of the ranks `near` it open, and the members' numbers of all `ranks`. Collective over them."""
    whole = mesh.whole
    assert whole is not None
    members = [whole.ranks.index(rank) for rank in ranks]
    box = native.Mailbox(whole.program, letters)
    offsets = mesh.over_stages(torch.tensor([box.offset], device=mesh.device), "the mailboxes of a pipeline")
    for member, offset, here in zip(members, offsets, near, strict=True):
        if here:
            box.open(member, int(offset))
    return box, members


class ByMemory:
    """Collective over `ranks`, of which `near` share this one's memory."""

    def __init__(self, mesh: Mesh, ranks: Sequence[int], letters: int, near: Sequence[bool]) -> None:
        self.box, self.members = opened(mesh, ranks, letters, near)

    def send(self, x: torch.Tensor, place: int, tag: int, key: Hashable) -> Any:
        """x: in the memory that the ranks share, not written to until await_gone."""
        self.box.send(self.members[place], tag, x)
        return place, tag, x

    def await_gone(self, sent: Any) -> None:
        place, tag, _ = sent
        self.box.await_taken(self.members[place], tag)

    def receive(self, place: int, tag: int, key: Hashable) -> Any:
        return place, tag

    def wait(self, begun: Any) -> torch.Tensor:
        place, tag = begun
        return self.box.receive(self.members[place], tag)
