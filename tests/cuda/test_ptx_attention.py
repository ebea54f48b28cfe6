"""Rung 4 for attention: forward and backward in the interpreter against float64, and the bytes of device memory that its kernels move."""

import pytest

from cuda import nvcc
from cuda.ptx.attention import Case, attention
from cuda.ptx.host import Host
from cuda.ptx.report import Report

pytestmark = [pytest.mark.skipif(nvcc.toolkit() is None, reason="needs nvcc"), pytest.mark.timeout(1800)]
# p and ds are rounded to 16 bits between two products
LIMITS = {"bf16": 1e-2, "f16": 2e-3, "f32": 3e-6, "f64": 1e-14}
CASES = {
    "masked": Case(mask="bytes", p=0.3, width=20),
    "plain": Case(batch=2, causal=False),
    "added": Case(mask="added", p=0.2, heads=4, kv_heads=2),
    "tiles": Case(queries=80, keys=150, heads=1),
    "128": Case(width=72),
    "256": Case(width=136, keys=40),
}
ALL = [
    pytest.param(dtype, name, timing, marks=() if (dtype, name, timing) == ("bf16", "masked", "late") else pytest.mark.matrix)
    for dtype in LIMITS
    for name, case in CASES.items()
    for timing in ("late", "early")
    if dtype != "f64" or case.width <= 128
]


@pytest.mark.parametrize(("dtype", "name", "timing"), ALL)
def test_attention(report: Report, dtype: str, name: str, timing: str) -> None:
    host = Host(timing=timing, seed=3, groups=3)
    for what, got, expected in attention(host, CASES[name], dtype, pad=8 if name == "plain" else 0):
        limit = LIMITS[dtype] if what != "lse" else 1e-14 if dtype == "f64" else 1e-6
        report.check(f"attention {dtype} {name} {timing}: {what}", got, expected, limit)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_bytes_of_device_memory(dtype: str) -> None:
    """Forward: queries once, keys and values once a tile of 64 queries; out, top and sum written, and read where something stood there. The
    gradients: their own rows and sums once, the others once a tile, lse and delta as often as queries, or by all four lanes of a row."""
    case, item = Case(queries=70, keys=40, heads=2, kv_heads=1, causal=False), {"bf16": 2, "f32": 4}[dtype]
    host = Host(seed=3)
    for _ in attention(host, case, dtype):
        pass
    moved: dict[str, list[tuple[int, int]]] = {"forward": [], "backward": []}
    for each in host.launches:
        for kind, found in moved.items():
            if f"attention_{kind}" in each.name:
                found.append((each.counts.read, each.counts.written))
    wide, narrow = case.heads * case.width, case.kv_heads * case.width
    numbers = case.heads * 35  # of top, sum, lse, delta
    out, keys = 35 * wide, 20 * narrow
    # two runs of 35 queries for each of two runs of 20 keys, a tile each
    for index, got in enumerate(moved["forward"]):
        before = 4 * out if index >= 2 else 0
        assert got == (item * (out + 2 * case.heads * 20 * case.width) + 8 * numbers + before, 4 * out + 8 * numbers), (index, got)
    for index, got in enumerate(moved["backward"]):
        if index % 2 == 0:  # of keys
            assert got == (item * (2 * keys + 2 * out) + 8 * numbers + 2 * 4 * keys, 2 * 4 * keys), (index, got)
        else:
            assert got == (item * (2 * out + 2 * case.heads * 20 * case.width) + 4 * 8 * numbers + 4 * out, 4 * out), (index, got)
