"""Compiles csrc/kernels for rung 4: PTX for the interpreter and a shared library of the host code, with host.cc as its CUDA runtime.

Results are kept under build/ptx by the hash of all sources, so that a second run starts at once. `csrc` may be a mutated copy.
"""

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda.nvcc import CompileError, alone, toolkit

ROOT = Path(__file__).resolve().parents[3]
CSRC, KEPT = ROOT / "csrc", ROOT / "build" / "ptx"
HERE = Path(__file__).resolve().parent
ARCH = {"gemm_sm90": "90a"}  # the others: 80
BASE = ("heap", "memory", "segment", "wait")


@dataclass(frozen=True)
class Built:
    library: Path
    ptx: dict[str, Path]


def nvcc() -> Path:
    found = toolkit()
    if found is None:
        raise FileNotFoundError("nvcc is not installed")
    return found.nvcc


def command(*words: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise CompileError(f"{' '.join(str(word) for word in words)}\n{done.stdout}{done.stderr}")


def digest(paths: list[Path], *more: str) -> str:
    found = hashlib.sha256(repr(more).encode())
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def included(source: Path, csrc: Path) -> list[Path]:
    """The source and what it includes of ours, directly or not."""
    found, open_ = {source}, [source]
    while open_:
        path = open_.pop()
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            for candidate in (path.parent / name, csrc / name):
                if candidate.exists() and candidate not in found:
                    found.add(candidate)
                    open_.append(candidate)
    return sorted(found)


def kept(name: str, key: str, make: Callable[[Path], list[Path]], *suffixes: str) -> list[Path]:
    """Files of this name and key, made once: written beside and renamed, so that a run that is cut short leaves none."""
    KEPT.mkdir(parents=True, exist_ok=True)
    paths = [KEPT / f"{name}-{key}{suffix}" for suffix in suffixes]
    with alone(f"{name}-{key}"):
        if not all(path.exists() for path in paths):
            scratch = Path(tempfile.mkdtemp(prefix=f"{name}-{key}.", dir=KEPT))
            for path, new in zip(paths, make(scratch), strict=True):
                new.replace(path)
            shutil.rmtree(scratch)
    return paths


def kernel(source: Path, csrc: Path) -> list[Path]:
    """The object of its host code and its PTX, from one run of nvcc."""
    name, arch = source.stem, ARCH.get(source.stem, "80")

    def make(scratch: Path) -> list[Path]:
        made = scratch / f"{name}.o"
        flags = ["-std=c++20", "-O2", "-DGINGHAM_CUDA", "-Xcompiler", "-fPIC", "-gencode", f"arch=compute_{arch},code=compute_{arch}"]
        command(nvcc(), *flags, "-I", csrc, "-c", source, "-o", made, "--keep", "--keep-dir", scratch)
        return [made, scratch / f"{name}.ptx"]

    return kept(name, digest(included(source, csrc), arch), make, ".o", ".ptx")


def cpu_object(source: Path, csrc: Path) -> Path:
    def make(scratch: Path) -> list[Path]:
        made = scratch / "made.o"
        command(nvcc(), "-std=c++20", "-O1", "-Xcompiler", "-fPIC", "-DGINGHAM_CUDA", "-I", csrc, "-c", source, "-o", made)
        return [made]

    return kept(source.stem + "_cpu", digest(included(source, csrc)), make, ".o")[0]


def build(csrc: Path = CSRC, unit: str = "") -> Built:
    """With a unit, only csrc/kernels/<unit>.cu is taken from csrc, the rest from the checkout: what a mutation of a header needs."""

    def home(source: Path) -> Path:
        return CSRC if unit and source.stem != unit else csrc

    kernels = [home(source) / "kernels" / source.name for source in sorted((csrc / "kernels").glob("*.cu"))] + [HERE / "host_sm90.cu"]
    others = [
        *sorted((CSRC / "kernels").glob("*.cc")),
        *(CSRC / "base" / f"{name}.cc" for name in BASE),
        HERE / "host.cc",
        HERE / "host_layers.cc",
        HERE / "host_attention.cc",
    ]
    with ThreadPoolExecutor(2) as pool:
        made = dict(zip([source.stem for source in kernels], pool.map(lambda source: kernel(source, home(source)), kernels), strict=True))
        objects = [pair[0] for pair in made.values()] + list(pool.map(lambda source: cpu_object(source, CSRC), others))

    def make(scratch: Path) -> list[Path]:
        command("g++", "-shared", "-o", scratch / "host.so", *objects, "-ldl", "-lpthread")
        return [scratch / "host.so"]

    library = kept("host", digest(objects), make, ".so")[0]
    return Built(library, {name: pair[1] for name, pair in made.items()})
