"""When a weight gradient is summed over depth: at once, or behind the rest of the backward pass."""

from __future__ import annotations

from typing import Any

import torch

from .mesh import Mesh


def may_reduce_later(mesh: Mesh, weight: torch.Tensor) -> bool:
    return False


def reduce_later(mesh: Mesh, weight: torch.Tensor, gradient: Any) -> None:
    raise NotImplementedError
