"""The meshes that tests run on, and the few words they share. Imports nothing of gingham."""

from typing import Any

import pytest
import torch

GRIDS: dict[str, dict[str, Any]] = {
    "one": dict(),
    "1d": dict(mode="1d", size=4),
    "1d sequence": dict(mode="1d", size=4, sequence=True),
    "2d": dict(mode="2d", size=4),
    "2.5d": dict(mode="2.5d", size=8, depth=2),
    "2.5d sharded": dict(mode="2.5d", size=8, depth=2, shard_depth=True),
    "3d": dict(mode="3d", size=8),
    "3x2x2": dict(grid=(3, 2, 2), size=12),
    "1x3x2": dict(grid=(1, 3, 2), size=6),
    "1x1x2": dict(grid=(1, 1, 2), size=2),
}

# beside data: the ranks of a replica, and what parallel=dict(tensor=) says of them
TENSOR: dict[str, tuple[int, dict[str, Any]]] = {
    "none": (1, dict(size=1)),
    "1d": (2, dict(size=2, mode="1d")),
    "1d sequence": (2, dict(size=2, mode="1d", sequence=True)),
    "2d": (4, dict(size=4, mode="2d")),
    "2.5d": (4, dict(size=4, mode="2.5d", depth=4)),
    "2.5d of 8": (8, dict(size=8, mode="2.5d", depth=2)),
    "2.5d sharded": (4, dict(size=4, mode="2.5d", depth=4, shard_depth=True)),
    "3d": (8, dict(size=8, mode="3d")),
    "1x2x1": (2, dict(grid=(1, 2, 1))),
    "1x1x2": (2, dict(grid=(1, 1, 2))),
    "1x2x2": (4, dict(grid=(1, 2, 2))),
    "2x2x1": (4, dict(grid=(2, 2, 1))),
    "2x1x1": (2, dict(grid=(2, 1, 1))),
    "sequence": (2, dict(size=2, mode="sequence")),
    "sequence of 3": (3, dict(size=3, mode="sequence")),
}

# the whole model's meshes
MODES: list[dict[str, Any]] = [
    dict(mode="1d", size=4),
    dict(mode="1d", size=4, sequence=True),
    dict(mode="2d", size=4),
    dict(mode="2.5d", size=8, depth=2),
    dict(mode="2.5d", size=8, depth=2, shard_depth=True),
    dict(mode="3d", size=8),
    dict(grid=(3, 2, 1), size=6),
    dict(grid=(1, 2, 4), size=8),
]


def words_of(grid: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in grid.items())


# `make test` takes those that differ most; `make test-all` takes every one
TYPICAL = ("1d", "1d sequence", "2.5d", "2.5d sharded", "3x2x2")


def grids(*quick: str) -> Any:
    """Every mesh by its name; all but those named in `make test-all` only."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in quick else [pytest.mark.matrix]) for name in GRIDS])


every_grid = grids(*TYPICAL)


def ranks_of(name: str) -> int:
    return GRIDS[name].get("size", 1)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Error in the Frobenius norm, relative to the expected; shapes must agree."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-300)) if expected.numel() else 0.0


def whole(x: torch.Tensor) -> torch.Tensor:
    """The full tensor of a DTensor; others as they are."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
