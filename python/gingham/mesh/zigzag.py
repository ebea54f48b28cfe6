"""The order "zigzag" of a sequence that ranks cut: a rank has a piece from the front and one from the back of it.

Under a causal mask a query sees all before it, so that ranks with pieces in order have unequal work: 2 - 1/r of the mean for the last of r.
The sequence a0 a1 .. b1 b0 lies as (a0, b0), (a1, b1), ..: as many places a rank as in order, the first half of them, rounded up, from
the front. Example, 8 places on 2 ranks: 0, 1, 6, 7 and 2, 3, 4, 5.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ShapeError
from .layout import chunks, runs


def is_zigzag(order: str | None, what: str, mesh: Any) -> bool:
    """Raises ShapeError for an order that is neither None nor "zigzag"."""
    if order not in (None, "zigzag"):
        raise ShapeError(f"{what}: rank {mesh.rank} got order={order!r}, expected None or 'zigzag'")
    return order is not None


def places_of(time: int, pieces: list[int]) -> torch.Tensor:
    """Where the places of a sequence come from that axes of so many ranks cut: x.index_select(dim, places) lies in the order."""
    lengths = chunks(time, pieces)
    every = [run for place in range(len(lengths)) for run in runs(lengths, place, True)]
    return torch.cat([torch.arange(start, start + count, device="cpu") for start, count in every])


def back_of(places: torch.Tensor) -> torch.Tensor:
    """The way back."""
    back = torch.empty_like(places)
    back[places] = torch.arange(len(places), device=places.device)
    return back
