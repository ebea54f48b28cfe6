"""The examples that train, in every mode, beside their serial models: the same losses, the same text, the same answers."""

import importlib.util
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GRIDS: dict[str, dict[str, Any]] = {
    "1d": dict(mode="1d", size=8),
    "2d": dict(mode="2d", size=4),
    "2.5d": dict(mode="2.5d", size=8, depth=2),
    "3d": dict(mode="3d", size=8),
    "3x2x1": dict(grid=(3, 2, 1), size=6),
    "sequence": dict(mode="sequence", size=4),
}
QUICK = {("vit_digits", "sequence"), ("gpt", "2.5d"), ("vit_digits", "3d"), ("llama", "2d")}
TEXT = str(EXAMPLES)  # the examples read themselves
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt": dict(steps=6, lr=1e-3, text=TEXT),
    "vit_digits": dict(steps=12, lr=3e-3),
    "llama": dict(steps=8, lr=1e-3, write=12, text=TEXT),
}


def run(rank: int, name: str, options: dict[str, Any], grid: dict[str, Any]) -> Any:
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(rank, Namespace(**options), {key: value for key, value in grid.items() if key != "size" or "mode" in grid})


@pytest.mark.parametrize(
    ("name", "grid"), [pytest.param(n, g, marks=[] if (n, g) in QUICK else [pytest.mark.matrix]) for n in OPTIONS for g in GRIDS]
)
def test_as_the_serial_model(ranks, name: str, grid: str) -> None:
    got, serial = ranks(GRIDS[grid]["size"])(run, name, OPTIONS[name], GRIDS[grid])[0]
    if name == "gpt":
        got, serial = (got, None), (serial, None)
    assert got[0] == pytest.approx(serial[0], rel=2e-5)
    assert got[0][-1] < got[0][0]
    assert got[1] == serial[1]


@pytest.mark.parametrize("schedule", ["1f1b", *(pytest.param(each, marks=pytest.mark.matrix) for each in ("zero_bubble", "dual"))])
def test_hybrid_as_the_serial_model(ranks, schedule: str) -> None:
    options = dict(steps=6, lr=1e-3, text=TEXT, schedule=schedule)
    got, serial = ranks(8)(run, "hybrid", options, dict(pipeline=2, data=2, tensor=dict(size=2, mode="1d")))[0]
    assert got == pytest.approx(serial, rel=2e-5) and got[-1] < got[0]


def test_zero3_on_two_hosts_as_the_serial_model(ranks) -> None:
    def on_hosts(rank: int) -> Any:
        os.environ["GINGHAM_HOST"] = "ab"[rank // 2]
        try:
            return run(rank, "zero3", options, parallel)
        finally:
            del os.environ["GINGHAM_HOST"]

    options = dict(steps=4, lr=3e-3, text=TEXT)
    parallel = dict(data=dict(size=2, shard="all"), tensor=dict(size=2, mode="1d"))
    answers = ranks(4)(on_hosts)
    got, serial, _ = answers[0]
    assert got == pytest.approx(serial, rel=2e-5) and got[-1] < got[0]
    assert all(held < 0.3 for _, _, held in answers)


def test_command_line() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(EXAMPLES / "gpt.py"), "--ranks", "2", "--mode", "1d", "--steps", "2", "--text", TEXT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert "serial" in done.stdout and "Mesh(tp=2" in done.stdout
