"""Indices (targets, ids) outside of their range: refused at once on the CPU, later on a GPU, where asking would make the host wait.

On a GPU the call goes on, with NaN where the index is wrong, and the error is raised by the first call that looks at indices once the
device has got there: the call itself, or one of a later step. In a CUDA graph nothing is told: NaN alone shows.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from ..errors import ShapeError

_pending: deque[tuple[Any, torch.Tensor, str]] = deque()  # (event, [smallest, largest index, how many are wrong] in pinned memory, words)


def refuse_indices(index: torch.Tensor, count: int, ignored: int | None, words: str) -> None:
    """Raises ShapeError where an index lies outside 0..count - 1 and is not `ignored`; on a GPU the host waits for the answer.

    words: who asks, as "cross_entropy: rank 1: a target".
    """
    wrong = _outside(index, count, ignored)
    if wrong.any():
        raise ShapeError(f"{_rule(count, ignored, words)}: {_got(index[wrong].min(), index[wrong].max())}")


def wrong_indices(index: torch.Tensor, count: int, ignored: int | None, words: str) -> torch.Tensor | None:
    """On the CPU refuse_indices, and None. On a GPU a mask of those indices; raises ShapeError for what an earlier call found."""
    if not index.is_cuda:
        refuse_indices(index, count, ignored, words)
        return None
    wrong = _outside(index, count, ignored)
    if torch.cuda.is_current_stream_capturing():
        return wrong
    found = torch.where(wrong, index, 0)
    seen = torch.empty(3, dtype=torch.int64, pin_memory=True, device="cpu")
    seen.copy_(torch.stack([found.amin(), found.amax(), wrong.sum()]) if index.numel() else index.new_zeros(3), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _pending.append((event, seen, _rule(count, ignored, words)))
    raise_late()
    return wrong


def _outside(index: torch.Tensor, count: int, ignored: int | None) -> torch.Tensor:
    wrong = (index < 0) | (index >= count)
    return wrong if ignored is None else wrong & (index != ignored)


def _rule(count: int, ignored: int | None, words: str) -> str:
    return f"{words} lies outside 0..{count - 1}" + ("" if ignored is None else f" and is not ignore_index={ignored}")


def _got(least: Any, most: Any) -> str:
    return f"got {int(least)}" if int(least) == int(most) else f"got {int(least)}..{int(most)}"


def raise_late() -> None:
    """Raises ShapeError for what the device has found since; asks without waiting."""
    while _pending and _pending[0][0].query():
        _, seen, words = _pending.popleft()
        least, most, count = seen.tolist()
        if count:
            _pending.clear()
            got = _got(least or most, most or least)
            raise ShapeError(f"{words}: {got}, {count} of them; found by the GPU after the call had gone on, with NaN in their place")
