"""What only a look at the other ranks tells: plain tensors and random numbers that met blocks, compared once in the first backward pass.

A plain tensor that goes with a block along a dim that ranks cut belongs to this rank's part of it. Where every rank has
the same values, and not one value all along, they were made as if the part were the whole: torch.rand(x.shape[0], 1),
torch.arange(x.shape[-1]). Random numbers for what all ranks hold alike must come from generators in one state.
Bytes: 8 a rank, and 8 for each note, in control messages.
"""

from __future__ import annotations

import torch

from ..mesh import Mesh
from ..mesh.carried import numbers_of_all
from ..mesh.checksums import checksum
from ..mesh.layout import Names, odd_ranks
from .rules import Wrong

MOST = 500  # notes that are kept
LABEL = "the check of the first step (which torch.compile ends, to be called on every rank or none; GINGHAM_CHECK=0 leaves it out)"

Site = tuple[str, int]


class Notes:
    """A checksum, what is wrong where it is the same on every rank (or, `alike`, where it is not), and the line."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, bool, Wrong, Site]] = []

    def apart(self, plain: torch.Tensor, dim: int, unit: Names, words: str, site: Site) -> None:
        """Of a plain tensor whose `dim` is one that the axes of `unit` cut."""
        if len(self.entries) >= MOST:
            return
        wrong = Wrong(
            f"{words} met a plain tensor {tuple(plain.shape)} whose values are the same on every rank, though dim {dim} is cut over"
            f" {', '.join(unit)}: each rank has them for its own part",
            "make the full tensor, the same on every rank, and take this rank's part: mesh.scatter(full)",
        )
        self.entries.append((_digest(plain.detach(), dim), False, wrong, site))

    def alike(self, name: str, site: Site) -> None:
        """Before random numbers are drawn for a tensor that every rank holds whole."""
        if len(self.entries) >= MOST:
            return
        state = checksum(torch.get_rng_state())
        fix = "seed all ranks alike: torch.manual_seed(seed), or gingham.nn.Dropout, whose mask is the same on every rank"
        wrong = Wrong(f"{name}: random numbers for a tensor that every rank holds, from generators that are not in the same state", fix)
        self.entries.append((state, True, wrong, site))

    def compare(self, mesh: Mesh) -> tuple[Wrong, Site] | None:
        """Every rank calls it; the first that is wrong, the same on all ranks."""
        entries, self.entries = self.entries, []
        mesh.say(LABEL)
        counts = {count for (count,) in mesh.world.sizes([len(entries)])}
        if counts != {len(entries)} or not entries:
            return None  # a rank that makes other calls is told by the calls
        every = numbers_of_all(mesh, [digest for digest, *_ in entries], torch.int64)
        for index, (_, alike, wrong, site) in enumerate(entries):
            column = [digests[index] for digests in every]
            odd, usual = odd_ranks(column, mesh.ranks)
            if alike and odd:
                return Wrong(f"{wrong.what} (ranks {odd})", wrong.fix), site
            if not alike and not odd and usual:
                return wrong, site
        return None


def _digest(plain: torch.Tensor, dim: int) -> int:
    """0 where it is one value all along the dim."""
    if bool((plain == plain.narrow(dim, 0, 1)).all()):
        return 0
    return checksum(plain) or 1
