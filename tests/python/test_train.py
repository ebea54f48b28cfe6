"""The main job in small, in every mode: the serial loss curve, the bytes of the formula, and the command itself."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import theory
from grids import MODES, words_of

SMALL = dict(
    device=None, layers=2, width=64, heads=8, context=16, batch=12, steps=3, lr=3e-4, seed=1, text=None, sample=4, save=None, resume=None
)


def options(**changed: Any) -> Namespace:
    return Namespace(**(SMALL | changed))


def curve(rank: int, chosen: Namespace, grid: dict[str, Any]) -> dict[str, Any]:
    from gingham.commands import train

    return train.run(rank, chosen, grid)


def serial(chosen: Namespace, microbatches: int = 1) -> dict[str, Any]:
    from rich.console import Console

    from gingham.commands import train

    return train.train_serial(chosen, Console(quiet=True), microbatches)


@pytest.mark.parametrize("grid", MODES, ids=words_of)
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.matrix), 0.1])
def test_losses_and_bytes(ranks, grid: dict[str, Any], dropout: float) -> None:
    chosen = options(dropout=dropout)
    report = ranks(grid["size"])(curve, chosen, grid)[0]
    expected = serial(chosen)["losses"]
    assert report["losses"] == pytest.approx(expected, rel=1e-5)
    received = sum(rank["received"] for rank in report["ranks"])
    assert received == report["formula"] * grid["size"]
    cost = theory.GPT(chosen.layers, chosen.width, context=chosen.context).step(theory.Grid.of(**grid), chosen.batch)
    assert received == sum(cost.words.values())
    assert len(report["sample"]) >= 4


HYBRIDS: list[Any] = [
    dict(mode="1d", ranks=4, data=2, zero=1),
    dict(ranks=8, pipeline=2, data=2, zero=3, schedule="zbv", microbatches=5),
    *(
        pytest.param(each, marks=pytest.mark.matrix)
        for each in (
            dict(ranks=3, data=3),
            dict(mode="2d", ranks=8, data=2, zero=3),
            dict(grid=(1, 2, 1), data=3, zero=2),
            dict(mode="sequence", ranks=4, data=2, microbatches=2),
            dict(mode="sequence", ranks=3),
            dict(mode="sequence", ranks=8, pipeline=2, data=2, zero=3, microbatches=5),
            dict(mode="sequence", ranks=6, pipeline=2, schedule="dual", microbatches=4),
            dict(mode="2d", ranks=4, microbatches=5),
            dict(mode="1d", sequence=True, ranks=4, data=2, zero=1, microbatches=5),
            dict(mode="1d", sequence=True, ranks=8, pipeline=2, data=2, zero=1, schedule="dual"),
            dict(mode="2d", ranks=8, pipeline=2, schedule="interleaved", microbatches=4),
            dict(mode="2.5d", depth=4, ranks=8, pipeline=2, schedule="zero_bubble"),
            dict(grid=(1, 2, 2), pipeline=2, schedule="gpipe", microbatches=5),
            dict(grid=(2, 1, 1), pipeline=2, data=3, zero=2, microbatches=4),
            dict(ranks=6, pipeline=3, data=2, schedule="1f1b", microbatches=5),
        )
    ),
]


@pytest.mark.parametrize("given", HYBRIDS, ids=str)
def test_losses_and_bytes_of_hybrids(ranks, given: dict[str, Any]) -> None:
    """Also of those that cut a batch of 12 into micro-batches of unequal size."""
    from gingham.commands.arguments import mesh_arguments, parts_in, stage_axes, stages_in

    none = dict(ranks=0, mode=None, grid=None, depth=0, sequence=False, data=1, zero=0, pipeline=1, schedule=None, microbatches=0)
    chosen = options(dropout=0.1, layers=3, **(none | given))
    grid = mesh_arguments(chosen)
    size = stages_in(grid) * stage_axes(grid).size
    report = ranks(size)(curve, chosen, grid)[0]
    assert report["losses"] == pytest.approx(serial(chosen, parts_in(grid))["losses"], rel=1e-5)
    assert sum(rank["received"] for rank in report["ranks"]) == report["formula"] * size
    assert len(report["sample"]) >= 4


@pytest.mark.matrix
def test_a_run_goes_on_on_another_hybrid(ranks, tmp_path: Path) -> None:
    stages = dict(pipeline=dict(size=2, schedule="zbv", microbatches=4), data=2, shard="all", mode="1d", size=2)
    chosen = dict(dropout=0.1, layers=4, sample=0, save=str(tmp_path / "run"))
    first = ranks(8)(curve, options(**chosen), stages)[0]
    others = dict(mode="2d", size=4, pipeline=dict(size=1, schedule="1f1b", microbatches=4))
    rest = ranks(4)(curve, options(**(chosen | dict(steps=6, resume=chosen["save"]))), others)[0]
    assert rest["first"] == 3
    assert first["losses"] + rest["losses"] == pytest.approx(serial(options(**(chosen | dict(steps=6))), 4)["losses"], rel=1e-5)


def test_a_long_run_learns_in_the_default_mode(ranks) -> None:
    report = ranks(8)(curve, options(dropout=0.1, steps=30, lr=3e-3, sample=0), dict(mode="2.5d", size=8, depth=2))[0]
    assert report["losses"][-1] < report["losses"][0] - 1.5


@pytest.mark.parametrize(
    "launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]], ids=["spawn", "torchrun"]
)
def test_command(launcher: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cloth with the checked grid, warp and weft. " * 50)
    size = ["--layers", "1", "--width", "32", "--heads", "4", "--context", "16", "--batch", "4", "--steps", "4", "--sample", "8"]
    chosen = ["--mode", "2d", "--text", str(text), "--plot", str(tmp_path / "loss.png"), "--compare-serial"]
    command = [sys.executable, *launcher, "-m", "gingham", "train", *chosen, *size]
    if not launcher:
        command += ["--ranks", "4"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | {"COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loss.png").stat().st_size > 1000
    result = done.stdout.rpartition(" result ")[2]
    assert re.search(r"received a rank and step +[\d.]+ [KM]B +equal to the formula", result), result
    assert re.search(r"optimizer state +[\d.]+ [KM]B", result) and not re.search(r"\d,\d{3}|\d{7}", result), result  # bytes have units
    assert "largest of all steps" in done.stdout and "def " in done.stdout
