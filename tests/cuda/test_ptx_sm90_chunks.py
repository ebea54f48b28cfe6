"""Blocks of the Hopper gemm that compute several tiles: results, and what is under way beside what, in the interpreter of cuda/ptx."""

import ctypes
import importlib.util
import math
import sys
from typing import Any

import numpy as np
import pytest

from cuda import nvcc
from cuda.ptx import overlap
from cuda.ptx.host import Host
from cuda.ptx.report import Report

pytestmark = pytest.mark.skipif(nvcc.toolkit() is None, reason="needs nvcc")

ORDERS = ["rr", "rc", "cr", "cc"]


def normal(rows: int, cols: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols))


def chunks_of(host: Host, tiles: int, wave: int, most: int) -> list[tuple[int, int, int]]:
    out = (ctypes.c_int * 3)()
    found = []
    for block in range(host.library.host_sm90_blocks(tiles, wave, most)):
        host.library.host_sm90_chunk(block, tiles, wave, most, out)
        found.append((out[0], out[1], out[2]))
    return found


def test_how_tiles_are_dealt() -> None:
    """Waves of 3 blocks: 4 tiles each, those of a wave side by side, as long as three waves stay; then fewer."""
    chunks = chunks_of(Host(), 24, 3, 4)
    assert chunks[:3] == [(0, 4, 3), (1, 4, 3), (2, 4, 3)]
    assert [count for _, count, _ in chunks] == [4] * 3 + [2] * 3 + [1] * 6
    assert chunks[3] == (12, 2, 3) and chunks[-1] == (23, 1, 1)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """docs/hopper_model.py."""
    spec = importlib.util.spec_from_file_location("hopper_model", nvcc.ROOT / "docs" / "hopper_model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hopper_model", module)
    spec.loader.exec_module(module)
    return module


def test_the_model_deals_as_the_kernel_does(model: Any) -> None:
    host = Host()
    for tiles in (1, 131, 396, 397, 512, 1024, 2048, 5000):
        for most in range(1, 5):
            assert [count for _, count, _ in chunks_of(host, tiles, 132, most)] == model.chunks_of(tiles, 132, most)


@pytest.mark.parametrize("multiprocessors", [132, 116, 100])
@pytest.mark.parametrize("steps", [4, 16, 32])
def test_by_the_model_chunks_cost_nothing_anywhere(model: Any, steps: int, multiprocessors: int) -> None:
    most = model.most_of(steps)
    times = {count: model.Multiprocessor(count, steps, 1.2, False).run() for count in range(1, most + 1)}
    for tiles in range(1, 3000, 61):
        chunks = model.makespan(model.chunks_of(tiles, 132, most), times, multiprocessors)
        assert chunks <= 1.01 * model.makespan([1] * tiles, times, multiprocessors), tiles


# m, n, k, width, blocks a wave: 9 tiles of 1 step, 6 of 3 steps, 8 of 7 steps around rings of 4 and 6 stages
SHAPES = [(264, 264, 40, 128, 1), (136, 600, 136, 256, 1), (264, 400, 440, 128, 2), (504, 296, 440, 256, 2)]


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("orders", ORDERS)
def test_several_tiles_a_block(report: Report, orders: str, timing: str) -> None:
    for at, (m, n, k, wide, wave) in enumerate(SHAPES):
        dtype, add = ("bf16", "f16")[at % 2], at < 2
        host = Host(timing=timing, seed=at + len(orders), groups=3)
        a, b = host.matrix(normal(m, k, 1), dtype, orders[0] == "c"), host.matrix(normal(k, n, 2), dtype, orders[1] == "c")
        c = host.matrix(normal(m, n, 3), "f32", pad=4)
        before = host.read(c) if add else 0
        host.sm90(a, b, c, add, wide=wide, chunks=(wave, 4))
        tiles = math.ceil(m / 128) * math.ceil(n / wide)
        assert host.launches[-1].grid[0] < tiles
        name = f"sm_90a {m}x{n}x{k} {dtype} {orders} {timing} wide {wide}, {tiles} tiles in {host.launches[-1].grid[0]} blocks"
        report.check(name, host.read(c), before + host.read(a) @ host.read(b), 1e-6)


@pytest.mark.parametrize("wide", [128, 256])
@pytest.mark.parametrize(("dtype", "timing"), [("bf16", "late"), ("f16", "early")])
def test_several_tiles_a_block_in_16_bits(report: Report, dtype: str, timing: str, wide: int) -> None:
    """Z and Y through two boxes a warp, tile after tile, the last of them cut."""
    host = Host(timing=timing, seed=wide, groups=3)
    m, n, k = 264, 2 * wide + 40, 136
    a, b, bias = host.matrix(normal(m, k, 1), dtype), host.matrix(normal(k, n, 2), dtype), host.matrix(normal(1, n, 3), dtype, offset=1)
    z, y = host.empty(m, n, dtype, pad=8), host.empty(m, n, dtype)
    host.sm90(a, b, None, tail=host.tail("gelu", bias=bias, z=z, y=y), wide=wide, chunks=(1, 4))
    assert host.launches[-1].grid[0] == 4  # of 9 tiles: 4, 3, 1, 1
    linear = host.read(a) @ host.read(b) + host.read(bias)
    bound = 2.0**-8 if dtype == "bf16" else 2.0**-11
    report.check(f"sm_90a {dtype} {timing} wide {wide}, 9 tiles in 4 blocks, Z", host.read(z), linear, bound)
    curved = linear * 0.5 * (1 + np.vectorize(math.erf)(linear / 2**0.5))
    report.check(f"sm_90a {dtype} {timing} wide {wide}, 9 tiles in 4 blocks, Y", host.read(y), curved, bound)


def test_slabs_have_one_tile_a_block(report: Report) -> None:
    host = Host(timing="late", seed=3)
    a, b = host.matrix(normal(264, 72, 1), "bf16"), host.matrix(normal(72, 264, 2), "bf16")
    c = host.empty(264, 264, "f32", pad=1)
    host.sm90(a, b, c, wide=128, chunks=(1, 4))
    assert host.launches[-1].grid[0] == 9
    report.check("sm_90a, slabs where chunks were asked for", host.read(c), host.read(a) @ host.read(b), 1e-6)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("wide", [128, 256])
def test_the_next_tile_is_loaded_while_one_is_stored(wide: int, halves: bool) -> None:
    assert overlap.waits_for_a_store(Host(timing="early"), wide, halves) == ""


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(("wide", "ahead"), [(128, overlap.FIRST), (256, overlap.SECOND)])
def test_one_warpgroup_stores_and_goes_on_while_the_other_multiplies(wide: int, ahead: int, halves: bool) -> None:
    assert overlap.waits_for_the_other(Host(timing="early"), wide, halves, ahead) == ""
