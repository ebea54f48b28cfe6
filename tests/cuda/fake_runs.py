"""What is run on fake devices by more than one module: the Python tests, a training run beside its serial twin, faults of ranks.

`environment` adds to fake_build.package_environment, for instance another library in NCCL's place.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import on_gpu
from cuda import fake_build, nvcc

FAULTS = Path(__file__).parent / "fake" / "faults.py"
RINGS = ("the_ring_against_float64", "dropout_by_global_index_and_second_gradients")
PYTHON_TESTS = {
    "products": ["tests/python/test_factorisations.py", "tests/python/test_functional.py"],
    "model": ["tests/python/test_gpt.py"],
    "lookups": [f"tests/python/{name}.py" for name in ("nn/test_embedding", "nn/test_loss", "test_indices")],
    "rings": [f"tests/python/nn/test_ring.py::test_{name}" for name in RINGS],
}
NAMED = """agreement data ending faults gradients hybrid_options indices memory_at_rest operations optimizers parallel_config
planner_hybrids ranges second_order train training_tools versions writes acceptance bad_input checked checked_trials fork mesh meshes spawn
transforms limits partials"""
# Minutes together. Not in them: cli (no microbenchmark is built over the fakes), checksums, compare, layout, planner, planner_models and
# defects_of_peers (they ask for no device), hosts/ and integrations/.
LONG_TESTS = {
    "checkpoints": sorted(str(path.relative_to(nvcc.ROOT)) for path in nvcc.ROOT.glob("tests/python/test_checkpoint*.py")),
    "hybrids": ["tests/python/test_hybrids.py"],
    "pipelines": sorted(str(path.relative_to(nvcc.ROOT)) for path in nvcc.ROOT.glob("tests/python/test_pipeline*.py")),
    "converted pipelines": [f"tests/python/convert/test_{name}.py" for name in ("pipelines", "pipeline_masks")],
    "layers": sorted(str(path.relative_to(nvcc.ROOT)) for path in nvcc.ROOT.glob("tests/python/nn/test_*.py")),
    "the rest": [f"tests/python/test_{name}.py" for name in NAMED.split()],
}
# What is done with large messages only is done with all of them: weights gathered early, sums in pieces.
SMALL = {"GINGHAM_EARLY_BYTES": "0", "GINGHAM_CHUNK_BYTES": "256"}
TRAIN = "--ranks 8 --mode 2.5d --depth 2 --device cuda --steps 3 --layers 2 --width 64 --context 32 --sample 0 --plot= --compare-serial"


def same_gpu(package: Path) -> dict[str, str]:
    """All ranks on one fake GPU."""
    return {"GINGHAM_NCCL": str(package / "gingham" / "libsamegpu.so"), "FAKE_CUDA_DEVICES": "1"}


def run(command: list[str], environment: dict[str, str], limit: float = 600) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit, cwd=nvcc.ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def python_tests(package: Path, names: list[str], marks: str, limit: float = 600, **environment: str) -> str:
    """These tests on the fake GPUs. Skipped is what on_gpu.left_out names, and nothing else."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-m", marks, *names]
    told = fake_build.package_environment(package, FAKE_NCCL_ONE_AT_A_TIME="1", COLUMNS="500", **SMALL, **environment)
    out = run(command, told, limit)
    print(out.splitlines()[-1])
    skips, reasons = [line for line in out.splitlines() if line.startswith("SKIPPED")], {on_gpu.WINDOWS, *on_gpu.LEFT_OUT.values()}
    assert " passed" in out and all(any(reason in line for reason in reasons) for line in skips), out[-5000:]
    assert bool(skips) == (" skipped" in out.splitlines()[-1]), out[-5000:]
    return out


def train(package: Path, **environment: str) -> None:
    """The main job on 8 fake GPUs in 2.5d: losses of torch.nn's within rounding, bytes equal to the formula."""
    told = fake_build.package_environment(package, FAKE_NCCL_ONE_AT_A_TIME="1", COLUMNS="200", **SMALL, **environment)
    out = run([sys.executable, "-m", "gingham", "train", *TRAIN.split()], told)
    largest = re.search(r"largest of all.*?([0-9.e-]+) relative", out)
    assert largest and float(largest[1]) < 1e-6 and re.search(r"received a rank and step +[\d.]+ [KM]B +equal to the formula", out), out


def survivors(package: Path, fault: str, expected: str, **environment: str) -> list[Any]:
    """[error, named rank, seconds] of the ranks that outlived the fault: at least three, of the type expected, soon."""
    began = time.monotonic()
    out = run([sys.executable, str(FAULTS), fault], fake_build.package_environment(package, **environment), limit=120)
    seen = json.loads(out.splitlines()[-1])
    print(f"{fault}: {time.monotonic() - began:.1f} s, {seen}")
    others = [other for other in seen if other is not None]
    assert len(others) >= 3 and all(kind == expected for kind, _, _ in others), seen
    assert all(seconds < 8 for _, _, seconds in others), seen
    return others
