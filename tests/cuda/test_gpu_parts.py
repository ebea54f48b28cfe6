"""bench/gpu.sh and bench/gpu/run.py without a GPU: how parts end, what the budget leaves out, what the list predicts."""

import importlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda import nvcc

GPU = nvcc.ROOT / "bench" / "gpu"


@pytest.fixture(scope="module")
def runner() -> Any:
    sys.path.insert(0, str(GPU))
    try:
        yield importlib.import_module("run")
    finally:
        sys.path.remove(str(GPU))
        for name in ("run", "parts"):
            sys.modules.pop(name, None)


def ended(runner: Any, *command: str, limit: int = 20, room: float = 100, name: str = "a part") -> dict[str, Any]:
    found: dict[str, Any] = runner.run(runner.Part(name, list(command), limit), room, io.StringIO())
    return found


def test_how_a_part_ends(runner: Any) -> None:
    wrong = json.dumps({"name": "x", "value": 2.0, "bound": 1.0, "unit": "", "right": False})
    good = ended(runner, sys.executable, "-c", f"print('ROW ' + {wrong.replace('false', 'true')!r})")
    assert not good["ended"] and not good["wrong"] and runner.state(good).startswith("ok ") and "1/1 checks" in runner.state(good)
    bad = ended(runner, sys.executable, "-c", f"print('ROW ' + {wrong!r}); print('ROW {{\"name\": ')")
    assert not bad["ended"] and bad["wrong"] == 2 and runner.state(bad).startswith("FAILED"), bad
    assert any("a row that was cut off" in line for line in runner.shown(bad))
    assert ended(runner, sys.executable, "-c", "raise SystemExit(3)")["ended"] == "status 3"
    assert ended(runner, "no-such-tool", "x")["ended"] == "no-such-tool is not here"


def test_a_part_cannot_hold_up_the_run(runner: Any, tmp_path: Path) -> None:
    """Neither by running on, nor by what it leaves behind with its output open."""
    began = time.monotonic()
    late = ended(runner, sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)", limit=1)
    assert late["ended"] == "ran past its limit" and late["tail"] == ["begun"]
    assert ended(runner, "sleep", "60", limit=60, room=5.5)["ended"] == "ran past the 5 s that were left"
    left = ended(runner, "sh", "-c", f"sleep 60 & echo $! > {tmp_path / 'pid'}")
    assert left["ended"] == "" and time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        end = time.monotonic() + 5
        while time.monotonic() < end:
            stat = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
            if not stat.exists() or ") Z" in stat.read_text():
                raise ProcessLookupError
            time.sleep(0.05)


def test_what_does_not_fit_is_named(runner: Any) -> None:
    assert ended(runner, "true", room=4)["ended"] == runner.NO_TIME
    assert ended(runner, "true", room=30, name="machine")["ended"] == ""
    assert ended(runner, "true", room=11, name="machine")["ended"] == runner.NO_TIME, "it takes 11.4 s"


def test_the_list_predicts(runner: Any) -> None:
    """What was measured is of parts that there are, within their limits; the first command ends within 10 minutes with its build."""
    parts = importlib.import_module("parts")
    truth, long = parts.truth_parts(), parts.long_parts()
    every = [part.name for part in [*truth, *long, *parts.several_gpus(8)]]
    assert len(set(every)) == len(every) and set(parts.MEASURED) <= set(every)
    assert all(part.measured is None or part.measured < 0.8 * part.limit for part in truth)
    assert sum(part.predicted for part in truth) + parts.BUILD < 575
    done = subprocess.run([sys.executable, str(GPU / "run.py"), "long", "--list"], capture_output=True, text=True)
    assert done.returncode == 0 and f"their limits, for {len(long)} that no GPU has timed" in done.stdout, done.stdout + done.stderr


@pytest.mark.matrix
def test_parts_of_tests_have_some(runner: Any) -> None:
    """A choice that leaves nothing over ends with status 5 on the GPU."""
    every = [part for part in [*runner.parts_of("truth"), *runner.parts_of("long")] if "pytest" in part.command]
    assert len(every) == 9
    for part in every:
        environment = os.environ | part.environment | {"PYTHONPATH": f"{nvcc.ROOT / 'python'}:{nvcc.ROOT / 'tests'}"}
        done = subprocess.run([*part.command, "--collect-only"], capture_output=True, text=True, env=environment, cwd=nvcc.ROOT)
        assert done.returncode == 0, (part.name, done.stdout[-1000:])


def gpu_sh(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(nvcc.ROOT / "bench" / "gpu.sh"), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": ""} | environment,
        timeout=120,
    )


def test_the_command_up_to_the_device(tmp_path: Path) -> None:
    """A machine that says it has a GPU and has none: parts come to their first device call and fail; none computes on the CPU instead."""
    stub = tmp_path / "bin" / "nvidia-smi"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 'GPU 0: a stub'\n")
    stub.chmod(0o755)
    path = os.pathsep.join([str(stub.parent), os.environ["PATH"]])
    done = gpu_sh(tmp_path, "truth", "--built", "--only", "stand-in for NCCL: abort,layers", PATH=path)
    (first, second, third) = json.loads((tmp_path / "out" / "gpu_truth.json").read_text())
    assert done.returncode == 3 and [each["ended"] for each in (first, second, third)] == ["status 1"] * 3, done.stdout
    assert first["part"] == "layers, sm_80 kernels" and first["rows"] and all(each["right"] is False for each in first["rows"]), first
    said = str(first["rows"])
    assert any(word in said for word in ("no CUDA device is visible", "built without CUDA")), said
    assert "0 of 3 parts as they should be, 3 not" in done.stdout.splitlines()[-1]
    # with a Python that lacks what the parts import nothing is run
    lacking = gpu_sh(tmp_path, "truth", "--built", PATH=path, PYTHON=str(bare(tmp_path)))
    assert lacking.returncode == 2 and "lacking: torch" in lacking.stderr and "PYTHON=" in lacking.stderr, lacking.stderr


def bare(tmp_path: Path) -> Path:
    """A Python that sees no packages."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    script.chmod(0o755)
    return script


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path)
    assert done.returncode == 2 and "no NVIDIA GPU here, nothing was run" in done.stderr and not (tmp_path / "out").exists()
