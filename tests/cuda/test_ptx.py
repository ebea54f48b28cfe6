"""Rung 4: the PTX nvcc writes for csrc/kernels, run by the interpreter of cuda/ptx and compared with float64. The kernels' own host code
chooses tiles and arguments. Not seen here: speed, ptxas, the order in which threads see plain stores. A table of the errors is printed at
the end.
"""

import ctypes
import math
import time
from typing import Any

import numpy as np
import pytest

from cuda import nvcc
from cuda.ptx.host import Host, View
from cuda.ptx.report import Report

pytestmark = pytest.mark.skipif(nvcc.toolkit() is None, reason="needs nvcc")

TIMINGS = ["early", "late"]
# relative to the largest element; tf32 keeps 10 bits of each factor
LIMITS = {"bf16": 1e-6, "f16": 1e-6, "f32": 2e-6, "tf32": 1e-3, "f64": 1e-14}
STEP = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-22, "f64": 2.0**-48}  # of results rounded to the layer's type


def normal(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols))


def gelu(z: np.ndarray) -> np.ndarray:
    return z / 2 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def silu(z: np.ndarray) -> np.ndarray:
    return z / (1 + np.exp(-z))


def slope(kind: str, z: np.ndarray) -> np.ndarray:
    if kind == "gelu":
        return (1 + np.vectorize(math.erf)(z / math.sqrt(2))) / 2 + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    s = 1 / (1 + np.exp(-z))
    return s + z * s * (1 - s)


def check_gemm(
    report: Report,
    shape: tuple[int, int, int],
    dtype: str,
    orders: str,
    timing: str,
    accumulate: bool,
    pad: int = 0,
    offset: int = 0,
    groups: int = 2,
) -> Host:
    """orders: of A, B, C, r (rows contiguous) or c."""
    m, n, k = shape
    tf32, kind = dtype == "tf32", "f32" if dtype == "tf32" else dtype
    host = Host(timing=timing, seed=m + n + k, groups=groups)
    a = host.matrix(normal(m, k, 1), kind, orders[0] == "c", pad, offset)
    b = host.matrix(normal(k, n, 2), kind, orders[1] == "c", pad, offset)
    wide = "f64" if dtype == "f64" else "f32"
    c = host.matrix(normal(m, n, 3), wide, orders[2] == "c", pad) if accumulate else host.empty(m, n, wide, orders[2] == "c", pad)
    before = host.read(c) if accumulate else 0
    host.gemm(a, b, c, accumulate, tf32=tf32)
    name = f"gemm {m}x{n}x{k} {dtype} {orders} {timing}{' +=' if accumulate else ''}{f' pad {pad}' if pad else ''}"
    report.check(name, host.read(c), before + host.read(a) @ host.read(b), LIMITS[dtype])
    return host


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("orders", ["rrr", "rcr", "crr", "ccr"])
def test_gemm_bf16_in_every_order(report: Report, orders: str, timing: str) -> None:
    check_gemm(report, (136, 128, 90), "bf16", orders, timing, accumulate=True)
    check_gemm(report, (136, 128, 88), "bf16", orders, timing, accumulate=False)


@pytest.mark.parametrize("dtype", ["f16", "tf32", "f32", "f64"])
def test_gemm_of_every_type(report: Report, dtype: str) -> None:
    check_gemm(report, (72, 56, 90), dtype, "rcr", "late", accumulate=True)
    check_gemm(report, (72, 56, 90), dtype, "crc", "early", accumulate=False, pad=3, offset=1)


def test_gemm_256_bf16_takes_seconds(report: Report) -> None:
    start = time.perf_counter()
    check_gemm(report, (256, 256, 256), "bf16", "rrr", "late", accumulate=False)
    assert time.perf_counter() - start < 10


@pytest.mark.matrix
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "tf32", "f32", "f64"])
@pytest.mark.parametrize("shape", [(136, 128, 90), (1, 70, 33), (65, 1, 64), (130, 66, 192), (64, 64, 1)])
def test_gemm_matrix(report: Report, shape: tuple[int, int, int], dtype: str, timing: str) -> None:
    for orders in ("rrr", "rcr", "crr", "ccr", "rrc", "rcc", "crc", "ccc"):
        check_gemm(report, shape, dtype, orders, timing, accumulate=True, pad=(0, 8)[orders[0] == "r"])
    check_gemm(report, shape, dtype, "rrr", timing, accumulate=False, pad=1, offset=3, groups=4)


