"""Plain parameters that an optimizer moves beside those of a mesh: their gradients must be the same on every rank.

Behind a model's whole outputs they are. On what a rank has of its own, its samples on a mesh with data, or rows of `mesh.scatter`, each
rank has another gradient, and nobody sums them. At the first step that has any, norms and projections are compared: a control message
of 8 bytes and one of 16 bytes for each such parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..errors import MeshError
from ..mesh import mesh_of
from ..mesh.carried import numbers_of_all

COMPARED = "_gingham_compared"  # on an optimizer: the number of its parameters when their gradients were compared
TOLERANCE = 1e-3  # relative; machines of several kinds round in their own ways


def begin(optimizer: torch.optim.Optimizer) -> None:
    """Before a step. Raises MeshError as compare does."""
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if optimizer.__dict__.get(COMPARED) != count and compare(optimizer):
        optimizer.__dict__[COMPARED] = count


def compare(optimizer: torch.optim.Optimizer) -> bool:
    """Whether there is nothing left to compare. Raises MeshError, on every rank, for a gradient that differs between ranks."""
    named = [pair for group in optimizer.param_groups for pair in _named(group)]
    cut = next((p for _, p in named if isinstance(p, DTensor) and mesh_of(p) is not None), None)
    plain = [(name, p) for name, p in named if not isinstance(p, DTensor) and p.requires_grad]
    mesh = None if cut is None else mesh_of(cut)
    if mesh is None or mesh.size == 1 or not plain:
        return True
    mesh.say(f"{type(optimizer).__name__}.step: plain parameters")
    held = [count for (count,) in mesh.world.sizes([len(plain)])]
    if len(set(held)) > 1:
        raise MeshError(f"{type(optimizer).__name__}.step: rank {mesh.rank}: the ranks' optimizers have {held} plain parameters")
    mine = [value for _, p in plain for value in _seen(p.grad)]
    told = numbers_of_all(mesh, mine)
    for index, (name, p) in enumerate(plain):
        pairs = [theirs[2 * index : 2 * index + 2] for theirs in told]
        odd = next((rank for rank, pair in enumerate(pairs) if _apart(pair, pairs[0])), None)
        if odd is not None:
            norms = [f"{pairs[rank][0]:.4g} on rank {mesh.ranks[rank]}" for rank in (0, odd)]
            raise MeshError(
                f"{type(optimizer).__name__}.step: {name}, a plain tensor of shape {tuple(p.shape)} beside parameters on a mesh, has"
                f" another gradient on each rank, of norm {' and '.join(norms)}: they are of the ranks' own samples, and nobody sums them."
                " Put its module into the one that gingham.parallelize gets, or sum them before the step; where ranks shall differ, give"
                " such parameters an optimizer of their own"
            )
    return any(value >= 0 for value in mine[::2])


def _named(group: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    names = group.get("param_names") or [f"parameter {index}" for index in range(len(group["params"]))]
    return list(zip(names, group["params"], strict=True))


def _seen(grad: torch.Tensor | None) -> tuple[float, float]:
    """A gradient's norm, -1 where there is none, and its projection on numbers that no symmetry hides."""
    if grad is None:
        return -1.0, 0.0
    dense = (grad.to_dense() if grad.is_sparse else grad).detach()
    flat = (torch.view_as_real(dense) if dense.is_complex() else dense).flatten().double()
    return float(flat.norm()), float(flat @ torch.arange(len(flat), dtype=flat.dtype, device=flat.device).cos())


def _apart(one: list[float], other: list[float]) -> bool:
    if any(value != value for value in (*one, *other)):
        return (one[0] != one[0]) != (other[0] != other[0])
    return any(abs(a - b) > TOLERANCE * max(one[0], other[0], 1e-30) for a, b in zip(one, other, strict=True))
