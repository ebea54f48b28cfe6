"""Faults put into a copy of csrc, one at a time, each to be found by the rung named. A rung that finds none of these is worth nothing.

    PYTHONPATH=tests python -m cuda.mutations [NAME ...]     prints the table

Rung 3 compiles the unit (csrc/kernels/<unit>.cu) for the host shim and runs `checks` as --only of its test program; rung 4 runs the checks
of cuda/ptx/check.py. Faults of the host side, rung 5, are in host_faults.py.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda import nvcc, shim_build
from cuda.kernel_faults import FAULTS
from cuda.mutation import Mutation, Outcome
from cuda.ptx import build as ptx_build

FOLDER = nvcc.ROOT / "build" / "mutations"
SECONDS = 240
CAUGHT = 3  # as check.py ends


def copied(mutation: Mutation, changed: bool) -> Path:
    """csrc/base and csrc/kernels in a folder of their own, with the change made."""
    folder = FOLDER / (re.sub(r"\W+", "-", mutation.name) if changed else f"none-{mutation.rung}-{mutation.unit}")
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("base", "kernels"):
        shutil.copytree(nvcc.CSRC / part, folder / part)
    path = folder / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: {mutation.file} contains {text.count(mutation.old)} times {mutation.old!r}, which must be once")
    if changed:
        path.write_text(text.replace(mutation.old, mutation.new))
    return folder


def finish(command: list[str], **more: str) -> tuple[int, str]:
    """The exit status and the last line printed; a run without an end counts as one that failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=os.environ | more)
    except subprocess.TimeoutExpired:
        return CAUGHT, f"no end within {SECONDS} s"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return done.returncode, lines[-1] if lines else ""


def interpreter(csrc: Path, unit: str, checks: tuple[str, ...]) -> tuple[int, str]:
    tests = str(nvcc.ROOT / "tests")
    return finish([sys.executable, "-m", "cuda.ptx.check", str(csrc), unit, *checks], PYTHONPATH=tests)


def shim(csrc: Path, unit: str, checks: tuple[str, ...]) -> tuple[int, str]:
    """The shim's program with this one unit compiled anew."""
    program = shim_build.build("plain")
    tools = nvcc.toolkit()
    assert tools is not None
    made = csrc / f"{unit}.o"
    folders = [nvcc.ROOT / "tests" / "cuda" / "shim", nvcc.ROOT / "tests" / "cuda", csrc]
    paths = [flag for folder in folders for flag in ("-I", str(folder))] + ["-isystem", str(tools.include)]
    source = csrc / "kernels" / f"{unit}.cu"
    flags = ["-std=c++20", "-O1", "-w", "-DGINGHAM_SHIM", "-DGINGHAM_CUDA"]
    compiled = finish(["g++", "-x", "c++", *flags, *paths, "-c", str(source), "-o", str(made)])
    if compiled[0]:
        return 1, f"does not compile: {compiled[1]}"
    objects = [str(path) for path in sorted(program.parent.glob("*.o")) if not path.name.endswith(f"_{unit}.cu.o")]
    linked = finish(["g++", str(made), *objects, "-o", str(csrc / "kernel_tests"), "-ldl", "-lpthread", "-lrt"])
    if linked[0]:
        return 1, f"does not link: {linked[1]}"
    for check in checks:
        code, said = finish([str(csrc / "kernel_tests"), "--only", check], GINGHAM_BLAS="plain")
        if code:
            return CAUGHT, said
    return 0, ""


def prepare(chosen: list[Mutation]) -> None:
    """Builds what several faults share, once, so that they can be put in side by side."""
    if any(mutation.rung == 4 for mutation in chosen):
        ptx_build.build()
    if any(mutation.rung == 3 for mutation in chosen):
        shim_build.build("plain")


RUNGS: dict[int, Callable[[Path, str, tuple[str, ...]], tuple[int, str]]] = {3: shim, 4: interpreter}


def run(mutation: Mutation, changed: bool = True) -> Outcome:
    """Whether the rung finds the fault; without the change, whether it finds one where there is none."""
    began = time.perf_counter()
    code, said = RUNGS[mutation.rung](copied(mutation, changed), mutation.unit, mutation.checks)
    if code not in (0, CAUGHT):
        said = f"could not be asked: {said}"
    return Outcome(mutation, code == CAUGHT, said, time.perf_counter() - began)


def table(outcomes: list[Outcome]) -> str:
    lines = [f"{'mutation':<44} {'class':<12} rung caught seconds  how"]
    for o in outcomes:
        said, m = o.said.partition(" by block")[0], o.mutation
        lines.append(f"{m.name:<44} {m.kind:<12} {m.rung:>4} {'yes' if o.caught else 'NO':>6} {o.seconds:7.1f}  {said[:90]}")
    return "\n".join(lines)


def main(names: list[str]) -> int:
    chosen = [mutation for mutation in FAULTS if not names or mutation.name in names]
    prepare(chosen)
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(run, chosen))
    print(table(outcomes))
    return sum(not outcome.caught for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
