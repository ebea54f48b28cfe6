"""Rung 4 of the Hopper gemm: TMA, mbarriers and warpgroup products as cuda/ptx models them, against float64, and its start-up check."""

import ctypes
import math
import re

import numpy as np
import pytest

from cuda import mutations, nvcc
from cuda.kernel_faults import FAULTS
from cuda.ptx.host import Host, View
from cuda.ptx.parse import PtxError
from cuda.ptx.report import Report

pytestmark = pytest.mark.skipif(nvcc.toolkit() is None, reason="needs nvcc")

ORDERS = ["rr", "rc", "cr", "cc"]
LIMIT = 1e-6


def normal(rows: int, cols: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols))


def way_out(kernel: str) -> str:
    """The last template argument, of a name that may be mangled."""
    found = re.search(r"sm90_kernel.*?(?:Li(\d)EEEv|, (\d)>)", kernel)
    assert found, kernel
    return ("slabs", "halves", "sums")[int(found[1] or found[2])]


def check(
    report: Report,
    shape: tuple[int, int, int],
    dtype: str,
    orders: str,
    timing: str,
    wide: int,
    accumulate: bool = False,
    pad: int = 0,
    groups: int = 3,
) -> None:
    m, n, k = shape
    host = Host(timing=timing, seed=m + n + k, groups=groups)
    a, b = host.matrix(normal(m, k, 1), dtype, orders[0] == "c", pad), host.matrix(normal(k, n, 2), dtype, orders[1] == "c", pad)
    c = host.matrix(normal(m, n, 3), "f32", pad=pad) if accumulate else host.empty(m, n, "f32", pad=pad)
    before = host.read(c) if accumulate else 0
    host.sm90(a, b, c, accumulate, wide=wide)
    name = f"sm_90a {m}x{n}x{k} {dtype} {orders} {timing} wide {wide}{' +=' if accumulate else ''}{f' pad {pad}' if pad else ''}"
    report.check(name, host.read(c), before + host.read(a) @ host.read(b), LIMIT)


@pytest.mark.parametrize("orders", ORDERS)
def test_every_order_with_cut_tiles(report: Report, orders: str) -> None:
    check(report, (136, 264, 200), "bf16", orders, "late", 256, accumulate=True)
    check(report, (136, 264, 200), "f16", orders, "early", 128)


@pytest.mark.parametrize("timing", ["early", "late"])
def test_many_tiles(report: Report, timing: str) -> None:
    check(report, (520, 600, 64), "bf16", "rc", timing, 128, accumulate=True)  # 25 tiles of one step
    check(report, (392, 776, 136), "bf16", "rr", timing, 256, groups=5)


def test_more_steps_than_stages(report: Report) -> None:
    check(report, (64, 128, 1000), "bf16", "rc", "late", 128)
    check(report, (64, 128, 1000), "bf16", "cr", "early", 256)


def test_columns_that_no_word_of_16_bytes_divides(report: Report) -> None:
    check(report, (136, 90, 72), "bf16", "rc", "late", 128, accumulate=True, pad=8)


@pytest.mark.parametrize("wide", [128, 256])
def test_no_bank_conflicts(wide: int) -> None:
    """On each way out of the registers."""
    host = Host(timing="early", conflicts={})
    a, b = host.matrix(normal(128, 64, 1), "bf16"), host.matrix(normal(64, 256, 2), "bf16")
    z = host.empty(128, 256, "bf16")
    host.sm90(a, b, host.empty(128, 256, "f32"), wide=wide)
    host.sm90(a, b, None, tail=host.tail("none", z=z), wide=wide)
    host.sm90(a, b, host.empty(128, 256, "f32"), tail=host.tail("none", z=z), wide=wide)
    assert [way_out(launched.name) for launched in host.launches] == ["sums", "halves", "slabs"]
    assert host.conflicts == {}


