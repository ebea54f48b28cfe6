"""Builds the shim's test program with ninja, one folder of objects per sanitizer: only what changed is compiled again.

By hand: PYTHONPATH=tests python -m cuda.shim_build address
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cuda import nvcc

ROOT = nvcc.ROOT
SANITIZERS = {
    "plain": ["-O1"],
    "address": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=thread"],
}
# What runs the fibers is not itself watched: to ThreadSanitizer it would be one more racing program.
SCHEDULER = {"address": ["-DGINGHAM_SHIM_ASAN"], "thread": ["-DGINGHAM_SHIM_TSAN"]}


BASE = "-std=c++20 -Wall -Wextra -Werror -Wno-unknown-pragmas -DGINGHAM_SHIM -DGINGHAM_CUDA"
ENVIRONMENT = {
    "GINGHAM_BLAS": "plain",
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else shutil.which("ninja") or "ninja"


def sources() -> tuple[list[Path], list[Path]]:
    """Instrumented ones, and the shim's own."""
    csrc = [
        *(ROOT / "csrc" / "kernels").glob("*.cc"),
        *(ROOT / "csrc" / "base" / name for name in ("heap.cc", "memory.cc", "segment.cc", "wait.cc")),
    ]
    return [*nvcc.kernels(), *csrc, *(ROOT / "tests" / "cuda").glob("*.cc")], list((ROOT / "tests" / "cuda" / "shim").glob("*.cc"))


def write_ninja(folder: Path, sanitizer: str, include: Path) -> None:
    flags = " ".join(SANITIZERS[sanitizer])
    paths = f"-I{ROOT}/tests/cuda/shim -I{ROOT}/tests/cuda -I{ROOT}/csrc -isystem {include}"
    lines = [
        "rule cc",
        f"  command = nice g++ -x c++ {BASE} $flags {paths} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ {flags} $in -o $out -ldl -lpthread -lrt",
    ]
    watched, shim = sources()
    objects = []
    for path in [*watched, *shim]:
        out = "_".join(path.relative_to(ROOT).parts) + ".o"
        objects.append(out)
        own = " ".join(["-O2", *SCHEDULER.get(sanitizer, [])]) if path in shim else flags
        lines += [f"build {out}: cc {path}", f"  flags = {own}"]
    lines += [f"build kernel_tests: link {' '.join(objects)}", "default kernel_tests", ""]
    text, target = "\n".join(lines), folder / "build.ninja"
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


def build(sanitizer: str) -> Path:
    tools = nvcc.toolkit()
    if tools is None:
        raise nvcc.CompileError("the shim needs the toolkit's headers")
    folder = ROOT / "build" / "shim" / sanitizer
    folder.mkdir(parents=True, exist_ok=True)
    jobs = os.environ.get("GINGHAM_JOBS", "2")
    with nvcc.alone(f"shim-{sanitizer}"):
        write_ninja(folder, sanitizer, tools.include)
        done = subprocess.run([ninja(), "--quiet", "-C", str(folder), "-j", jobs], capture_output=True, text=True)
    if done.returncode != 0:
        raise nvcc.CompileError(done.stdout[-8000:] + done.stderr[-2000:])
    return folder / "kernel_tests"


if __name__ == "__main__":
    print(build(sys.argv[1] if len(sys.argv) > 1 else "plain"))
