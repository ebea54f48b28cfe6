"""The published example prints the published shapes, started by hand and by torchrun."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gingham

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mlp.py"
SHAPES = [
    "input: (4, 128)",
    "weight of the first linear layer: (512, 128)",
    "output of the first linear layer: (4, 512)",
    "weight of the second linear layer: (128, 512)",
    "output of the second linear layer: (4, 128)",
    "gradient of the first weight: (512, 128)",
]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([], id="spawn"),
        pytest.param(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"], id="torchrun", marks=pytest.mark.matrix),
    ],
)
def test_shapes(launcher: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, *launcher, str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    for line in SHAPES:
        assert line in done.stdout


def shapes_and_error(rank: int, swapped: bool) -> tuple[list[tuple[int, ...]], float]:
    """The published MLP with its second layer swapped or not: local shapes, and the output's error against torch.nn."""
    mesh = gingham.init(mode="2.5d", size=8, depth=2)
    torch.manual_seed(0)
    first, second = gingham.nn.Linear(256, 1024), gingham.nn.Linear(1024, 256, swapped=swapped)
    torch.manual_seed(0)
    serial = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256)).double()
    full = torch.randn(16, 256)
    x = mesh.scatter(full)
    hidden = first(x)
    y = second(torch.nn.functional.gelu(hidden))
    expected = serial(full.double())
    error = float((mesh.gather(y) - expected).norm() / expected.norm())
    tensors = [x, first.weight.to_local(), hidden, second.weight.to_local(), y]
    gingham.destroy()
    return [tuple(t.shape) for t in tensors], error


@pytest.mark.parametrize("swapped", [False, True])
def test_local_shapes(ranks: Any, swapped: bool) -> None:
    for shapes, error in ranks(8)(shapes_and_error, swapped):
        assert shapes == [(4, 128), (512, 128), (4, 512), (128, 512), (4, 128)]
        assert error < 1e-6
