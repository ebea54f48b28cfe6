"""Floating point instructions (PTX ISA, sections 9.7.3 to 9.7.5), and the opcodes that integers share: add, sub, mul, mad, div, rem, min,
max, abs, neg.

f32 sums and products are numpy's, rounded to nearest even. fma rounds once for f64; for f32 it is summed in f64 and then rounded, which
differs from one rounding in one of 2^29 cases. The .approx functions are correctly rounded here: better than the hardware's.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .integer import INTEGER, elementwise, multiply, multiply_add, quotient, remainder
from .machine import Machine, Sel, Step, opcode
from .memory import Array
from .operands import Get, get, put, type_of
from .parse import Instr, PtxError

ROUNDINGS = {"rn", "rz", "rm", "rp"}


def bf16_value(raw: Any) -> Any:
    return (np.asarray(raw).astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_bits(value: Any, mode: str = "rn") -> Array:
    """float32 -> the bits of the nearest bf16, ties to even, or towards zero; every NaN becomes 0x7fff."""
    value = np.asarray(value, np.float32)
    bits = value.view(np.uint32)
    up = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) if mode == "rn" else bits
    return np.where(np.isnan(value), np.uint32(0x7FFF), up >> np.uint32(16)).astype(np.uint16)


def unpacked(kind: str, raw: Any) -> tuple[Any, Any]:
    """The two floats in 32 bits, low half first, as float32."""
    raw = np.asarray(raw)
    low, top = (raw & np.uint32(0xFFFF)).astype(np.uint16), (raw >> np.uint32(16)).astype(np.uint16)
    if kind == "bf16x2":
        return bf16_value(low), bf16_value(top)
    return low.view(np.float16).astype(np.float32), top.view(np.float16).astype(np.float32)


def packed(kind: str, low: Any, top: Any) -> Array:
    if kind == "bf16x2":
        a, b = bf16_bits(low), bf16_bits(top)
    else:
        a, b = (np.asarray(part, np.float32).astype(np.float16).view(np.uint16) for part in (low, top))
    return a.astype(np.uint32) | b.astype(np.uint32) << np.uint32(16)


def widened(kind: str, read: Get) -> Get:
    """What arithmetic works on: bf16 as float32, the rest as it is."""
    return (lambda sel: bf16_value(read(sel))) if kind == "bf16" else read


def flushed(value: Any) -> Any:
    """.ftz: subnormal float32 numbers become zero of their sign."""
    value = np.asarray(value)
    return np.where(np.abs(value) < np.float32(1.1754944e-38), np.copysign(np.float32(0), value), value)


def directed(exact: Any, mode: str) -> Array:
    """A float64 result as float32 in rounding mode rz, rm or rp."""
    near = np.asarray(exact).astype(np.float32)
    wide = near.astype(np.float64)
    over, under = wide > exact, wide < exact
    down, up = np.float32(-np.inf), np.float32(np.inf)
    lower = np.where(over, np.nextafter(near, down), near)
    upper = np.where(under, np.nextafter(near, up), near)
    if mode == "rm":
        return lower
    return upper if mode == "rp" else np.where(np.asarray(exact) >= 0, lower, upper)


def fused64(a: Any, b: Any, c: Any) -> Any:
    """a b + c by error-free products and sums (Dekker 1971, Knuth)."""
    p = a * b
    split = 134217729.0
    ah, bh = (x * split - (x * split - x) for x in (a, b))
    al, bl = a - ah, b - bh
    product_error = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    t = s - p
    sum_error = (p - (s - t)) + (c - t)
    corrected = s + (product_error + sum_error)
    return np.where(np.isfinite(corrected), corrected, s)


def fused(kind: str, mode: str) -> Callable[[Any, Any, Any], Any]:
    if kind == "f64":
        return fused64

    def run(a: Any, b: Any, c: Any) -> Any:
        exact = np.asarray(a, np.float64) * b + c
        if kind == "f16":
            return exact.astype(np.float16)
        return exact.astype(np.float32) if mode == "rn" else directed(exact, mode)

    return run


def numeric(a: Any, b: Any, pick: Callable[[Any, Any], Any]) -> Any:
    """min and max: the other operand where one is NaN; -0 is less than +0 (9.7.3.11)."""
    if np.asarray(a).dtype.kind != "f":
        return pick(a, b)
    plain = np.fmin(a, b) if pick is np.minimum else np.fmax(a, b)
    zeros = (np.asarray(a) == 0) & (np.asarray(b) == 0)
    negative = (np.signbit(a) | np.signbit(b)) if pick is np.minimum else (np.signbit(a) & np.signbit(b))
    return np.where(zeros, np.where(negative, -np.abs(plain), np.abs(plain)), plain)


def saturated(value: Any) -> Any:
    return np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(np.asarray(value).dtype)


BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": lambda a, b: numeric(a, b, np.minimum),
    "max": lambda a, b: numeric(a, b, np.maximum),
}


def rounded(instr: Instr, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """With the instruction's .ftz, .sat, .NaN and rounding mode, for f32, f64 and f16."""
    mode = next((mod for mod in instr.mods if mod in ROUNDINGS), "rn")
    ftz, sat, nan, relu = ("ftz" in instr.mods, "sat" in instr.mods, "NaN" in instr.mods, "relu" in instr.mods)
    if mode != "rn" and kind != "f32":
        raise PtxError(f"rounding of {instr}")

    def run(*args: Any) -> Any:
        if ftz:
            args = tuple(flushed(arg) for arg in args)
        out = function(*args) if mode == "rn" else directed(function(*[np.asarray(arg, np.float64) for arg in args]), mode)
        if nan:
            for arg in args:
                out = np.where(np.isnan(arg), np.float32(np.nan), out).astype(np.asarray(out).dtype)
        if relu:
            out = np.where(np.isnan(out), out, np.maximum(out, 0)).astype(np.asarray(out).dtype)
        out = saturated(out) if sat else out
        return flushed(out) if ftz else out

    return run if ftz or sat or nan or relu or mode != "rn" else function


