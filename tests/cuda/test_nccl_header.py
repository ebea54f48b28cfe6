"""Rung 1: what csrc/transport/nccl_api.h declares is what the real nccl.h of PyPI's wheel says."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cuda import nvcc

pytestmark = [pytest.mark.matrix, pytest.mark.skipif(nvcc.toolkit() is None, reason="no nvcc: nccl.h needs the toolkit's headers")]

COMPARE = """
#include <nccl.h>
#include "transport/nccl_api.h"
#include <type_traits>
using gingham::NcclApi;
#define SAME(name) static_assert(std::is_same_v<decltype(NcclApi::name), decltype(&nccl##name)>, #name)
SAME(GetVersion); SAME(GetUniqueId); SAME(CommInitRank); SAME(CommSplit); SAME(CommDestroy); SAME(CommAbort); SAME(CommGetAsyncError);
SAME(GetErrorString); SAME(GroupStart); SAME(GroupEnd); SAME(Send); SAME(Recv); SAME(AllGather); SAME(ReduceScatter); SAME(AllReduce);
static_assert(sizeof(ncclUniqueId) == 128 && ncclSuccess == 0 && ncclInvalidUsage == 5 && ncclRemoteError == 6 && ncclInProgress == 7);
static_assert(ncclInt8 == 0 && ncclFloat32 == 7 && ncclSum == 0);
int main() {}
"""


@pytest.fixture(scope="session")
def header() -> Path:
    """The folder of nccl.h; 300 MB are fetched once, a header is kept."""
    folder = nvcc.ROOT / "build" / "nccl"
    kept = folder / "nvidia" / "nccl" / "include"
    if not (kept / "nccl.h").exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), "nvidia-nccl-cu13"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nvidia-nccl-cu13 could not be fetched: {done.stderr[-300:]}")
        (wheel,) = folder.glob("nvidia_nccl_cu13-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract("nvidia/nccl/include/nccl.h", folder)
        wheel.unlink()
    return kept


def compiles(text: str, header: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    source = tmp_path / "compare.cc"
    source.write_text(text)
    tools = nvcc.toolkit()
    assert tools is not None
    paths = [f"-I{nvcc.CSRC}", "-isystem", str(header), "-isystem", str(tools.include)]
    return subprocess.run(["g++", "-std=c++20", "-fsyntax-only", *paths, str(source)], capture_output=True, text=True)


def test_prototypes_are_nccls(header: Path, tmp_path: Path) -> None:
    done = compiles(COMPARE, header, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_difference_would_be_seen(header: Path, tmp_path: Path) -> None:
    done = compiles(
        COMPARE.replace("SAME(Send);", "static_assert(std::is_same_v<decltype(NcclApi::Send), decltype(&ncclRecv)>);"), header, tmp_path
    )
    assert done.returncode != 0


def test_our_own_numbers_are_the_same(tmp_path: Path) -> None:
    """Without nccl.h the header's own declarations are used: the same numbers, asserted without it."""
    text = COMPARE.replace("#include <nccl.h>\n", "")
    text = "\n".join(line for line in text.splitlines() if "SAME" not in line)
    done = compiles(text, tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
