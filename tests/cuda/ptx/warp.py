"""What the lanes of a warp do together (PTX ISA, sections 9.7.9.5 shfl, 9.7.13.9 vote, 9.7.13.12 redux, 9.7.13.14 elect, 9.7.15.4 mma,
9.7.15.4.15 ldmatrix, 9.7.15.4.16 stmatrix).

A lane that is named but comes later is waited for (Diverged). Fragments are those of the manual's figures, with g = lane / 4 and
t = lane % 4.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from .access import count_conflicts, shared_places
from .convert import to_tf32
from .floating import bf16_value
from .machine import ENDED, Diverged, Machine, Sel, Step, opcode
from .memory import Array, Fault
from .operands import VALUE, address, get, items, put, type_of
from .parse import Imm, Instr, Operand, PtxError, Vec

FULL = 0xFFFFFFFF


def whole(sel: Sel) -> bool:
    if isinstance(sel, slice):
        return bool(sel.start % 32 == 0 and sel.stop % 32 == 0)
    return bool(len(sel) % 32 == 0 and (sel[::32] % 32 == 0).all() and (sel[31::32] - sel[::32] == 31).all())


def bits_of(m: Machine, sel: Sel, chosen: Array) -> tuple[Array, Array]:
    """Of each warp among these threads: its number in the wave, and a mask of the chosen lanes."""
    threads = m.thread_index[sel]
    warps, place = np.unique(threads // 32, return_inverse=True)
    masks = np.zeros(len(warps), np.uint64)
    np.bitwise_or.at(masks, place, np.where(chosen, np.uint64(1) << (threads % 32).astype(np.uint64), np.uint64(0)))
    return masks[place], place


def converge(m: Machine, sel: Sel, mask: Any) -> None:
    """All living lanes of the mask are here, or Diverged."""
    if whole(sel):
        return
    threads = m.thread_index[sel]
    here, _ = bits_of(m, sel, np.ones(len(threads), bool))
    living = (m.state.reshape(-1, 32) < ENDED) @ (np.uint64(1) << np.arange(32, dtype=np.uint64))
    named = np.broadcast_to(np.asarray(mask), threads.shape).astype(np.uint64)
    missing = (named & living[threads // 32] & ~here) != 0
    if missing.any():
        raise Diverged(threads[missing])


def need_whole(m: Machine, sel: Sel) -> int:
    converge(m, sel, FULL)
    if not whole(sel):
        raise Fault("an instruction of whole warps met by a part of one")
    return m.size(sel) // 32


def mask_of(m: Machine, operand: Operand) -> Callable[[Sel], Any]:
    if isinstance(operand, Imm):
        fixed = np.uint32(operand.bits & FULL)
        return lambda sel: fixed
    return get(m, operand, "b32")


@opcode("shfl")
def shuffle(m: Machine, instr: Instr) -> Step:
    if instr.mods[0] != "sync":
        raise PtxError(f"shfl without .sync: {instr}")
    mode = instr.mods[1]
    targets = items(instr.operands[0])
    write = put(m, targets[0], "b32")
    write_pred = put(m, targets[1], "pred") if len(targets) > 1 else None
    a, b, c = get(m, instr.operands[1], "b32"), get(m, instr.operands[2], "u32"), get(m, instr.operands[3], "u32")
    mask = mask_of(m, instr.operands[4])
    buffer, here = np.zeros(m.total, np.uint32), np.zeros(m.total, bool)

    def run(sel: Sel) -> None:
        converge(m, sel, mask(sel))
        lane = m.lane[sel].astype(np.int64)
        by, control = np.asarray(b(sel)).astype(np.int64) & 31, np.asarray(c(sel)).astype(np.int64)
        clamp, segment = control & 31, control >> 8 & 31
        most, least = (lane & segment) | (clamp & ~segment), lane & segment
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": least | (by & ~segment)}[mode]
        fine = source >= most if mode == "up" else source <= most
        source = np.where(fine, source, lane)
        buffer[sel] = a(sel)
        here[sel] = True
        from_ = m.thread_index[sel] - lane + source
        write(sel, np.where(here[from_], buffer[from_], np.uint32(0x7FFFDEAD)))
        if write_pred:
            write_pred(sel, fine)
        here[sel] = False

    return run


@opcode("vote")
def vote(m: Machine, instr: Instr) -> Step:
    if instr.mods[0] != "sync":
        raise PtxError(f"vote without .sync: {instr}")
    mode = instr.mods[1]
    write = put(m, instr.operands[0], "b32" if mode == "ballot" else "pred")
    a, mask = get(m, instr.operands[1], "pred"), mask_of(m, instr.operands[2])

    def run(sel: Sel) -> None:
        converge(m, sel, mask(sel))
        value = np.broadcast_to(a(sel), (m.size(sel),))
        yes, _ = bits_of(m, sel, value)
        no, _ = bits_of(m, sel, ~value)
        if mode == "ballot":
            write(sel, yes.astype(np.uint32))
        else:
            write(sel, {"any": yes != 0, "all": no == 0, "uni": (yes == 0) | (no == 0)}[mode])

    return run


@opcode("activemask")
def activemask(m: Machine, instr: Instr) -> Step:
    write = put(m, instr.operands[0], "b32")
    return lambda sel: write(sel, bits_of(m, sel, np.ones(m.size(sel), bool))[0].astype(np.uint32))


@opcode("elect")
def elect(m: Machine, instr: Instr) -> Step:
    """The lowest of the lanes named."""
    targets = items(instr.operands[0])
    write, write_pred, mask = put(m, targets[0], "b32"), put(m, targets[1], "pred"), mask_of(m, instr.operands[1])

    def run(sel: Sel) -> None:
        converge(m, sel, mask(sel))
        here, _ = bits_of(m, sel, np.ones(m.size(sel), bool))
        lowest = np.bitwise_count((here & (~here + np.uint64(1))) - np.uint64(1)).astype(np.uint32)
        write(sel, lowest)
        write_pred(sel, m.lane[sel] == lowest)

    return run


@opcode("redux")
def redux(m: Machine, instr: Instr) -> Step:
    kind = type_of(instr)
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    function = functions[instr.mods[1]]
    write, a, mask = put(m, instr.operands[0], kind), get(m, instr.operands[1], kind), mask_of(m, instr.operands[2])

    def run(sel: Sel) -> None:
        converge(m, sel, mask(sel))
        values = np.broadcast_to(a(sel), (m.size(sel),))
        _, place = bits_of(m, sel, np.ones(m.size(sel), bool))
        first = np.unique(place, return_index=True)[1]
        out = values[first].copy()
        rest = np.ones(len(values), bool)
        rest[first] = False
        function.at(out, place[rest], values[rest])
        write(sel, out[place])

    return run


LANE = np.arange(32)
G, T = LANE >> 2, LANE & 3


@cache
def fragment(shape: str, kind: str, which: str) -> tuple[Array, tuple[int, int]]:
    """For matrix a, b or c of mma: where each element of the matrix stands among [register][lane][half], and its rows and columns."""
    rows, columns, depth = (int(part) for part in shape.replace("m", "").replace("n", " ").replace("k", " ").split())
    half = kind in ("f16", "bf16")
    pair = np.arange(2)
    if which == "c":
        size = (rows, columns)
        row = [G + 8 * i for i in range(rows // 8) for _ in range(2)]
        column = [2 * T + j for _ in range(rows // 8) for j in range(2)]
    else:
        size = (rows, depth) if which == "a" else (depth, columns)
        step = 8 if half else 4
        blocks = [(i, k) for k in range(depth // step) for i in range(rows // 8 if which == "a" else 1)]
        along = [(step * k + (2 * T[:, None] + pair if half else T[:, None])) for _, k in blocks]
        across = [np.broadcast_to((G + 8 * i)[:, None], along[0].shape) for i, _ in blocks]
        row, column = (across, along) if which == "a" else (along, across)
    flat = (np.stack(row) * size[1] + np.stack(column)).reshape(-1)
    assert sorted(flat) == list(range(size[0] * size[1])), (shape, kind, which)
    return np.argsort(flat), size


def matrices(raw: list[Array], warps: int, kind: str, where: tuple[Array, tuple[int, int]]) -> Array:
    """Registers of the lanes -> [warp, row, column], as numbers."""
    index, size = where
    lanes = np.stack([np.asarray(part).reshape(warps, 32) for part in raw], axis=1)
    flat = np.ascontiguousarray(lanes).reshape(warps, -1)
    if kind in ("f16", "bf16"):
        flat = flat.view(np.uint16)
    picked = flat[:, index].reshape(warps, *size)
    if kind == "bf16":
        return bf16_value(picked)
    if kind == "f16":
        return picked.view(np.float16).astype(np.float32)
    if kind == "tf32":
        return np.asarray(to_tf32(picked.view(np.float32), "rz")).view(np.float32)
    return picked


@opcode("mma")
def mma(m: Machine, instr: Instr) -> Step:
    """d = a b + c, sums in the accumulator's type."""
    shape = next(mod for mod in instr.mods if mod.startswith("m") and mod[1:2].isdigit())
    kinds = instr.mods[-4:]
    known = {("f32", "bf16", "bf16", "f32"), ("f32", "f16", "f16", "f32"), ("f32", "tf32", "tf32", "f32"), ("f64",) * 4}
    if instr.mods[:2] != ("sync", "aligned") or instr.mods[3:5] != ("row", "col") or kinds not in known:
        raise PtxError(f"form of {instr}")
    d, a, b, c = (items(operand) for operand in instr.operands)
    accumulator, kind = kinds[0], kinds[1]
    raw = "f64" if kind == "f64" else "b32"
    fa, fb, fc = (fragment(shape, kind, which) for which in "abc")
    counts = [len(f[0]) // 32 // (2 if kind in ("f16", "bf16") and f is not fc else 1) for f in (fa, fb, fc)]
    if [len(a), len(b), len(c), len(d)] != [*counts, counts[2]]:
        raise PtxError(f"registers of {instr}")
    read_a, read_b = [get(m, x, raw) for x in a], [get(m, x, raw) for x in b]
    read_c, write_d = [get(m, x, accumulator) for x in c], [put(m, x, accumulator) for x in d]
    back = np.argsort(fc[0])

    def run(sel: Sel) -> None:
        warps = need_whole(m, sel)
        left = matrices([read(sel) for read in read_a], warps, kind, fa)
        right = matrices([read(sel) for read in read_b], warps, kind, fb)
        start = matrices([np.broadcast_to(read(sel), (32 * warps,)) for read in read_c], warps, accumulator, fc)
        out = (left @ right + start).reshape(warps, -1)[:, back].reshape(warps, len(d), 32)
        for i, write in enumerate(write_d):
            write(sel, out[:, i].reshape(-1))

    return run


@opcode("ldmatrix", "stmatrix")
def matrix_rows(m: Machine, instr: Instr) -> Step:
    """Eight by eight 16-bit elements a matrix; lanes 8 i to 8 i + 7 hold the addresses of the rows of matrix i."""
    if "m8n8" not in instr.mods or "b16" not in instr.mods:
        raise PtxError(f"form of {instr}")
    count = int(next(mod for mod in instr.mods if mod in ("x1", "x2", "x4"))[1:])
    trans, loads = "trans" in instr.mods, instr.opcode == "ldmatrix"
    registers = items(instr.operands[0 if loads else 1])
    where = address(m, instr.operands[1 if loads else 0])
    writes, reads = [put(m, r, "b32") for r in registers] if loads else [], [get(m, r, "b32") for r in registers]
    element = np.stack([2 * T, 2 * T + 1], axis=1)
    row, column = (element, G[:, None]) if trans else (G[:, None], element)

    def run(sel: Sel) -> None:
        warps = need_whole(m, sel)
        giving = m.thread_index[sel].reshape(warps, 32)[:, : 8 * count].reshape(-1)
        at = shared_places(m, where(giving), 16, giving)
        count_conflicts(m, instr, at % m.shared.stride, 16, giving)
        if loads:
            tiles = m.shared.load(at, "u2", 8).reshape(warps, count, 8, 8)
            for i, write in enumerate(writes):
                write(sel, np.ascontiguousarray(tiles[:, i][:, row, column]).view(np.uint32).reshape(-1))
            return
        tiles = np.empty((warps, count, 8, 8), np.uint16)
        for i, read in enumerate(reads):
            tiles[:, i][:, row, column] = np.ascontiguousarray(read(sel)).view(np.uint16).reshape(warps, 32, 2)
        m.shared.store(at, tiles.reshape(-1, 8), "u2", 8)

    return run


__all__ = ["VALUE", "Vec", "converge", "need_whole", "whole"]