@pytest.mark.parametrize("timing", ["early", "late"])
def test_sums_are_added_where_they_lie(report: Report, timing: str) -> None:
    """C += A B by the accelerator: to the bit what fp32 makes of C and the product; nothing is written beside C."""
    host = Host(timing=timing, seed=7)
    m, n, k = 150, 296, 72
    a, b = host.matrix(np.rint(normal(m, k, 1) * 3), "bf16"), host.matrix(np.rint(normal(k, n, 2) * 3), "bf16")  # exact sums
    c = host.matrix(normal(m, n, 3), "f32", pad=4)
    expected = host.read(c).astype(np.float32) + (host.read(a) @ host.read(b)).astype(np.float32)
    host.sm90(a, b, c, True, wide=256)
    assert way_out(host.launches[-1].name) == "sums"
    report.check(f"sm_90a +=, {timing}", host.read(c), expected, 0)


def test_sums_leave_through_slabs_where_boxes_cannot(report: Report) -> None:
    """C whose lines begin anywhere, C with a tail behind it."""
    host = Host(timing="late", seed=8)
    m, n, k = 136, 264, 136
    a, b = host.matrix(normal(m, k, 1), "bf16"), host.matrix(normal(k, n, 2), "bf16")
    product = host.read(a) @ host.read(b)
    odd, even, z = host.matrix(normal(m, n, 3), "f32", pad=1), host.matrix(normal(m, n, 4), "f32"), host.empty(m, n, "bf16")
    before = host.read(odd), host.read(even)
    host.sm90(a, b, odd, True, wide=256)
    host.sm90(a, b, even, True, tail=host.tail("none", z=z), wide=128)
    assert [way_out(launched.name) for launched in host.launches] == ["slabs", "slabs"]
    report.check("sm_90a += in slabs, odd lines", host.read(odd), before[0] + product, LIMIT)
    report.check("sm_90a += in slabs, with a tail", host.read(even), before[1] + product, LIMIT)
    report.check("sm_90a += in slabs, its tail", host.read(z), before[1] + product, 2.0**-8)


@pytest.mark.matrix
@pytest.mark.parametrize("wide", [128, 256])
@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("shape", [(136, 128, 90), (1, 70, 33), (65, 1, 64), (130, 66, 192), (256, 520, 712)])
def test_matrix(report: Report, shape: tuple[int, int, int], dtype: str, timing: str, wide: int) -> None:
    m, n, k = shape
    for orders in ORDERS:
        lengths = [m if orders[0] == "c" else k, k if orders[1] == "c" else n]
        pad = (
            next(pad for pad in range(64) if all((length + pad) % 8 == 0 for length in lengths))
            if lengths[0] % 8 == lengths[1] % 8
            else None
        )
        if pad is None:  # one padding cannot align both
            continue
        check(report, shape, dtype, orders, timing, wide, accumulate=True, pad=pad)


def test_pieces_of_k_and_the_tail(report: Report) -> None:
    host = Host(timing="late", seed=5)
    m, n, k = 72, 136, 200
    a, b = host.matrix(normal(m, k, 1), "bf16"), host.matrix(normal(k, n, 2), "bf16")
    for apart, way in ((m, "slabs"), (128, "sums")):  # boxes where pieces lie whole tiles apart
        pieces = host.empty(2 * apart, n, "f32")
        host.sm90(a, b, pieces, piece=128)
        assert way_out(host.launches[-1].name) == way
        for i, (begin, end) in enumerate([(0, 128), (128, 200)]):
            part = host.read(a)[:, begin:end] @ host.read(b)[begin:end]
            report.check(f"sm_90a, piece {i} of k, {way}", host.read(pieces)[i * apart : i * apart + m], part, LIMIT)
    bias, z, y = host.matrix(normal(1, n, 3), "bf16"), host.empty(m, n, "bf16"), host.empty(m, n, "bf16")
    host.sm90(a, b, None, tail=host.tail("silu", bias=bias, z=z, y=y))
    linear = host.read(a) @ host.read(b) + host.read(bias)
    report.check("sm_90a's tail, Z with bias", host.read(z), linear, 2.0**-8)
    report.check("sm_90a's tail, Y = silu(Z)", host.read(y), linear / (1 + np.exp(-linear)), 2.0**-8)


