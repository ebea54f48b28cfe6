"""Runs the parts of bench/gpu.sh, each in a process of its own under its own limit, and puts their rows together.

    python bench/gpu/run.py SET --out FOLDER     SET: truth (all that is checked, the first times) | long (sanitizers, every grid, counters)
    python bench/gpu/run.py SET --list           the parts with their limits, nothing is run

Writes FOLDER/gpu_SET.json and FOLDER/gpu_SET.log; the last lines are a table. Leaves with the number of parts that failed (at most 100).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = os.environ.get("GINGHAM_MICROBENCH", str(ROOT / "python" / "gingham" / "bin" / "microbench"))
SAME_GPU = os.environ.get("GINGHAM_SAMEGPU", str(ROOT / "python" / "gingham" / "libsamegpu.so"))
ON_GPU = ["--device", "cuda", "--transport", "copy", "--as", "threads"]
PLAIN = {"GINGHAM_SM90": "0"}


@dataclass
class Part:
    name: str
    command: list[str]
    limit: int  # seconds
    environment: dict[str, str] = field(default_factory=dict)


def python(file: str, *names: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name(file)), *names]


def bench(*words: str) -> list[str]:
    return [BENCH, *words, *ON_GPU]


def pytest(*words: str, failures: int = 10) -> list[str]:
    """The tests' quick ones, without those of windows and slowed links, which a GPU mesh refuses."""
    left_out = "not window and not link and not amid"
    options = ["-q", "-p", "no:cacheprovider", "-m", "not matrix", "-k", left_out, "--timeout=60", f"--maxfail={failures}", "--durations=5"]
    return [sys.executable, "-X", "faulthandler", "-m", "pytest", *options, *words]


def same_gpu() -> dict[str, str]:
    """Several ranks on one GPU: tests/cuda/samegpu stands in for NCCL, which refuses two ranks on one."""
    return {
        "GINGHAM_DEVICE": "cuda",
        "GINGHAM_NCCL": SAME_GPU,
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
    }


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
    parts.append(Part("times", python("times.py"), 120))
    files = [
        "test_functional",
        "test_traffic",
        "nn/test_layers",
        "nn/test_linear",
        "nn/test_loss",
        "nn/test_embedding",
        "nn/test_layer_traffic",
    ]
    parts += [Part(f"stand-in for NCCL: {name}", same_gpu_messages(name), 30) for name in ("exchange", "mismatch", "abort", "again")]
    parts.append(Part("ranks on one GPU: tests", pytest(*(f"tests/python/{name}.py" for name in files)), 150, same_gpu()))
    parts.append(Part("ranks on one GPU: gradients of a GPT", pytest("tests/python/test_gpt.py", failures=1), 90, same_gpu()))
    train = "train --ranks 8 --mode 2.5d --depth 2 --device cuda --steps 5 --layers 2 --width 64 --context 32 --sample 0 --plot="
    parts.append(
        Part("ranks on one GPU: a GPT on 8", [sys.executable, "-m", "gingham", *train.split(), "--compare-serial"], 90, same_gpu())
    )
    return parts


def long_parts() -> list[Part]:
    parts = []
    for tool in ("memcheck", "racecheck", "synccheck"):
        parts.append(Part(tool, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *bench("kernels")], 200))
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
    shares = [f"{unit}__throughput.avg.pct_of_peak_sustained_elapsed" for unit in ("sm", "dram", "lts")]
    counters = ",".join(["gpu__time_duration.sum", *shares])
    words = ["--clock-control", "none", "--metrics", counters, "--launch-count", "60", "--csv"]
    parts.append(Part("ncu", ["ncu", *words, *python("times.py", "kernels")], 200))
    return parts


def several_gpus(count: int) -> list[Part]:
    """What one GPU cannot show: NCCL between GPUs, rings beside NCCL's own collectives, the linear pair on 2, 4 and 8."""
    over = ["--device", "cuda", "--transport", "nccl"]
    parts = []
    for grid in ((1, 2, 1), (2, 1, 1), (1, 4, 1), (2, 2, 1), (2, 2, 2), (4, 2, 1)):
        if grid[0] * grid[1] * grid[2] <= count:
            words = ["all", "--check", "--grid", ",".join(map(str, grid)), "--shape", "515,387,261", "--rounds", "3", "--slices", "2"]
            parts.append(Part(f"step {grid} over NCCL", [BENCH, *words, *over], 60))
    words = ["attention", "--check", "--ranks", str(count), "--shape", "515,64,4", "--dtype", "bfloat16", "--rounds", "3"]
    parts.append(Part("attention over NCCL", [BENCH, *words, *over], 60))
    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        for library in ("gingham", "nccl"):
            words = [name, "--ranks", str(count), "--sizes", f"{count << 20},{count << 24}", "--library", library, "--rounds", "20"]
            parts.append(Part(f"{name}, {library}", [BENCH, *words, *over], 60))
    parts.append(Part("the linear pair beside torch", [sys.executable, str(ROOT / "bench" / "gpu_pair.py")], 120))
    return parts


