"""The interpreter's model of Hopper: boxes of the tensor memory accelerator, mbarriers, and matrix descriptors in every order and swizzle.

Each layout is written down here once more, as a loop over elements; what both may share is a wrong reading of the manual, which only the
start-up check of gemm_sm90 on a device can show.
"""

import functools
from pathlib import Path

import numpy as np
import pytest

from cuda import nvcc
from cuda.ptx import Memory, Module, PtxError, launch, parse, tma

pytestmark = pytest.mark.skipif(nvcc.toolkit() is None, reason="needs nvcc")

BITS = {0: 0, 32: 1, 64: 3, 128: 7}
MODE = {0: 0, 128: 1, 64: 2, 32: 3}


@functools.cache
def sample() -> Module:
    return parse(nvcc.compile_ptx(Path(__file__).parent / "ptx" / "samples" / "hopper.cu", "sm_90a").read_text())


def twist(at: int, span: int) -> int:
    return at ^ ((at >> 7 & BITS[span]) << 4)


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_boxes_come_swizzled_with_zeros_outside_and_go_back(span: int, timing: str) -> None:
    sizes, box, start = (40, 9, 5), ((span or 64) // 2, 4, 2), (24, -1, 4)
    values = np.random.default_rng(1).integers(1, 60000, sizes[::-1]).astype(np.uint16)
    memory = Memory(1 << 20)
    source, target = memory.array(values), memory.array(np.zeros_like(values))
    pitches = (2 * sizes[0], 2 * sizes[0] * sizes[1])
    count = int(np.prod(box))
    out = memory.array(np.zeros(count, np.uint16))
    maps = [tma.encode(2, span, base, sizes, pitches, box) for base in (source, target)]
    launch(sample(), ["boxes"], memory, 1, 64, [*maps, out, count, *start], dynamic_shared=2 * count, timing=timing)
    raw, back = memory.read(out), np.zeros_like(values)
    for z in range(box[2]):
        for y in range(box[1]):
            for x in range(box[0]):
                at = tuple(begin + i for begin, i in zip(start, (x, y, z), strict=True))
                inside = all(0 <= i < size for i, size in zip(at, sizes, strict=True))
                expected = values[at[2], at[1], at[0]] if inside else 0
                place = twist(2 * (x + box[0] * (y + box[1] * z)), span) // 2
                assert raw[place] == expected
                if inside:
                    back[at[2], at[1], at[0]] = expected
    assert np.array_equal(memory.read(target), back)


@pytest.mark.parametrize("seed", range(4))
def test_phases_of_mbarriers(seed: int) -> None:
    memory = Memory(1 << 20)
    out = memory.array(np.zeros(1, np.int32))
    launch(sample(), ["relay"], memory, 1, 128, [out, 3], seed=seed, groups=4)
    expected = 0
    for _ in range(3):
        for warp in range(4):
            expected = expected * 2 + warp
    assert memory.read(out)[0] == expected


def lay(matrix: np.ndarray, across: bool, span: int, memory: np.ndarray, start: int) -> int:
    """Puts [rows, 16] into memory (elements) from byte `start` on, in the order that the descriptor it returns says."""
    rows = len(matrix)
    atom = 8 * (span or 16)
    if across:
        line = (span or 16) // 2
        # swizzled: from 8 k to the next, then from a line's elements to the next; else the other way round
        along, over = (atom, 2 * atom) if span else (rows // 8 * atom, atom)
        leading, stride = (over, along) if span else (along, over)
    else:
        leading, stride = (16, atom) if span else (128, 256)
    for row in range(rows):
        for k in range(16):
            if across:
                place = 2 * (row % line) + row // line * over + k % 8 * (span or 16) + k // 8 * along
            elif span:
                place = row % 8 * span + row // 8 * stride + 2 * k
            else:
                place = row % 8 * 16 + row // 8 * stride + k // 8 * leading + k % 8 * 2
            memory[(start + twist(place, span)) // 2] = matrix[row, k].view(np.uint16)
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODE[span] << 62


def product(name: str, span: int, timing: str, fence: int = 1, wait: int = 1) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    a, b = random.standard_normal((64, 16)).astype(np.float16), random.standard_normal((16, 16)).astype(np.float16)
    shared = np.full(16384, 0xFFFF, np.uint16)
    first = lay(a, name.endswith(("mk", "mn")), span, shared, 0)
    second = lay(b, name.endswith(("kn", "mn")), span, shared, 16384)
    memory = Memory(1 << 20)
    out = memory.array(np.zeros((128, 8), np.float32))
    args = [memory.array(shared), len(shared), first, second, out, fence, wait]
    launch(sample(), [name], memory, 1, 128, args, dynamic_shared=2 * len(shared), timing=timing)
    flat, got = memory.read(out), np.zeros((64, 16))
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(8):
            got[16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2] = flat[thread, i]
    return got, 1 - a.astype(float) @ b.astype(float).T  # the sample negates B


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("name", ["product_kk", "product_mk", "product_kn", "product_mn"])
def test_matrix_descriptors(name: str, span: int) -> None:
    for timing in ("early", "late"):
        got, expected = product(name, span, timing)
        assert np.abs(got - expected).max() < 1e-5


def test_a_missing_fence_or_wait_is_refused() -> None:
    for timing in ("early", "late"):
        with pytest.raises(PtxError, match=r"after the last wgmma\.fence in .*wgmma\.mma_async"):
            product("product_kk", 128, timing, fence=0)
        with pytest.raises(PtxError, match=r"used before wgmma\.wait_group in .*st\.global"):
            product("product_kk", 128, timing, wait=0)
