"""DeviceMeshes of a part of the world. torch makes their process groups with every rank of the world, in one order: where each group of
ranks makes a mesh of its own, their calls meet with equal names and different members, and all wait for ever (torch 2.13). Groups of such a
mesh are made here by their members alone."""

from __future__ import annotations

import threading
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh as torchs

_making = threading.local()


def install() -> None:
    """Once, on import. Does nothing where this torch makes its meshes in another way."""
    made, new_group = torchs.DeviceMesh.__init__, getattr(torchs, "new_group", None)
    if new_group is None or hasattr(new_group, "_gingham"):
        return

    @wraps(made)
    def make(self: Any, device_type: str, mesh: Any = None, *args: Any, **kwargs: Any) -> None:
        _making.ranks = None if mesh is None else torch.as_tensor(mesh).numel()
        try:
            made(self, device_type, mesh, *args, **kwargs)
        finally:
            _making.ranks = None

    @wraps(new_group)
    def among_members(*args: Any, **kwargs: Any) -> Any:
        ranks = getattr(_making, "ranks", None)
        if ranks is not None and ranks < dist.get_world_size():
            kwargs["use_local_synchronization"] = True
        return new_group(*args, **kwargs)

    among_members._gingham = True  # type: ignore[attr-defined]
    torchs.DeviceMesh.__init__ = make  # type: ignore[method-assign]
    torchs.new_group = among_members
