"""The interpreter itself: families of instructions against numpy, and what it must refuse (cuda/ptx/samples, compiled by nvcc)."""

import functools
import math

import numpy as np
import pytest

from cuda import nvcc
from cuda.ptx import Memory, Module, PtxError, launch, parse

pytestmark = pytest.mark.skipif(nvcc.toolkit() is None, reason="needs nvcc")

N = 192
RANDOM = np.random.default_rng(0)
INTS = RANDOM.integers(-(2**31), 2**31, (2, N)).astype(np.int32)
LONGS = RANDOM.integers(-(2**63), 2**63 - 1, (2, N))
FLOATS = RANDOM.standard_normal((2, N)).astype(np.float32)


@functools.cache
def sample(name: str) -> Module:
    from pathlib import Path

    source = Path(__file__).parent / "ptx" / "samples" / f"{name}.cu"
    return parse(nvcc.compile_ptx(source, "sm_80").read_text())


def run(
    module: str, name: str, inputs: list[np.ndarray], out: np.ndarray, *more: int | float, block: int = 64, **options: object
) -> np.ndarray:
    memory = Memory(1 << 20)
    args = [memory.array(values) for values in inputs]
    result = memory.array(out)
    launch(sample(module), [name], memory, -(-N // block), block, [*args, result, *more], **options)
    return memory.read(result)


def bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64) & 0xFFFFFFFF


def truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([int(abs(int(x)) // abs(int(y))) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b, strict=True)])


def test_integers() -> None:
    a, b = INTS
    got = run("arithmetic", "integers", [a, b], np.zeros((N, 12), np.int32), N).astype(np.int64)
    x, y, odd = a.astype(np.int64), b.astype(np.int64), (b | 1).astype(np.int64)
    quotient = truncated(x, odd)
    expected = [quotient, x - quotient * odd, x * y >> 32, x >> (y & 31), bits(a) // (bits(b) | 1)]
    expected += [np.bitwise_count(a.view(np.uint32)), np.array([32 - int(v).bit_length() for v in bits(a)])]
    expected += [np.array([int(f"{int(v):032b}"[::-1], 2) for v in bits(a)]), np.minimum(x, y)]
    whole = bits(a) | bits(b) << 32
    expected.append(sum((whole >> (8 * pick) & 0xFF) << (8 * i) for i, pick in enumerate((2, 6, 3, 5))))
    expected += [bits(b) << 11 | bits(a) >> 21, (x & y) ^ (x | ~y)]
    for i, column in enumerate(expected):
        assert (bits(got[:, i]) == bits(np.asarray(column))).all(), i


def test_longs() -> None:
    a, b = LONGS
    got = run("arithmetic", "longs", [a, b], np.zeros((N, 5), np.int64), N)
    for i in range(N):
        x, y = int(a[i]), int(b[i])
        low = [(v & 0xFFFFFFFF) - (1 << 32 if v & 0x80000000 else 0) for v in (x, y)]
        quotient = abs(x) // abs(y | 1) * (1 if (x < 0) == ((y | 1) < 0) else -1)
        expected = [x * y >> 64, (x % 2**64) * (y % 2**64) >> 64, quotient, x - quotient * (y | 1), low[0] * low[1]]
        assert [int(v) % 2**64 for v in got[i]] == [v % 2**64 for v in expected]


def test_bit_fields() -> None:
    a, b = INTS.view(np.uint32)
    got = run("arithmetic", "fields", [a, b], np.zeros((N, 3), np.uint32), N)
    for i in range(N):
        x, y, at, length = int(a[i]), int(b[i]), int(b[i]) % 40, int(b[i]) // 64 % 40
        field = (x >> at) & ((1 << length) - 1)
        sign = x >> min(at + length - 1, 31) & 1 if length else 0
        signed = field | (-1 << min(length, max(32 - at, 0)) if sign else 0)
        mask = ((1 << length) - 1) << at
        assert [int(v) for v in got[i]] == [
            field,
            signed & 0xFFFFFFFF,
            (x & mask ^ y & ~mask ^ x & mask ^ (x << at) & mask) & 0xFFFFFFFF,
        ], (at, length)


def test_floats() -> None:
    a, b = FLOATS
    got = run("arithmetic", "floats", [a, b], np.zeros((N, 14), np.float32), N)
    x, y = a.astype(float), b.astype(float)
    erf = np.vectorize(math.erf)
    expected = [
        x / y,
        np.sqrt(abs(x)),
        x * y + 1,
        np.exp(x),
        np.log(abs(x)),
        np.tanh(x),
        erf(x),
        np.minimum(x, y),
        np.copysign(x, y),
        x + y,
        x * y,
    ]
    expected += [np.rint(a * np.float32(8)), 1 / np.sqrt(abs(y)), np.where(x < y, np.floor(x), np.ceil(y))]
    for i, column in enumerate(expected):
        assert np.allclose(got[:, i], column, rtol=4e-7, atol=2e-7), i
    for exact in (0, 1, 2, 7, 8, 11, 13):
        assert (got[:, exact] == expected[exact].astype(np.float32)).all(), exact
    assert (abs(got[:, 9].astype(float)) <= abs(x + y)).all() and (got[:, 10].astype(float) >= x * y).all()


def test_doubles() -> None:
    a, b = FLOATS.astype(np.float64)
    got = run("arithmetic", "doubles", [a, b], np.zeros((N, 6)), N)
    expected = [a / b, np.sqrt(abs(a)), np.zeros(N), np.exp(a), np.vectorize(math.erf)(a), np.log(abs(a))]
    for i, column in enumerate(expected):
        assert np.allclose(got[:, i], column, rtol=4e-16, atol=2e-16), i


def bf16(values: np.ndarray, cut: bool = False) -> np.ndarray:
    raw = values.astype(np.float32).view(np.uint32).astype(np.int64)
    return raw >> 16 if cut else raw + 0x7FFF + (raw >> 16 & 1) >> 16


def test_conversions() -> None:
    a = FLOATS[0]
    got = run("arithmetic", "conversions", [a], np.zeros((N, 10), np.int32), N).astype(np.int64)
    half = a.astype(np.float16).view(np.uint16).astype(np.int64)
    triple = (a * np.float32(3)).astype(np.float16).view(np.uint16).astype(np.int64)
    raw = a.view(np.uint32).astype(np.int64)
    expected = [np.trunc(a * np.float32(100)), np.clip(np.rint(a.astype(float) * 1e10), -(2**31), 2**31 - 1), np.maximum(np.floor(a), 0)]
    expected += [bf16(a), half, bf16(a, cut=True), bf16(a) | bf16(-2 * a) << 16, half | triple << 16]
    expected += [np.trunc(a * np.float32(1000)).astype(np.int64).astype(np.int8), raw + 0x1000 & ~0x1FFF]
    for i, column in enumerate(expected):
        if i == 1:  # the product is rounded to float32 before
            assert np.allclose(got[:, i], column, rtol=1e-6)
        else:
            assert (bits(got[:, i]) == bits(column)).all(), i


def test_sixteen_bit_arithmetic() -> None:
    a, b = FLOATS
    raw = bf16(a).astype(np.uint16)
    x, y = (raw.astype(np.uint32) << 16).view(np.float32).astype(float), b.astype(np.float16).astype(float)
    got = run("arithmetic", "sixteen", [raw, b.astype(np.float16)], np.zeros((N, 6), np.float32), N)

    def narrow(values: np.ndarray) -> np.ndarray:
        return (bf16(values) << 16).astype(np.uint32).view(np.float32)

    expected = [narrow(x * x), narrow(x * x + x), (y * y).astype(np.float16), (y * y + y).astype(np.float16), np.maximum(x, 0.5)]
    expected.append((x > 0.25) & (y < 0.5))
    for i, column in enumerate(expected):
        assert (got[:, i] == column.astype(np.float32)).all(), i


def test_lanes_of_a_warp() -> None:
    x = RANDOM.integers(-100, 100, N).astype(np.int32)
    got = run("threads", "shuffles", [x], np.zeros((N, 8), np.int32))
    lane, warps = np.arange(32), x.reshape(-1, 32)
    down = np.where(lane % 8 + 2 < 8, lane + 2, lane)
    expected: list[np.ndarray] = [
        warps[:, lane ^ 5],
        warps[:, np.where(lane >= 3, lane - 3, lane)],
        warps[:, down],
        np.repeat(warps[:, 17:18], 32, axis=1),
    ]
    power, alike = np.left_shift(1, np.arange(32, dtype=np.int64)), np.zeros((1, 32), np.int64)
    for of_warp in ((warps > 0) @ power, (warps > 90).any(1) * 2 + 1, warps.sum(1)):
        expected.append(np.asarray(of_warp).reshape(-1, 1) + alike)
    rest = np.fmod(warps, 4)
    expected.append((rest[:, :, None] == rest[:, None, :]) @ power)
    for i, column in enumerate(expected):
        assert (bits(got[:, i]) == bits(column.reshape(-1))).all(), i


def test_lanes_part_and_meet_again() -> None:
    x = RANDOM.integers(1, 200, N).astype(np.int32)
    got = run("threads", "diverging", [x], np.zeros(N, np.int32))

    def steps(value: int) -> int:
        return 0 if value == 1 else 1 + steps(3 * value + 1 if value % 2 else value // 2)

    thread: np.ndarray = np.arange(N) % 64
    counts = np.array([steps(int(v)) for v in x]) + np.choose(thread % 3, [1000, 2000, 0])
    assert (got == np.repeat(counts.reshape(-1, 32).max(1), 32)).all()


def test_atomics() -> None:
    x = RANDOM.integers(0, 1000, N).astype(np.int32)
    memory = Memory(1 << 20)
    bins, total = memory.array(np.zeros(18, np.int32)), memory.array(np.zeros(1, np.float32))
    launch(sample("threads"), ["histogram"], memory, 3, 64, [memory.array(x), bins, total, N])
    got = memory.read(bins)
    assert (got[:16] == np.bincount(x & 15, minlength=16)).all() and got[16] == 2 and got[17] in (1, 2, 3)
    assert memory.read(total)[0] == 1.5


@pytest.mark.parametrize("seed", range(4))
def test_named_barriers(seed: int) -> None:
    x = FLOATS[0]
    got = run("threads", "handed_over", [x], np.zeros(N // 2, np.float32), dynamic_shared=128, seed=seed)
    assert (got.reshape(3, 32) == 2 * x.reshape(3, 64)[:, 32:][:, ::-1]).all()


def reversed_in_blocks(barrier: int, seed: int) -> bool:
    x = RANDOM.standard_normal(256).astype(np.float32)
    memory = Memory(1 << 20)
    at = memory.array(x)
    launch(sample("threads"), ["reversed"], memory, 2, 128, [at, barrier], seed=seed, groups=4)
    return bool(np.array_equal(memory.read(at), x.reshape(2, 128)[:, ::-1].reshape(-1)))


def test_a_missing_barrier_shows() -> None:
    assert all(reversed_in_blocks(1, seed) for seed in range(3))
    assert not any(reversed_in_blocks(0, seed) for seed in range(3))


def test_shared_memory_begins_as_nan() -> None:
    memory = Memory(1 << 20)
    out = memory.array(np.zeros(64, np.float32))
    launch(sample("threads"), ["unwritten"], memory, 1, 64, [out])
    got = memory.read(out)
    assert (got[:32] == 1).all() and np.isnan(got[32:]).all()


@pytest.mark.parametrize(("timing", "wait", "comes"), [("early", 1, True), ("late", 1, True), ("early", 0, True), ("late", 0, False)])
def test_asynchronous_copies_land_early_or_late(timing: str, wait: int, comes: bool) -> None:
    values = RANDOM.standard_normal((N, 4)).astype(np.float32)
    got = run("threads", "copied", [values], np.zeros((N, 4), np.float32), wait, 12, timing=timing)
    if comes:
        assert (got[:, :3] == values[:, :3]).all() and not got[:, 3].any()
    else:
        assert np.isnan(got).all()


def test_local_arrays_and_switches() -> None:
    x = RANDOM.integers(-1000, 1000, N).astype(np.int32)
    got = run("threads", "local_array", [x], np.zeros(N, np.int32), 5)
    thread = np.arange(N) % 64
    place = np.array([next(i for i in range(16) if (i * 7 + t) % 16 == 5) for t in thread])
    assert (got == x[place] + thread).all()
    got = run("threads", "switched", [x], np.zeros(N, np.int32))
    v = x.astype(np.int64)
    expected = np.choose(v & 7, [v * 3, v - 77, ~v, v << 3, truncated(v, np.full(N, 5)), v ^ 0x55, v * 0 + 1, v * 0 + 1])
    assert (got == expected).all()


def test_refusals() -> None:
    memory = Memory(1 << 20)
    out = memory.array(np.zeros(64, np.int32))
    with pytest.raises(PtxError, match=r"deadlock: .*bar\.sync"):
        launch(sample("threads"), ["stuck"], memory, 1, 64, [out])
    small = memory.array(np.zeros(100, np.float32))
    with pytest.raises(PtxError, match=r"out of bounds: 4 bytes .*(ld|st)\.global.* by block 0 thread 100"):
        launch(sample("threads"), ["reversed"], memory, 1, 128, [small, 1], groups=1)
    shifted = memory.array(np.zeros(64, np.float32), offset=2)
    with pytest.raises(PtxError, match="misaligned: 4 bytes"):
        launch(sample("threads"), ["unwritten"], memory, 1, 64, [shifted])
    with pytest.raises(PtxError, match=r"unknown opcode frobnicate\.s32"):
        launch(".target sm_80\n.visible .entry f()\n{\n.reg .b32 %r<2>;\nfrobnicate.s32 %r1, 1;\nret;\n}", ["f"], memory, 1, 1, [])