@pytest.mark.matrix
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
def test_gemm_large_tiles(report: Report, dtype: str, timing: str) -> None:
    """Half of the multiprocessors have a tile; shallow, so that it takes seconds."""
    for orders in ("rr", "rc", "cr", "cc"):
        host = check_gemm(report, (1040, 2056, 72), dtype, orders + "r", timing, accumulate=False)
        assert host.launches[0].block[0] == 256


def test_gemm_in_pieces_of_k(report: Report) -> None:
    host = check_gemm(report, (40, 24, 1100), "bf16", "rcr", "late", accumulate=True)
    assert [launched.grid[2] for launched in host.launches] == [2, 1]


@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_gemm_with_its_tail(report: Report, kind: str) -> None:
    host = Host(seed=3)
    m, n, k = 72, 80, 64
    a, b = host.matrix(normal(m, k, 1), "bf16"), host.matrix(normal(k, n, 2), "bf16", column_major=True)
    bias, residual = host.matrix(normal(1, n, 3), "bf16"), host.matrix(normal(m, n, 4), "bf16")
    z, y = host.empty(m, n, "bf16"), host.empty(m, n, "bf16")
    host.gemm(a, b, None, tail=host.tail(kind, bias=bias, residual=residual, z=z, y=y))
    linear = host.read(a) @ host.read(b) + host.read(bias)
    report.check(f"gemm's tail, Z with bias ({kind})", host.read(z), linear, STEP["bf16"])
    report.check(
        f"gemm's tail, Y = {kind}(Z) + residual",
        host.read(y),
        (gelu if kind == "gelu" else silu)(linear) + host.read(residual),
        STEP["bf16"],
    )


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
def test_epilogue_and_its_gradient(report: Report, dtype: str) -> None:
    for kind, function in (("gelu", gelu), ("silu", silu)):
        host = Host(seed=1)
        m, n = 37, 44
        wide = "f64" if dtype == "f64" else "f32"
        c, bias = host.matrix(normal(m, n) * 2, wide), host.matrix(normal(1, n, 3), dtype)
        z, y, dz = (host.empty(m, n, dtype) for _ in range(3))
        host.run("epilogue", c, host.tail(kind, bias=bias, z=z, y=y))
        linear = host.read(c) + host.read(bias)
        report.check(f"epilogue {dtype} {kind}: Z", host.read(z), linear, STEP[dtype])
        report.check(f"epilogue {dtype} {kind}: Y", host.read(y), function(linear), STEP[dtype])
        dy = host.matrix(normal(m, n, 5), dtype)
        host.run("activation_backward", dy, z, dz, {"gelu": 1, "silu": 2}[kind])
        report.check(f"activation_backward {dtype} {kind}", host.read(dz), host.read(dy) * slope(kind, host.read(z)), 2 * STEP[dtype])


def rounded(host: Host, values: np.ndarray, dtype: str) -> np.ndarray:
    return host.read(host.matrix(values, dtype))


@pytest.mark.parametrize("orders", [("r", "r"), ("r", "c"), ("c", "r")])
@pytest.mark.parametrize("pair", [("bf16", "f32"), ("f32", "bf16"), ("f16", "f32"), ("f32", "f16"), ("f32", "f32"), ("bf16", "bf16")])
def test_cast(report: Report, pair: tuple[str, str], orders: tuple[str, str]) -> None:
    host = Host(seed=2)
    for rows, cols, pad in ((70, 33, 0), (64, 96, 3)):
        source = host.matrix(normal(rows, cols), pair[0], orders[0] == "c", pad)
        target = host.empty(rows, cols, pair[1], orders[1] == "c", pad)
        host.run("cast", source, target)
        report.check(
            f"cast {'->'.join(pair)} {rows}x{cols} {''.join(orders)}",
            host.read(target),
            rounded(host, host.read(source), pair[1]),
            0,
        )


