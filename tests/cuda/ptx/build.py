"""Compiles csrc/kernels for rung 4: PTX for the interpreter and a shared library of the host code, with host.cc as its CUDA runtime.

Results are kept under build/ptx by the hash of all sources, so that a second run starts at once. `csrc` may be a mutated copy.
"""

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CSRC, KEPT = ROOT / "csrc", ROOT / "build" / "ptx"
HOST = Path(__file__).with_name("host.cc")
KERNELS = ("accumulate", "cast", "dropout", "epilogue", "gemm", "gemm_bf16", "gemm_f16", "gemm_plain", "gemm_tf32")
CPU = (
    "kernels/accumulate.cc",
    "kernels/cast.cc",
    "kernels/dropout.cc",
    "kernels/epilogue.cc",
    "kernels/gemm.cc",
    "kernels/blas.cc",
    "base/heap.cc",
    "base/segment.cc",
)


class CompileError(Exception):
    pass


@dataclass(frozen=True)
class Built:
    library: Path
    ptx: dict[str, Path]


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        raise FileNotFoundError("nvcc is not installed")
    return found


def command(*words: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise CompileError(f"{' '.join(str(word) for word in words)}\n{done.stdout}{done.stderr}")


def digest(paths: list[Path], *more: str) -> str:
    found = hashlib.sha256(repr(more).encode())
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def sources(csrc: Path) -> list[Path]:
    """What a kernel's translation unit may include."""
    return sorted(path for folder in ("kernels", "base") for path in (csrc / folder).iterdir() if path.suffix in (".h", ".cuh"))


def kept(name: str, key: str, make: "callable", *suffixes: str) -> list[Path]:  # type: ignore[valid-type]
    """Files of this name and key, made once: written beside and renamed, so that a run that is cut short leaves none."""
    KEPT.mkdir(parents=True, exist_ok=True)
    paths = [KEPT / f"{name}-{key}{suffix}" for suffix in suffixes]
    if not all(path.exists() for path in paths):
        scratch = KEPT / f"{name}-{key}.new"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        made = make(scratch)
        for path, new in zip(paths, made, strict=True):
            new.replace(path)
        shutil.rmtree(scratch)
    return paths


def kernel(name: str, csrc: Path, arch: str) -> tuple[Path, Path]:
    """The object of its host code and its PTX, from one run of nvcc."""
    source = csrc / "kernels" / f"{name}.cu"

    def make(scratch: Path) -> list[Path]:
        made = scratch / f"{name}.o"
        flags = ["-std=c++20", "-O2", "-DGINGHAM_CUDA", "-Xcompiler", "-fPIC", "-gencode", f"arch=compute_{arch},code=compute_{arch}"]
        command(nvcc(), *flags, "-I", csrc, "-c", source, "-o", made, "--keep", "--keep-dir", scratch)
        return [made, scratch / f"{name}.ptx"]

    made = kept(name, digest([source, *sources(csrc)], arch, str(csrc)), make, ".o", ".ptx")
    return made[0], made[1]


def cpu_object(path: Path, csrc: Path) -> Path:
    def make(scratch: Path) -> list[Path]:
        made = scratch / "made.o"
        command(nvcc(), "-std=c++20", "-O1", "-Xcompiler", "-fPIC", "-DGINGHAM_CUDA", "-I", csrc, "-c", path, "-o", made)
        return [made]

    return kept(path.stem + "_cpu", digest([path, *sources(csrc)]), make, ".o")[0]


def build(csrc: Path = CSRC, kernels: tuple[str, ...] = KERNELS, arch: str = "80") -> Built:
    made = {name: kernel(name, csrc, arch) for name in kernels}
    objects = [pair[0] for pair in made.values()] + [cpu_object(csrc / name, csrc) for name in CPU] + [cpu_object(HOST, csrc)]

    def make(scratch: Path) -> list[Path]:
        command("g++", "-shared", "-o", scratch / "host.so", *objects, "-ldl", "-lpthread")
        return [scratch / "host.so"]

    library = kept("host", digest(objects), make, ".so")[0]
    return Built(library, {name: pair[1] for name, pair in made.items()})
