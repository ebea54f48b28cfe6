"""WITH_CUDA: a machine without nvcc builds the CPU package and says so; ON insists; OFF leaves CUDA out where nvcc is."""

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from cuda import fake_build, nvcc


def configure(tmp_path: Path, with_cuda: str, hidden: bool) -> subprocess.CompletedProcess[str]:
    """cmake's first step; `hidden`: with a PATH that has the compiler and build tools but no nvcc."""
    environment = dict(os.environ)
    if hidden:
        folder = tmp_path / "bin"
        folder.mkdir()
        for tool in ("c++", "g++", "cc", "gcc", "ld", "as", "ar", "ranlib", "sh"):
            found = shutil.which(tool)
            if found:
                (folder / tool).symlink_to(found)
        environment = {"PATH": str(folder), "HOME": str(tmp_path)}
    ninja = f"-DCMAKE_MAKE_PROGRAM={fake_build.tool('ninja')}"
    command = [fake_build.tool("cmake"), "-S", str(nvcc.ROOT), "-B", str(tmp_path / "b"), "-G", "Ninja", ninja, "-DGINGHAM_BINDING=OFF"]
    return subprocess.run([*command, f"-DWITH_CUDA={with_cuda}"], capture_output=True, text=True, env=environment)


def test_without_nvcc_the_cpu_package_is_built_and_it_is_said(tmp_path: Path) -> None:
    done = configure(tmp_path, "AUTO", hidden=True)
    assert done.returncode == 0 and "no CUDA compiler found, building the CPU backend only" in done.stdout, done.stdout + done.stderr


def test_on_insists(tmp_path: Path) -> None:
    done = configure(tmp_path, "ON", hidden=True)
    assert done.returncode != 0 and "WITH_CUDA=ON but no CUDA compiler" in done.stderr, done.stdout + done.stderr


@pytest.mark.skipif(nvcc.toolkit() is None, reason="no nvcc to be left out")
@pytest.mark.parametrize("with_cuda", ["AUTO", "OFF"])
def test_with_nvcc(tmp_path: Path, with_cuda: str) -> None:
    done = configure(tmp_path, with_cuda, hidden=False)
    said = "CUDA backend for" if with_cuda == "AUTO" else "building the CPU backend only"
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


def test_a_build_is_made_by_one_at_a_time() -> None:
    """The one that comes second finds what the first has built."""
    built: list[int] = []

    def build(number: int) -> None:
        with nvcc.alone("a test of the lock"):
            if not built:
                time.sleep(0.2)
                built.append(number)

    threads = [threading.Thread(target=build, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
