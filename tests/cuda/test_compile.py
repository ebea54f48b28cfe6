"""Rung 1: nvcc compiles every kernel, and warns of nothing. The package itself is built for both architectures with warnings as errors."""

import functools
from pathlib import Path

import pytest

from cuda import nvcc

pytestmark = [pytest.mark.skipif(nvcc.toolkit() is None, reason="no nvcc"), pytest.mark.timeout(900)]
all_compiled = functools.cache(nvcc.compile_kernels)


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.matrix), "sm_90a"])
@pytest.mark.parametrize("source", nvcc.kernels(), ids=lambda path: path.stem)
def test_kernel_compiles_without_a_warning(source: Path, arch: str) -> None:
    all_compiled((arch,))
    cubin, _ = nvcc.compile_cubin(source, arch)
    assert cubin.read_bytes()[:4] == b"\x7fELF"


def test_every_kernel_header_with_a_twin_has_a_device_source() -> None:
    headers = [path for path in (nvcc.CSRC / "kernels").glob("*.h") if "namespace cuda" in path.read_text()]
    missing = [path.name for path in headers if not path.with_suffix(".cu").exists()]
    assert not missing, missing
