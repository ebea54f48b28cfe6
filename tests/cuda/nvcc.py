"""nvcc and its toolkit where there is one: what compiles the kernels for the tests that look at the compiler's output.

Results are kept below build/nvcc by the hash of everything that went into them, so that a test run compiles only what changed.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "nvcc"
ARCHITECTURES = ("sm_80", "sm_90a")
WARNINGS = ("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror")
FLAGS = ("-std=c++20", f"-I{CSRC}", *WARNINGS)


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    include: Path
    lib: Path
    version: str  # of nvcc, such as 13.0.88


class CompileError(RuntimeError):
    """What nvcc said."""


@functools.cache
def toolkit() -> Toolkit | None:
    """The toolkit that CUDA_HOME or the path names; None when there is none."""
    home = os.environ.get("CUDA_HOME")
    found = Path(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if not found or not Path(found).exists():
        return None
    dry = subprocess.run([str(found), "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    version = re.search(r"V(\d+\.\d+\.\d+)", subprocess.run([str(found), "--version"], capture_output=True, text=True).stdout)
    if top is None or version is None:
        return None
    folder = Path(top[1]).resolve()
    libs = [folder / name for name in ("lib64", "lib") if (folder / name / "libcudart_static.a").exists()]
    return Toolkit(Path(found), folder / "include", libs[0] if libs else folder / "lib64", version[1])


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """What is built under this name is built by one process at a time, and by one thread of it."""
    folder = ROOT / "build" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def kernels() -> list[Path]:
    return sorted((CSRC / "kernels").glob("*.cu"))


def _included(path: Path, seen: set[Path]) -> None:
    """Adds the path and all of our headers that it includes."""
    if path not in seen and path.exists():
        seen.add(path)
        for name in re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.MULTILINE):
            _included(CSRC / name, seen)


def _fingerprint(source: Path) -> str:
    seen: set[Path] = set()
    _included(source, seen)
    digest = hashlib.sha256()
    for path in sorted(seen):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _compile(source: Path, arch: str, kind: str, extra: tuple[str, ...]) -> tuple[Path, str]:
    """The file made and what the compiler reported."""
    tools = toolkit()
    if tools is None:
        raise CompileError("no nvcc")
    key = hashlib.sha256(repr((_fingerprint(source), arch, kind, extra, tools.version, FLAGS[2:])).encode()).hexdigest()[:24]
    CACHE.mkdir(parents=True, exist_ok=True)
    out, log = CACHE / f"{source.stem}.{arch}.{key}.{kind}", CACHE / f"{source.stem}.{arch}.{key}.{kind}.log"
    with alone(out.name):
        if out.exists() and log.exists():
            return out, log.read_text()
        scratch = out.with_suffix(f".{os.getpid()}")
        command = [str(tools.nvcc), *FLAGS, f"-arch={arch}", f"-{kind}", *extra, "-o", str(scratch), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        log.write_text(done.stdout + done.stderr)
        scratch.replace(out)
        return out, log.read_text()


def compile_kernels(architectures: tuple[str, ...] = ARCHITECTURES) -> None:
    """Compiles all kernels for the architectures, two at a time, into the cache; errors are left to whoever asks for the result."""

    def one(job: tuple[Path, str]) -> None:
        with contextlib.suppress(CompileError):
            compile_cubin(*job)

    jobs = [(source, arch) for source in kernels() for arch in architectures]
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("GINGHAM_JOBS", "2"))) as pool:
        list(pool.map(one, jobs))


def compile_ptx(source: Path, arch: str, extra: tuple[str, ...] = ()) -> Path:
    return _compile(source, arch, "ptx", extra)[0]


def compile_cubin(source: Path, arch: str, extra: tuple[str, ...] = ()) -> tuple[Path, str]:
    """The cubin and ptxas's report of registers, stack and spills."""
    return _compile(source, arch, "cubin", ("-Xptxas", "-v", *extra))