@pytest.mark.parametrize("dtype", ["bytes1", "bytes2", "bytes4", "bytes8"])
def test_copies_and_zeros_of_bytes(report: Report, dtype: str) -> None:
    host = Host(seed=2)
    values = np.random.default_rng(1).integers(1, 255, (65, 39))
    source, target = host.matrix(values, dtype), host.empty(65, 39, dtype, column_major=True, pad=1)
    host.run("cast", source, target)
    report.check(f"copy {dtype}", host.read(target).astype(float), values.astype(float), 0)
    host.run("fill_zero", target)
    assert not host.read(target).any()


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_accumulate(report: Report, dtype: str) -> None:
    host = Host(seed=2)
    for rows, cols, pad in ((33, 65, 0), (32, 64, 4), (5, 7, 1)):
        a, b = host.matrix(normal(rows, cols, 1), dtype, pad=pad), host.matrix(normal(rows, cols, 2), dtype)
        expected = host.read(a) + host.read(b)
        host.run("accumulate", a, b)
        report.check(f"accumulate {dtype} {rows}x{cols}", host.read(b), rounded(host, expected, dtype), 0)


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
def test_column_sums(report: Report, dtype: str, column_major: bool) -> None:
    host = Host(seed=4)
    a = host.matrix(normal(300, 70) + 1, dtype, column_major)
    out = host.matrix(normal(1, 70, 5), "f64" if dtype == "f64" else "f32")
    expected = host.read(a).sum(0) + host.read(out)[0]
    host.run("column_sums", a, out, 1)
    report.check(f"column sums {dtype} {'c' if column_major else 'r'}", host.read(out)[0], expected, 1e-14 if dtype == "f64" else 1e-6)
    if dtype in ("bf16", "f16"):  # rounded to their own dtype, by way of float32
        wide, narrow = host.empty(1, 70, "f32"), host.empty(1, 70, dtype)
        host.run("column_sums", a, wide, 0)
        host.run("column_sums", a, narrow, 0)
        report.check(f"column sums of {dtype}, rounded", host.read(narrow), rounded(host, host.read(wide), dtype), 0)


@pytest.mark.parametrize("sizes", [(3, 5, 30, 4, 6, 40, 1, 1, 7), (1, 2, 4610, 1, 2, 9220, 0, 0, 4610)])
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
def test_dropout_draws_the_same_bits_as_the_cpu(report: Report, dtype: str, sizes: tuple[int, ...]) -> None:
    """sizes: local, global, offset. Runs that packs miss, and that they cross."""
    host = Host(seed=4)
    rows, cols = sizes[0] * sizes[1], sizes[2]
    x: View = host.matrix(normal(rows, cols), dtype)
    y: View = host.empty(rows, cols, dtype)
    expected = np.zeros_like(host.memory.read(x.address))
    sizes_ = np.array(sizes, np.int64)
    given = host.memory.read(x.address)
    assert (
        host.library.host_cpu_dropout(*(pointer(v) for v in (given, expected)), x.matrix.dtype, 3, pointer(sizes_), ctypes.c_double(0.3))
        == 0
    )
    host.call(
        "host_dropout",
        ctypes.c_void_p(x.matrix.data),
        ctypes.c_void_p(y.matrix.data),
        x.matrix.dtype,
        3,
        pointer(sizes_),
        ctypes.c_double(0.3),
    )
    got = host.memory.read(y.address)
    assert got.tobytes() == expected.tobytes()
    report.add(f"dropout {dtype}, bits", 0.0)


def pointer(values: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)


def test_column_sums_of_more_slabs_than_a_grid_is_high(monkeypatch: pytest.MonkeyPatch) -> None:
    """65535 slabs of 256 rows a launch; only the launches are looked at."""
    grids: list[tuple[int, int]] = []

    def noted(host: Host, name: bytes, sizes: Any, shared: int, args: Any) -> int:
        grids.append((sizes[0], sizes[1]))
        return 0

    monkeypatch.setattr(Host, "launched", noted)
    host = Host(capacity=256 << 20)
    a, out = host.empty(65535 * 256 + 1, 2, "bf16"), host.empty(1, 2, "f32")
    host.run("column_sums", a, out, 0)
    assert grids == [(1, 65535), (1, 1), (1, 1)]