def halves(m: Machine, instr: Instr, kind: str, function: Callable[..., Any]) -> Step:
    """bf16, bf16x2 and f16x2: in float32 (exact for one operation up to its rounding), then rounded to the type."""
    write = put(m, instr.operands[0], kind)
    reads = [get(m, operand, kind) for operand in instr.operands[1:]]

    def run(sel: Sel) -> None:
        values = [read(sel) for read in reads]
        if kind == "bf16":
            write(sel, bf16_bits(function(*[bf16_value(value) for value in values])))
        else:
            pairs = [unpacked(kind, value) for value in values]
            write(sel, packed(kind, function(*[pair[0] for pair in pairs]), function(*[pair[1] for pair in pairs])))

    return run


def arithmetic(m: Machine, instr: Instr, kind: str, function: Callable[..., Any]) -> Step:
    if kind in ("bf16", "bf16x2", "f16x2"):
        return halves(m, instr, kind, rounded(instr, "f32", function))
    return elementwise(m, instr, kind, rounded(instr, kind, function))


@opcode("add", "sub", "mul", "div", "min", "max", "rem")
def binary(m: Machine, instr: Instr) -> Step:
    kind = type_of(instr)
    if kind in INTEGER:
        if instr.opcode == "mul":
            return multiply(m, instr, kind)
        if "cc" in instr.mods or "sat" in instr.mods:
            raise PtxError(f"carry or saturation in {instr}")
        whole: dict[str, Callable[..., Any]] = {"div": quotient, "rem": remainder}
        return elementwise(m, instr, kind, whole.get(instr.opcode) or BINARY[instr.opcode])
    return arithmetic(m, instr, kind, BINARY[instr.opcode])


@opcode("mad", "fma")
def multiply_and_add(m: Machine, instr: Instr) -> Step:
    kind = type_of(instr)
    if kind in INTEGER:
        return multiply_add(m, instr, kind)
    mode = next((mod for mod in instr.mods if mod in ROUNDINGS), "rn")
    function = fused("f32" if kind in ("bf16", "bf16x2", "f16x2") else kind, mode)
    plain = Instr(instr.text, instr.line, instr.opcode, tuple(mod for mod in instr.mods if mod not in ROUNDINGS), instr.operands)
    return arithmetic(m, plain, kind, function)


@opcode("abs", "neg")
def signs(m: Machine, instr: Instr) -> Step:
    kind = type_of(instr)
    function = np.abs if instr.opcode == "abs" else np.negative
    masks = {"bf16": 0x8000, "bf16x2": 0x80008000, "f16x2": 0x80008000}
    if kind in masks:
        mask = np.uint16(masks[kind]) if kind == "bf16" else np.uint32(masks[kind])
        bits: Callable[[Any], Any] = (lambda a: a & ~mask) if instr.opcode == "abs" else (lambda a: a ^ mask)
        return elementwise(m, instr, kind, bits)
    return elementwise(m, instr, kind, rounded(instr, kind, function) if kind not in INTEGER else function)


@opcode("copysign")
def copysign(m: Machine, instr: Instr) -> Step:
    """copysign.type d, a, b: the sign of a, the magnitude of b."""
    return elementwise(m, instr, type_of(instr), lambda a, b: np.copysign(b, a))


def in_double(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda a: np.asarray(function(np.asarray(a, np.float64))).astype(np.asarray(a).dtype)


UNARY: dict[str, Callable[[Any], Any]] = {
    "sqrt": in_double(np.sqrt),
    "rsqrt": in_double(lambda a: 1 / np.sqrt(a)),
    "rcp": in_double(lambda a: 1 / a),
    "ex2": in_double(np.exp2),
    "lg2": in_double(np.log2),
    "sin": in_double(np.sin),
    "cos": in_double(np.cos),
    "tanh": in_double(np.tanh),
}


@opcode(*UNARY)
def unary(m: Machine, instr: Instr) -> Step:
    return arithmetic(m, instr, type_of(instr), UNARY[instr.opcode])


@opcode("testp")
def test_property(m: Machine, instr: Instr) -> Step:
    kind = type_of(instr)
    least = np.float32(1.1754944e-38) if kind == "f32" else np.float64(2.2250738585072014e-308)
    functions: dict[str, Callable[[Any], Any]] = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda a: ~np.isnan(a), "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= least), "subnormal": lambda a: (np.abs(a) < least) & (a != 0),
    }  # fmt: skip
    return elementwise(m, instr, kind, functions[instr.mods[0]], "pred")
