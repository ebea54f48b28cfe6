"""What a GPU finds wrong in a mesh's indices while the host goes on: an error of a later call, or a warning where the mesh ends before.

Each belongs to the call that asked: its words, and the name of its layer, are that call's wherever it is raised.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ShapeError

LATE = "; found by the GPU after the call had gone on, with NaN in their place"


@dataclass(frozen=True)
class Finding:
    """event: reached once `seen` is there, in memory of the host: the smallest and the largest wrong index and how many there are;
    told(seen) makes the error."""

    event: Any
    seen: torch.Tensor
    told: Callable[[list[int]], ShapeError]

    def error(self) -> ShapeError | None:
        """None where no index was wrong."""
        seen = self.seen.tolist()
        if not seen[2]:
            return None
        made = self.told(seen)
        made.late = True  # type: ignore[attr-defined]  # has its layer's name, and takes no other's (Layer.named)
        return made


@dataclass
class Findings:
    """Of one mesh, oldest first."""

    waiting: deque[Finding] = field(default_factory=deque)

    def raise_late(self) -> None:
        """Raises ShapeError for the first call of which the device has found since that its indices are wrong; asks without waiting."""
        while self.waiting and self.waiting[0].event.query():
            error = self.waiting.popleft().error()
            if error is not None:
                raise error

    def end(self) -> None:
        """Waits for the device, and warns of what no call has told: the mesh ends."""
        errors, left = [], list(self.waiting)
        self.waiting.clear()
        for each in left:
            try:
                each.event.synchronize()
                errors.append(each.error())
            except RuntimeError as error:  # the device itself has failed
                warnings.warn(f"gingham.destroy: whether indices were right is not known: {error}", stacklevel=5)
                break
        found = [str(error) for error in errors if error is not None]
        if found:
            more = f" (and {len(found) - 1} later calls)" if len(found) > 1 else ""
            warnings.warn(f"gingham.destroy: {found[0]}{more}; no later call has told it", stacklevel=5)
