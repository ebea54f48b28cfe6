"""Builds the CUDA backend over the fake runtime (tests/cuda/fake) with cmake, and a package that imports it.

kernels "cpu"        the CPU's kernels as work of the fake streams: for tests of order, events and messages
kernels "simulated"  the .cu files themselves through the shim, a fiber for every CUDA thread
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cuda import nvcc

ROOT = nvcc.ROOT


def tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name


def build(kernels: str, sanitizer: str = "", binding: bool = False, source: Path = ROOT, folder: Path | None = None) -> Path:
    """The build folder: pipeline_tests lies in it, libfakecuda.so and libsamegpu.so below gingham (with a sanitizer: in it)."""
    folder = folder or ROOT / "build" / "-".join(part for part in ("fake", kernels, sanitizer) if part)
    package = folder if sanitizer else folder / "gingham"
    options = {
        "GINGHAM_FAKE_CUDA": "ON",
        "GINGHAM_FAKE_KERNELS": "ON" if kernels == "cpu" else "OFF",
        "GINGHAM_SANITIZE": sanitizer,
        "GINGHAM_WERROR": "ON",
        "GINGHAM_OUTPUT": package,
        "GINGHAM_BINDING": "ON" if binding else "OFF",
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
    }
    tools = nvcc.toolkit()
    assert tools is not None
    defines = [f"-D{name}={value}" for name, value in (options | {"CUDA_INCLUDE": tools.include}).items()]
    with nvcc.alone("-".join(folder.resolve().parts[1:])):
        check(tool("cmake"), "-S", str(source), "-B", str(folder), "-G", "Ninja", *defines)
        check(tool("cmake"), "--build", str(folder), "--target", "pipeline_tests", "samegpu", *(["_C"] if binding else []))
        if binding:
            link_python(package)
    return folder


def link_python(package: Path) -> None:
    ours = ROOT / "python" / "gingham"
    for path in [*ours.glob("*.py"), *(path.parent for path in ours.glob("*/__init__.py"))]:
        link = package / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path)


def check(*command: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"


def environment(folder: Path, **more: str) -> dict[str, str]:
    library = next(path for path in (folder / "gingham" / "libfakecuda.so", folder / "libfakecuda.so") if path.exists())
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FAKE_", "GINGHAM_"))}
    kept |= {"GINGHAM_NCCL": str(library), "GINGHAM_BLAS": "plain", "FAKE_CUDA_DEVICES": "16", "OMP_NUM_THREADS": "1"}
    return kept | more


def package_environment(folder: Path, **more: str) -> dict[str, str]:
    """For a Python process that imports the fake package; its meshes are on the fake GPUs by default."""
    found = environment(folder, PYTHONPATH=str(folder), GINGHAM_DEVICE="cuda", **more)
    del found["GINGHAM_BLAS"]
    return found
