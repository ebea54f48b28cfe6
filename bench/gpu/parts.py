"""The parts of bench/gpu.sh: what each runs, the limit that it runs under, and what it is known to take."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = os.environ.get("GINGHAM_MICROBENCH", str(ROOT / "python" / "gingham" / "bin" / "microbench"))
SAME_GPU = os.environ.get("GINGHAM_SAMEGPU", str(ROOT / "python" / "gingham" / "libsamegpu.so"))
ON_GPU = ["--device", "cuda", "--transport", "copy", "--as", "threads"]
PLAIN = {"GINGHAM_SM90": "0"}


# Seconds that a part took on one H100 (bench/results/gpu_offline_2026-11-27.md says in which run), other parts beside it, so that alone it
# takes less. A part that is not here has not been timed there: its limit stands for it.
MEASURED = {
    "machine": 11.4,
    "order of streams": 14.0,
    "products, sm_80 kernels": 15.1,
    "layers, sm_80 kernels": 16.7,
    "products, all kernels": 14.7,
    "layers, all kernels": 17.2,
    "kernels beside the CPU's": 1.8,
    "torch's tools": 37.9,
    "step 1,2,1": 1.1,
    "step 2,2,1": 1.1,
    "step 2,2,2": 1.4,
    "step 3,2,1": 1.3,
    "step bfloat16": 3.8,
    "step float16": 7.1,
    "attention ring bfloat16": 1.4,
    "attention ring float32": 1.5,
    "times": 95.0,  # its six pieces in processes of their own
    "stand-in for NCCL: exchange": 11.0,
    "stand-in for NCCL: mismatch": 29.5,
    "stand-in for NCCL: abort": 14.7,
    "stand-in for NCCL: again": 15.3,
    "ranks on one GPU: gradients of a GPT": 83.1,
    "ranks on one GPU: a GPT on 8": 74.1,
}
BUILD = 53  # seconds of gpu.sh's build on 16 cores (the H200's machine)


@dataclass
class Part:
    name: str
    command: list[str]
    limit: int  # seconds
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> float | None:
        return MEASURED.get(self.name)

    @property
    def predicted(self) -> float:
        return self.limit if self.measured is None else self.measured


def python(file: str, *names: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name(file)), *names]


def bench(*words: str) -> list[str]:
    return [BENCH, *words, *ON_GPU]


def pytest(*words: str, failures: int = 10, marks: str = "not matrix") -> list[str]:
    """The tests' quick ones; tests/conftest.py leaves out what a GPU mesh refuses."""
    options = ["-q", "-p", "no:cacheprovider", "-m", marks, f"--maxfail={failures}", "--durations=5"]
    if importlib.util.find_spec("pytest_timeout"):  # without it the part's own limit is all
        options.append("--timeout=60")
    return [sys.executable, "-X", "faulthandler", "-m", "pytest", *options, *words]


def same_gpu() -> dict[str, str]:
    """Several ranks on one GPU: tests/cuda/samegpu stands in for NCCL, which refuses two ranks on one. What is done with large messages
    only is done with all: weights gathered early, sums in pieces."""
    return {
        "GINGHAM_DEVICE": "cuda",
        "GINGHAM_NCCL": SAME_GPU,
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
        "GINGHAM_EARLY_BYTES": "0",
        "GINGHAM_CHUNK_BYTES": "256",
    }


def by_engines() -> dict[str, str]:
    """The same, messages by copy engines: slots of a few hundred bytes, so that they go in pieces."""
    return same_gpu() | {"GINGHAM_COPY_ENGINES": "1", "GINGHAM_COPY_BYTES": "4096"}


def same_gpu_messages(name: str) -> list[str]:
    return [sys.executable, str(ROOT / "tests" / "cuda" / "samegpu" / "messages.py"), SAME_GPU, name]


