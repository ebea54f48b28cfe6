"""What carries messages between GPUs, and what they brought, on the host."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import native

if TYPE_CHECKING:
    from .mesh import Mesh

ENGINES = "copy engines"


def carried_by(axes: Mapping[str, native.Axis], tell: bool) -> dict[str, str]:
    """By communicator: "copy engines", or "NCCL" and why not those. tell: warns where GINGHAM_COPY_ENGINES asks for them and they are
    not had."""
    found = {key: axis.carried_by for key, axis in axes.items()}
    left = [f"{key}: {by}" for key, by in found.items() if by != ENGINES and axes[key].size > 1]
    if tell and left and os.environ.get("GINGHAM_COPY_ENGINES", "0") not in ("", "0"):
        warnings.warn(f"GINGHAM_COPY_ENGINES is set, but messages do not go by copy engines over {'; '.join(left)}", stacklevel=3)
    return found


def on_host(mesh: Mesh, x: torch.Tensor) -> torch.Tensor:
    """x, which messages brought, for the host to go by. Raises the job's error where that broke them off: on GPUs streams then go on, and
    what is in x is anything."""
    found = x.cpu()
    if mesh.job.has_gpu:
        mesh.program.hear()
    return found


def numbers_of_all(mesh: Mesh, numbers: Sequence[float], dtype: torch.dtype = torch.float64) -> list[list[Any]]:
    """Every rank's numbers, as many on each, for the host to go by. 8 bytes a number and rank, not counted as traffic."""
    mine = torch.tensor(numbers, dtype=dtype, device=mesh.device)
    return [on_host(mesh, part).tolist() for part in mesh.world.all_gather(mine, counted=False)]
