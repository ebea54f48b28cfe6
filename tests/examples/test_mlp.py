"""The published example prints the published shapes, started by hand and by torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    "launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]], ids=["spawn", "torchrun"]
)
def test_shapes(launcher: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, *launcher, str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    for line in SHAPES:
        assert line in done.stdout