def truth_parts() -> list[Part]:
    parts = [
        Part("machine", python("machine.py"), 60),
        Part("order of streams", python("truth.py", "streams"), 60, PLAIN),
        Part("products, sm_80 kernels", python("truth.py", "products"), 90, PLAIN),
        Part("layers, sm_80 kernels", python("truth.py", "layers", "loss", "dropout", "attention"), 90, PLAIN),
        Part("products, all kernels", python("truth.py", "products"), 60),
        Part("layers, all kernels", python("truth.py", "layers", "loss"), 60),
        Part("kernels beside the CPU's", bench("kernels"), 60),
        Part("torch's tools", python("tools.py"), 120),
    ]
    for grid in ("1,2,1", "2,2,1", "2,2,2", "3,2,1"):
        parts.append(
            Part(f"step {grid}", bench("all", "--check", "--grid", grid, "--shape", "515,387,261", "--rounds", "2", "--slices", "3"), 30)
        )
    # large enough for the tensor cores' large tiles on every rank
    for dtype in ("bfloat16", "float16"):
        words = ("all", "--check", "--grid", "2,2,1", "--shape", "4096,2048,4096", "--dtype", dtype, "--rounds", "2", "--slices", "2")
        parts.append(Part(f"step {dtype}", bench(*words), 60))
    for dtype in ("bfloat16", "float32"):
        words = ("attention", "--check", "--ranks", "4", "--shape", "515,64,4", "--dtype", dtype, "--rounds", "2")
        parts.append(Part(f"attention ring {dtype}", bench(*words), 30))
    words = ("gemm", "--add", "--check", "--shape", "8192,1024,4096", "--dtype", "bfloat16", "--rounds", "10")
    parts.append(Part("product added to C", bench(*words), 25))
    parts.append(Part("times", python("times.py"), 120))
    parts += [Part(f"stand-in for NCCL: {name}", same_gpu_messages(name), 60) for name in ("exchange", "mismatch", "abort", "again")]
    engines = [sys.executable, str(ROOT / "tests" / "cuda" / "fake" / "engines.py"), "must"]
    parts.append(Part("ranks on one GPU: copy engines", engines, 25, by_engines()))
    parts.append(Part("ranks on one GPU: gradients of a GPT", pytest("tests/python/test_gpt.py", failures=1), 120, same_gpu()))
    train = "train --ranks 8 --mode 2.5d --depth 2 --device cuda --steps 5 --layers 2 --width 64 --context 32 --sample 0 --plot="
    parts.append(
        Part("ranks on one GPU: a GPT on 8", [sys.executable, "-m", "gingham", *train.split(), "--compare-serial"], 120, same_gpu())
    )
    return parts


