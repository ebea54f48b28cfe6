"""cvt (PTX ISA, section 9.7.9.21), cvta and cvt.pack-like forms nvcc writes.

cvt{.rounding}{.ftz}{.sat}.to.from d, a; and cvt.rn.{bf16x2,f16x2}.f32 d, a, b, where a becomes the upper half.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .floating import bf16_bits, bf16_value, directed, flushed, packed, saturated
from .integer import INTEGER
from .machine import Machine, Sel, Step, opcode
from .memory import LOCAL, SHARED, WINDOW, Fault
from .operands import VALUE, get, put
from .parse import WIDTH, Instr, PtxError

WHOLE: dict[str, Callable[[Any], Any]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(value: Any, mode: str, kind: str) -> Any:
    """Rounds, clamps to the range; NaN becomes 0 (of 64 bits: the least negative, 1 << 63)."""
    limits = np.iinfo(VALUE[kind])
    whole = WHOLE[mode](np.asarray(value, np.float64))
    nan = np.isnan(whole)
    over, under = whole >= float(limits.max) + 1, whole < limits.min
    safe = np.where(nan | over | under, 0, whole).astype(VALUE[kind])
    out = np.where(over, limits.max, np.where(under, limits.min, safe)).astype(VALUE[kind])
    missing = np.array(1 << 63, np.uint64).astype(VALUE[kind]) if WIDTH[kind] == 8 else np.array(0, VALUE[kind])
    return np.where(nan, missing, out)


def to_tf32(value: Any, mode: str) -> Any:
    """Ten bits of mantissa: ties away from zero (rna), to even (rn), or cut (rz)."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    if mode == "rna":
        up = bits + np.uint32(0x1000)
    elif mode == "rn":
        up = bits + (np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1)))
    else:
        up = bits
    return np.where(np.isfinite(value), up & np.uint32(0xFFFFE000), bits)


def to_float(value: Any, kind: str, mode: str) -> Any:
    """From float32, float64 or an integer."""
    value = np.asarray(value)
    if kind == "bf16":
        return bf16_bits(value if value.dtype == np.float32 else value.astype(np.float64).astype(np.float32), mode)
    if kind == "f32" and mode in ("rz", "rm", "rp"):
        if value.itemsize == 8 and value.dtype.kind != "f" and (np.abs(value.astype(np.float64)) > 2**53).any():
            raise PtxError("a directed rounding of a 64-bit integer above 2^53")
        return directed(value.astype(np.float64), mode)
    if kind == "f16" and mode == "rz":
        near = value.astype(np.float16)
        over = np.abs(near.astype(np.float64)) > np.abs(value.astype(np.float64))
        return np.where(over, np.nextafter(near, np.float16(0)), near)
    return value.astype(VALUE[kind])


def one(to: str, source: str, mods: tuple[str, ...]) -> Callable[[Any], Any]:
    mode = next((mod for mod in mods if mod in ("rn", "rz", "rm", "rp", "rna", *WHOLE)), "rn")
    sat, ftz, relu = "sat" in mods, "ftz" in mods, "relu" in mods
    if source == "bf16":
        read: Callable[[Any], Any] = bf16_value
    else:
        read = flushed if ftz and source == "f32" else (lambda a: a)
    if to in INTEGER:
        if source in INTEGER:
            if not sat:
                return lambda a: np.asarray(a).astype(VALUE[to])
            limits = np.iinfo(VALUE[to])
            low = limits.min if np.dtype(VALUE[source]).kind == "i" else 0
            return lambda a: np.clip(np.asarray(a).astype(object), low, limits.max).astype(VALUE[to])
        return lambda a: to_integer(read(a), mode, to)

    def run(a: Any) -> Any:
        value = read(a)
        value = WHOLE[mode](value) if mode in WHOLE else value
        value = saturated(value) if sat else value
        value = np.maximum(value, 0) if relu else value
        if to == "tf32":
            return to_tf32(value, mode)
        out = to_float(value, to, mode)
        return flushed(out) if ftz and to == "f32" else out

    return run


@opcode("cvt")
def convert(m: Machine, instr: Instr) -> Step:
    kinds = [mod for mod in instr.mods if mod in WIDTH]
    if len(kinds) != 2:
        raise PtxError(f"conversion of {instr}")
    to, source = kinds
    write = put(m, instr.operands[0], "b32" if to == "tf32" else to)
    if to in ("bf16x2", "f16x2"):
        if "rn" not in instr.mods or len(instr.operands) != 3:
            raise PtxError(f"conversion of {instr}")
        top, low = get(m, instr.operands[1], "f32"), get(m, instr.operands[2], "f32")
        relu = "relu" in instr.mods

        def pair(sel: Sel) -> None:
            first, second = low(sel), top(sel)
            if relu:
                first, second = np.maximum(first, 0), np.maximum(second, 0)
            write(sel, packed(to, first, second))

        return pair
    read, function = get(m, instr.operands[1], source), one(to, source, instr.mods)
    return lambda sel: write(sel, function(read(sel)))


@opcode("cvta")
def convert_address(m: Machine, instr: Instr) -> Step:
    """Section 9.7.9.20; global, const and param addresses are generic ones already."""
    space = next(mod for mod in instr.mods if mod in ("global", "shared", "shared::cta", "local", "const", "param"))
    base = {"shared": SHARED, "shared::cta": SHARED, "local": LOCAL}.get(space, 0)
    back = "to" in instr.mods
    write, read = put(m, instr.operands[0], "u64"), get(m, instr.operands[1], "u64")
    delta = np.uint64((-base if back else base) & (2**64 - 1))
    return lambda sel: write(sel, read(sel) + delta)


@opcode("isspacep")
def is_space(m: Machine, instr: Instr) -> Step:
    base, size = {"global": (m.memory.base, len(m.memory.data)), "shared": (SHARED, WINDOW), "local": (LOCAL, WINDOW)}[
        instr.mods[0].partition("::")[0]
    ]
    write, read = put(m, instr.operands[0], "pred"), get(m, instr.operands[1], "u64")
    return lambda sel: write(sel, (read(sel) >= np.uint64(base)) & (read(sel) < np.uint64(base + size)))


@opcode("mapa", "getctarank")
def cluster_address(m: Machine, instr: Instr) -> Step:
    """Sections 9.7.9.23 and 9.7.9.24, for clusters of one block: its own address, its own rank."""
    kind = next(mod for mod in reversed(instr.mods) if mod in WIDTH)
    write, read = put(m, instr.operands[0], "u32" if instr.opcode == "getctarank" else kind), get(m, instr.operands[1], kind)
    if instr.opcode == "getctarank":
        return lambda sel: write(sel, np.uint32(0))
    rank = get(m, instr.operands[2], "u32")

    def run(sel: Sel) -> None:
        if np.any(np.asarray(rank(sel)) != 0):
            raise Fault("a block of rank other than 0 in a cluster of one")
        write(sel, read(sel))

    return run