def gpus() -> int:
    return (
        len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()) if shutil.which("nvidia-smi") else 0
    )


SETS = {"truth": truth_parts, "long": long_parts}


def run(part: Part, log: Any) -> dict[str, Any]:
    """The rows that the part printed, how it ended and how long it took; what runs past the limit is killed with all it started."""
    environment = (
        os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests")]), "PYTHONUNBUFFERED": "1"}
        | part.environment
    )
    began = time.monotonic()
    process = subprocess.Popen(
        part.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment, start_new_session=True
    )
    ended = "ran past its limit"
    try:
        text, _ = process.communicate(timeout=part.limit)
        ended = "" if process.returncode == 0 else f"status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    seconds = time.monotonic() - began
    log.write(f"\n===== {part.name}: {' '.join(part.command)}\n{text}\n===== {seconds:.1f} s {ended}\n")
    log.flush()
    rows = [json.loads(line[4:]) for line in text.splitlines() if line.startswith("ROW ")]
    wrong = [each for each in rows if each["right"] is False]
    return {
        "part": part.name,
        "command": part.command,
        "environment": part.environment,
        "seconds": seconds,
        "ended": ended,
        "rows": rows,
        "wrong": len(wrong),
        "tail": text.splitlines()[-12:],
    }


def shown(found: dict[str, Any]) -> list[str]:
    """A line for the part, one for each wrong row and each measurement, and the end of what an unhappy one printed."""
    checks = sum(each["right"] is not None for each in found["rows"])
    state = "FAILED" if found["ended"] or found["wrong"] else "ok"
    lines = [f"{state:6s} {found['part']:32s} {found['seconds']:6.1f} s  {checks - found['wrong']}/{checks} checks {found['ended']}"]
    for each in found["rows"]:
        value = each["value"] if isinstance(each["value"], str) else f"{each['value']:.4g}"
        rest = " ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in each.items()
            if k not in ("name", "value", "bound", "unit", "right")
        )
        if each["right"] is False:
            lines.append(f"         WRONG {each['name']}: {value} > {each['bound']} {rest}"[:400])
        elif each["right"] is None:
            lines.append(f"         {each['name']}: {value} {each['unit']} {rest}"[:700])
    if not found["rows"]:
        lines += [f"         | {line[:160]}" for line in found["tail"][-(10 if state == "FAILED" else 4) :]]
    elif state == "FAILED" and found["ended"]:
        lines += [f"         | {line[:160]}" for line in found["tail"][-3:]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="", help="parts whose name holds one of these words: times,streams")
    parser.add_argument("--budget", type=float, default=560, help="seconds in all; parts that no longer fit are named and left out")
    chosen = parser.parse_args()
    parts = SETS[chosen.set]() + (several_gpus(gpus()) if chosen.set == "long" and gpus() > 1 else [])
    parts = [part for part in parts if any(word in part.name for word in chosen.only.split(","))]
    if chosen.list:
        print("\n".join(f"{part.limit:5d} s  {part.name}: {' '.join(part.command)}" for part in parts))
        print(f"{len(parts)} parts, at most {sum(part.limit for part in parts)} s in all, cut off at {chosen.budget:.0f}")
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    began, done, left = time.monotonic(), [], []
    with open(chosen.out / f"gpu_{chosen.set}.log", "w") as log:
        for part in parts:
            room = chosen.budget - (time.monotonic() - began)
            if room < 5:
                left.append(part.name)
                continue
            part.limit = min(part.limit, int(room))
            done.append(run(part, log))
            print("\n".join(shown(done[-1])), flush=True)
            (chosen.out / f"gpu_{chosen.set}.json").write_text(json.dumps(done, indent=1))
    failed = sum(bool(each["ended"] or each["wrong"]) for each in done)
    print(
        f"\n{len(done) - failed} of {len(done)} parts as they should be, {failed} not; not run, no time left: {', '.join(left) or 'none'}"
    )
    sys.exit(min(failed + len(left), 100))


if __name__ == "__main__":
    main()