@pytest.mark.parametrize("wide", [128, 256])
@pytest.mark.parametrize(("dtype", "timing"), [("bf16", "early"), ("f16", "late")])
def test_results_in_16_bits_leave_in_boxes(report: Report, dtype: str, timing: str, wide: int) -> None:
    """Z with bias, and Y = gelu(Z), in whole lines; nothing is written beyond their ends, rows and columns cut in a box."""
    host = Host(timing=timing, seed=wide)
    m, n, k = 150, 2 * wide + 40, 136
    a, b = host.matrix(normal(m, k, 1), dtype), host.matrix(normal(k, n, 2), dtype, True)
    bias = host.matrix(normal(1, n + 3, 3), dtype, offset=0)
    for offset in (0, 1):  # a bias that begins at an odd number of 16 bits
        bias = host.matrix(normal(1, n, 3 + offset), dtype, offset=offset)
        z, y = host.empty(m, n, dtype, pad=8), host.empty(m, n, dtype)
        host.sm90(a, b, None, tail=host.tail("gelu", bias=bias, z=z, y=y), wide=wide)
        linear = host.read(a) @ host.read(b) + host.read(bias)
        bound = 2.0**-8 if dtype == "bf16" else 2.0**-11
        name = f"sm_90a {dtype} {timing} wide {wide}, bias at {offset}"
        report.check(f"{name}, Z in boxes", host.read(z), linear, bound)
        report.check(f"{name}, Y in boxes", host.read(y), linear * 0.5 * (1 + np.vectorize(math.erf)(linear / 2**0.5)), bound)
    plain = host.empty(m, n, dtype)
    host.sm90(a, b, None, tail=host.tail("none", z=plain), wide=wide)
    report.check(f"sm_90a {dtype} {timing} wide {wide}, Z alone", host.read(plain), host.read(a) @ host.read(b), bound)
    assert all(way_out(launched.name) == "halves" for launched in host.launches), host.launches[-1].name


def takes(host: Host, a: View, b: View) -> bool:
    return bool(host.library.host_sm90_takes(ctypes.byref(a.matrix), ctypes.byref(b.matrix)))


def test_refuses_what_the_accelerator_cannot_read() -> None:
    host = Host()
    fine = host.matrix(normal(64, 64, 1), "bf16")
    assert takes(host, fine, fine)
    assert not takes(host, host.matrix(normal(64, 60, 1), "bf16"), host.matrix(normal(60, 64, 1), "bf16"))
    assert not takes(host, host.matrix(normal(64, 64, 1), "bf16", offset=1), fine)
    assert not takes(host, fine, host.matrix(normal(64, 64, 1), "bf16", pad=4))
    assert takes(host, fine, host.matrix(normal(64, 64, 1), "bf16", pad=8, offset=8))
    assert takes(host, host.matrix(normal(1, 60, 1), "bf16"), host.matrix(normal(60, 64, 1), "bf16"))


def checked(host: Host, number: int, capability: tuple[int, int], capturing: bool = False) -> tuple[bool, str]:
    host.library.host_device(number, *capability, int(capturing))
    on = ctypes.c_int(-1)
    host.call("host_sm90_checked", ctypes.byref(on))
    status = host.library.host_sm90_status().decode()
    host.library.host_device(0, 8, 0, 0)
    return bool(on.value), status


def test_the_check_is_off_elsewhere_and_waits_for_the_end_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    assert checked(host, 10, (8, 0)) == (False, "off: the device has compute capability 8.0, not 9.0")
    assert checked(host, 11, (12, 0)) == (False, "off: the device has compute capability 12.0, not 9.0")
    on, status = checked(host, 12, (9, 0), capturing=True)
    assert not on and "not checked yet" in status
    monkeypatch.setenv("GINGHAM_SM90", "0")
    assert checked(host, 12, (9, 0)) == (False, "off: GINGHAM_SM90=0")
    assert not host.launches


