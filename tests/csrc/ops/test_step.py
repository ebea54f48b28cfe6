"""The fused step without torch: the core's own tests, and the microbenchmark's exact check over grids, sources, slices, swaps."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gingham

ROOT = Path(__file__).resolve().parents[3]
MICROBENCH = Path(gingham.__file__).parent / "bin" / "microbench"
BLAS = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"

GRIDS = ["2,2,1", "4,2,1", "2,2,2", "3,2,2", "1,3,2", "4,1,1", "1,1,4", "1,2,1", "1,1,1", "3,1,2", "1,4,3"]
TYPICAL = {"4,2,1", "3,2,2"}
SHAPES = ["37,19,53", "64,96,48", "2,1,3"]


def check(*arguments: str, blas: str = str(BLAS)) -> str:
    environment = {**os.environ, "GINGHAM_BLAS": blas, "OMP_NUM_THREADS": "1"}
    command = [str(MICROBENCH), *arguments, "--check", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"
    rows = [line.split() for line in done.stdout.splitlines() if line and not line.startswith("#")]
    assert rows and all(row[-2] == "0" and row[-5] == row[-4] for row in rows), done.stdout
    return done.stdout


@pytest.mark.parametrize("swapped", [False, True], ids=["plain", "swapped"])
@pytest.mark.parametrize(("source", "slices"), [("window", 1), ("window", 3), ("ring", 1), ("ring", 4)])
@pytest.mark.parametrize("grid", [pytest.param(grid, marks=[] if grid in TYPICAL else [pytest.mark.matrix]) for grid in GRIDS])
def test_products_are_exact_and_count_as_the_formula(grid: str, source: str, slices: int, swapped: bool) -> None:
    for case in ("matmul", "dx", "dw", "backward"):
        options = ["--grid", grid, "--source", source, "--slices", str(slices), *(["--swapped"] if swapped else [])]
        for shape in SHAPES[:1] if grid in TYPICAL else SHAPES:
            check(case, *options, "--shape", shape, "--as", "threads", blas="plain")


@pytest.mark.parametrize("source", ["window", "ring"])
def test_processes_torchs_blas_and_every_case(source: str) -> None:
    out = check("all", "--grid", "2,2,1", "--sizes", "96", "--source", source, "--slices", "2", "--as", "processes")
    assert str(BLAS) in out.splitlines()[0]
    assert all(case in out for case in ("matmul", "backward", "all_gather", "reduce_scatter", "all_reduce", "broadcast", "reduce"))


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("source", ["window", "ring"])
def test_collectives(ranks: int, source: str) -> None:
    for case in ("all_gather", "reduce_scatter", "all_reduce", "broadcast", "reduce"):
        for dtype in ("float32", "float64"):
            check(case, "--ranks", str(ranks), "--sizes", "1,7,1000,65537", "--source", source, "--dtype", dtype)


def test_a_link_counts_the_same_bytes() -> None:
    for source in ("window", "ring"):
        check(
            "backward",
            "--grid",
            "3,2,2",
            "--shape",
            "37,19,53",
            "--source",
            source,
            "--latency",
            "1e-5",
            "--bandwidth",
            "1e9",
            "--slices",
            "2",
        )


def test_a_wrong_option_is_refused() -> None:
    done = subprocess.run([str(MICROBENCH), "matmul", "--grids", "2,2,1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "microbench: unknown option --grids; see --help\n"
    told = subprocess.run([str(MICROBENCH), "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "\n  --grid PM,PN,PK " in told.stdout and max(map(len, told.stdout.splitlines())) <= 130


def build_core_tests(folder: Path, options: list[str]) -> Path:
    cmake = Path(sys.executable).with_name("cmake")
    tool = str(cmake) if cmake.exists() else shutil.which("cmake")
    if tool is None:
        pytest.skip("cmake is not installed")
    if options:
        subprocess.run([tool, "-S", str(ROOT), "-B", str(folder), *options], check=True, capture_output=True, timeout=100)
    subprocess.run([tool, "--build", str(folder), "--target", "core_tests"], check=True, capture_output=True, timeout=280)
    return folder / "core_tests"


def run_core_tests(tests: Path, *words: str) -> None:
    done = subprocess.run([str(tests), *words], env={**os.environ, "GINGHAM_BLAS": "plain"}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_cores_tests_over_hosts() -> None:
    """Of the core's own tests those in which several hosts share one process, built beside what `make build` has built."""
    folder = ROOT / "build" / f"pip-{sys.implementation.cache_tag}"
    if not (folder / "CMakeCache.txt").exists():
        pytest.skip("gingham was not built here by make build")
    run_core_tests(build_core_tests(folder, []), "over hosts")


@pytest.mark.matrix
def test_the_cores_own_tests(tmp_path: Path) -> None:
    """As `make sanitize`, without sanitizers."""
    ninja = Path(sys.executable).with_name("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja.exists() else []
    options = ["-DGINGHAM_BINDING=OFF", f"-DGINGHAM_OUTPUT={tmp_path}"]
    run_core_tests(build_core_tests(tmp_path, [*generator, *options]))
