"""Rung 3: the kernels' very source, run on a CPU by the host shim (tests/cuda/shim) and compared with float64.

It shows indexing, bounds and races. It does not run what nvcc made of the source, and nothing here was tested on a GPU.
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cuda import nvcc, shim_build

pytestmark = [
    pytest.mark.skipif(nvcc.toolkit() is None, reason="no nvcc: the shim needs the toolkit's headers"),
    pytest.mark.timeout(1800),
]


def run(program: Path, *arguments: str) -> str:
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, env=os.environ | shim_build.ENVIRONMENT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def test_kernels_under_address_and_undefined_behaviour_sanitizers() -> None:
    """The quick subset, cp.async landing late and early."""
    program = shim_build.build("address")
    with ThreadPoolExecutor(2) as pool:  # gemm takes as long as all others
        assert all(said.endswith("ok\n") for said in pool.map(lambda which: run(program, which, "gemm"), ("--only", "--not")))


@pytest.mark.matrix
def test_kernels_on_every_shape_and_layout() -> None:
    assert run(shim_build.build("plain"), "--full").endswith("ok\n")
    assert run(shim_build.build("plain"), "--only", "gemm", "--seeds", "4").endswith("ok\n")


@pytest.mark.matrix
def test_kernels_on_every_shape_under_address_sanitizer() -> None:
    """All but gemm's orientations, which take a quarter of an hour; the quick subset has them on five shapes."""
    program = shim_build.build("address")
    for part in ("cast", "accumulate", "epilogue", "gemm tiles", "gemm tails"):
        assert run(program, "--full", "--only", part).endswith("ok\n")


@pytest.mark.matrix
def test_kernels_under_thread_sanitizer() -> None:
    """Every CUDA thread is a thread to it; only barriers order them."""
    program = shim_build.build("thread")
    provoked = subprocess.run([str(program), "--only", "provoked"], capture_output=True, text=True, env=os.environ | shim_build.ENVIRONMENT)
    assert provoked.returncode != 0 and "data race" in provoked.stderr, "ThreadSanitizer does not see CUDA threads race"
    for part in (
        "gemm tiles",
        "column_sums",
        "cast",
        "layer_norm",
        "cross_entropy",
        "embedding",
        "indices",
        "dropout",
        "attention",
    ):
        assert run(program, "--only", part).endswith("ok\n")
