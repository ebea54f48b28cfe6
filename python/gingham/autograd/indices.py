"""Indices (targets, ids) outside of their range: refused at once on the CPU, later on a GPU, where asking would make the host wait.

On a GPU the call goes on, with NaN where the index is wrong, and the error is raised by the first call on the mesh that looks at indices
once the device has got there; gingham.destroy warns of what none has told. In a CUDA graph nothing is told: NaN alone shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .. import native
from ..errors import ShapeError
from ..mesh import Mesh
from ..mesh.findings import LATE, Finding

Named = Callable[[ShapeError], ShapeError]


def whole(index: torch.Tensor) -> torch.Tensor:
    """As the core reads indices."""
    return index.long().contiguous()


def refuse_indices(mesh: Mesh, index: torch.Tensor, count: int, ignored: int | None, words: str, named: Named | None = None) -> None:
    """Raises ShapeError where an index lies outside 0..count - 1 and is not `ignored`; on a GPU the host waits for the answer.

    words: who asks, as "cross_entropy: rank 1: a target"; named: puts a layer's name before the error's words.
    """
    seen = _found(mesh, index, count, ignored).tolist()
    if seen[2]:
        raise _told(count, ignored, words, named, "", seen)


def check_indices(mesh: Mesh, index: torch.Tensor, count: int, ignored: int | None, words: str, named: Named | None = None) -> None:
    """On the CPU refuse_indices. On a GPU raises ShapeError for what an earlier call found, and has the device look at these."""
    if not index.is_cuda:
        refuse_indices(mesh, index, count, ignored, words, named)
        return
    if torch.cuda.is_current_stream_capturing():
        return
    mesh.findings.raise_late()
    seen = torch.empty(3, dtype=torch.int64, pin_memory=True, device="cpu")
    seen.copy_(_found(mesh, index, count, ignored), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    mesh.findings.waiting.append(Finding(event, seen, partial(_told, count, ignored, words, named, LATE)))


def _found(mesh: Mesh, index: torch.Tensor, count: int, ignored: int | None) -> torch.Tensor:
    return native.find_wrong(mesh.program, whole(index), count, 0 if ignored is None else ignored)  # 0 is never wrong


def _told(count: int, ignored: int | None, words: str, named: Named | None, late: str, seen: list[int]) -> ShapeError:
    least, most, wrong = seen
    rule = f"{words} lies outside 0..{count - 1}" + ("" if ignored is None else f" and is not ignore_index={ignored}")
    got = f"got {least}" if least == most else f"got {least}..{most}"
    error = ShapeError(f"{rule}: {got}" + (f", {wrong} of them{late}" if late else ""))
    return error if named is None else named(error)