def test_a_fault_of_the_check_is_named() -> None:
    """A context that has ended fails every later call: said where it happened, with the way out."""
    host = Host()
    host.library.host_fault(715)  # cudaErrorIllegalInstruction
    try:
        with pytest.raises(PtxError, match=r"GPU 50: .*cudaErrorIllegalInstruction.*GINGHAM_SM90=0"):
            checked(host, 50, (9, 0))
    finally:
        host.library.host_fault(0)
        host.library.host_device(0, 8, 0, 0)


@pytest.mark.matrix
@pytest.mark.parametrize("timing", ["early", "late"])
def test_the_check_passes(report: Report, timing: str) -> None:
    host = Host(timing=timing, seed=2)
    assert checked(host, 20 + len(timing), (9, 0)) == (True, "on")
    report.add(f"sm_90a's start-up check, {timing}, {len(host.launches)} launches", 0.0)


@pytest.mark.matrix
def test_gemm_takes_it_once_the_check_has_passed(report: Report) -> None:
    host = Host(timing="late", seed=4)
    a, b = host.matrix(normal(1000, 72, 1), "bf16"), host.matrix(normal(72, 760, 2), "bf16")
    c, turned = host.empty(1000, 760, "f32"), host.empty(1000, 760, "f32", column_major=True)
    assert checked(host, 30, (9, 0))[0]
    host.library.host_device(30, 9, 0, 0)
    host.launches.clear()
    host.gemm(a, b, c)
    host.gemm(a, b, turned)
    host.library.host_device(0, 8, 0, 0)
    assert ["sm90_kernel" in launched.name for launched in host.launches] == [True, True]
    report.check("gemm through the Hopper kernel", host.read(c), host.read(a) @ host.read(b), LIMIT)
    # not to the bit: the model's products are numpy's, whose order of sums is another for a turned operand on some processors
    report.check("the same, turned", host.read(turned), host.read(a) @ host.read(b), LIMIT)


@pytest.mark.matrix
def test_gemm_sums_pieces_of_a_long_k_apart(report: Report) -> None:
    """15 tiles for 132 multiprocessors: 3 pieces of K, added in order, to C and for a tail; the same bits each time."""
    host = Host(timing="early", seed=6)
    m, n, k = 520, 760, 3200
    a, b = host.matrix(normal(m, k, 1), "bf16"), host.matrix(normal(k, n, 2), "bf16")
    sums = [host.matrix(normal(m, n, 3), "f32") for _ in range(2)]
    before, z = host.read(sums[0]), host.empty(m, n, "bf16")
    assert checked(host, 31, (9, 0))[0]
    host.library.host_device(31, 9, 0, 0)
    host.launches.clear()
    for c in sums:
        host.gemm(a, b, c, True)
    host.gemm(a, b, None, tail=host.tail("none", z=z))
    host.library.host_device(0, 8, 0, 0)
    assert [("sm90_kernel" in launched.name, launched.grid[2]) for launched in host.launches] == [(True, 3), (False, 1)] * 3
    assert [way_out(launched.name) for launched in host.launches[::2]] == ["sums"] * 3
    product = host.read(a) @ host.read(b)
    report.check("sm_90a, C += pieces of k", host.read(sums[0]), before + product, LIMIT)
    report.check("sm_90a, the same again", host.read(sums[1]), host.read(sums[0]), 0)
    report.check("sm_90a, Z of pieces of k", host.read(z), product, 2.0**-8)


@pytest.mark.matrix
def test_a_wrong_kernel_stays_off(report: Report) -> None:
    fault = next(fault for fault in FAULTS if fault.name == "rows of the second consumer")
    host = Host(timing="late", seed=2, csrc=mutations.copied(fault, changed=True), unit=fault.unit)
    assert checked(host, 40, (9, 0)) == (False, "off: its results differ from those of the sm_80 kernels")
    report.add("sm_90a's start-up check of a wrong kernel", 0.0)
