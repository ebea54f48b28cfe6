"""Indices (targets, ids) outside of their range: refused at once on the CPU, later on a GPU, where asking would make the host wait.

On a GPU the call itself goes on, with NaN where the index is wrong, and the error is raised by the next call that looks at indices, or by
one of a later step, once the device has got there. In a CUDA graph nothing is told: NaN alone shows.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from ..errors import ShapeError

_pending: deque[tuple[Any, torch.Tensor, str]] = deque()  # (event, [smallest, largest index, how many are wrong] in pinned memory, words)


def wrong_indices(index: torch.Tensor, count: int, ignored: int | None, words: str) -> torch.Tensor | None:
    """A mask of the indices outside 0..count - 1 that are not `ignored`, on a GPU; on the CPU None, and ShapeError where there is one.

    words: who asks, as "cross_entropy: rank 1: a target". Raises ShapeError for what an earlier call found on a GPU.
    """
    wrong = (index < 0) | (index >= count)
    if ignored is not None:
        wrong &= index != ignored
    words = f"{words} lies outside 0..{count - 1}" + ("" if ignored is None else f" and is not ignore_index={ignored}")
    if not index.is_cuda:
        if wrong.any():
            raise ShapeError(f"{words}: {_words(index[wrong].min(), index[wrong].max())}")
        return None
    if torch.cuda.is_current_stream_capturing():
        return wrong
    found = torch.where(wrong, index, 0)
    seen = torch.empty(3, dtype=torch.int64, pin_memory=True, device="cpu")
    seen.copy_(torch.stack([found.amin(), found.amax(), wrong.sum()]) if index.numel() else index.new_zeros(3), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _pending.append((event, seen, words))
    raise_late()
    return wrong


def _words(least: Any, most: Any) -> str:
    return f"got {int(least)}" if int(least) == int(most) else f"got {int(least)}..{int(most)}"


def raise_late() -> None:
    """Raises ShapeError for what the device has found since; asks without waiting."""
    while _pending and _pending[0][0].query():
        _, seen, words = _pending.popleft()
        least, most, count = seen.tolist()
        if count:
            _pending.clear()
            got = _words(least or most, most or least)
            raise ShapeError(f"{words}: {got}, {count} of them; found by the GPU after the call had gone on, with NaN in their place")