def long_parts() -> list[Part]:
    """What takes seconds first, then what may take its limit."""
    parts = []
    for grid in ("1,2,1", "2,2,1", "1,4,1", "2,2,2", "4,2,1", "3,2,1"):
        for extra in (["--slices", "1"], ["--slices", "3"], ["--slices", "3", "--swapped"]):
            words = ["all", "--check", "--grid", grid, "--shape", "515,387,261", "--rounds", "3", *extra]
            parts.append(Part(f"step {grid} {' '.join(extra)}", bench(*words), 30))
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        for shape in ("515,64,4", "130,128,2", "37,20,3"):
            words = ["attention", "--check", "--ranks", "4", "--shape", shape, "--dtype", dtype, "--rounds", "3"]
            parts.append(Part(f"attention {shape} {dtype}", bench(*words), 30))
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        for n in (1024, 4096, 8192):
            if dtype == "float64" and n == 8192:
                continue
            for library in ("gingham", "cublaslt"):
                words = ["gemm", "--shape", f"{n},{n},{n}", "--dtype", dtype, "--library", library, "--rounds", "20"]
                parts.append(Part(f"gemm {n} {dtype} {library}", bench(*words), 60))
    for ranks in ("1", "4"):
        for dtype in ("bfloat16", "float32"):
            for shape in ("8192,64,16", "8192,128,16"):
                words = ["attention", "--ranks", ranks, "--shape", shape, "--dtype", dtype, "--rounds", "10"]
                parts.append(Part(f"attention {ranks} x {shape} {dtype}", bench(*words), 60))
    for tool in ("memcheck", "racecheck", "synccheck"):
        parts.append(Part(tool, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *bench("kernels")], 200))
    shares = [f"{unit}__throughput.avg.pct_of_peak_sustained_elapsed" for unit in ("sm", "dram", "lts")]
    counters = ",".join(["gpu__time_duration.sum", *shares])
    words = ["--clock-control", "none", "--metrics", counters, "--launch-count", "60", "--csv"]
    parts.append(Part("ncu", ["ncu", *words, *python("times.py", "kernels")], 200))
    gpt = pytest("tests/python/test_gpt.py", failures=1)
    parts.append(Part("ranks on one GPU: gradients of a GPT by copy engines", gpt, 150, by_engines()))
    # of these no run on a GPU has come to the end of a limit of 150 s: a test of ranks that share one takes 5 to 20 s
    for file in ("test_functional", "test_traffic", *(f"nn/test_{name}" for name in ("layers", "linear", "loss", "embedding"))):
        parts.append(Part(f"ranks on one GPU: {file}", pytest(f"tests/python/{file}.py"), 150, same_gpu()))
    # its quick tests are those of windows
    ring = pytest("tests/python/nn/test_layer_traffic.py", marks="matrix")
    parts.append(Part("ranks on one GPU: nn/test_layer_traffic", ring, 150, same_gpu()))
    return parts


def several_gpus(count: int) -> list[Part]:
    """What one GPU cannot show: NCCL and copy engines between GPUs, rings beside NCCL's own collectives, the linear pair on 2, 4 and 8."""
    over = ["--device", "cuda", "--transport", "nccl"]
    parts = []
    for carrier, asked in (("NCCL", {}), ("copy engines", {"GINGHAM_COPY_ENGINES": "1"})):
        for grid in ((1, 2, 1), (2, 1, 1), (1, 4, 1), (2, 2, 1), (2, 2, 2), (4, 2, 1)):
            if grid[0] * grid[1] * grid[2] <= count:
                words = ["all", "--check", "--grid", ",".join(map(str, grid)), "--shape", "515,387,261", "--rounds", "3", "--slices", "2"]
                parts.append(Part(f"step {grid} over {carrier}", [BENCH, *words, *over], 60, asked))
        words = ["attention", "--check", "--ranks", str(count), "--shape", "515,64,4", "--dtype", "bfloat16", "--rounds", "3"]
        parts.append(Part(f"attention over {carrier}", [BENCH, *words, *over], 60, asked))
    ways = {"gingham": ("gingham", {}), "copy engines": ("gingham", {"GINGHAM_COPY_ENGINES": "1"}), "nccl": ("nccl", {})}
    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        for way, (library, asked) in ways.items():
            words = [name, "--ranks", str(count), "--sizes", f"{count << 20},{count << 24}", "--library", library, "--rounds", "20"]
            parts.append(Part(f"{name}, {way}", [BENCH, *words, *over], 60, asked))
    pair = [sys.executable, str(ROOT / "bench" / "gpu_pair.py")]
    parts.append(Part("the linear pair by copy engines beside torch", pair, 120, {"GINGHAM_COPY_ENGINES": "1"}))
    parts.append(Part("the linear pair beside torch", pair, 120))
    return parts


def parts_of(name: str) -> list[Part]:
    """Where there are several GPUs the long set begins with what no other machine can show."""
    return SETS[name]() if name != "long" or gpus() < 2 else several_gpus(gpus()) + long_parts()


def gpus() -> int:
    return (
        len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()) if shutil.which("nvidia-smi") else 0
    )


SETS = {"truth": truth_parts, "long": long_parts}
