"""Rung 1: nvcc compiles every kernel for sm_80 and sm_90a, and warns of nothing."""

import functools
from pathlib import Path

import pytest

from cuda import nvcc

pytestmark = [pytest.mark.skipif(nvcc.toolkit() is None, reason="no nvcc"), pytest.mark.timeout(900)]
all_compiled = functools.cache(nvcc.compile_kernels)


@pytest.mark.parametrize("arch", nvcc.ARCHITECTURES)
@pytest.mark.parametrize("source", nvcc.kernels(), ids=lambda path: path.stem)
def test_kernel_compiles_without_a_warning(source: Path, arch: str) -> None:
    all_compiled()
    cubin, _ = nvcc.compile_cubin(source, arch)
    assert cubin.read_bytes()[:4] == b"\x7fELF"


def test_every_kernel_header_with_a_twin_has_a_device_source() -> None:
    headers = [path for path in (nvcc.CSRC / "kernels").glob("*.h") if "namespace cuda" in path.read_text()]
    missing = [path.name for path in headers if not path.with_suffix(".cu").exists()]
    assert not missing, missing
