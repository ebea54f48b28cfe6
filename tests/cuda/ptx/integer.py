"""Integer and logic instructions (PTX ISA, sections 9.7.1, 9.7.2 and 9.7.8) and the moves, selections and comparisons of section 9.7.6
and 9.7.9 that are the same for every type."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import Machine, Sel, Step, opcode
from .memory import Array
from .operands import VALUE, get, put, type_of
from .parse import WIDTH, Imm, Instr, PtxError, Vec

INTEGER = {f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)}
DOUBLE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def elementwise(m: Machine, instr: Instr, kind: str, function: Callable[..., Any], result: str = "") -> Step:
    """d = f(a, b, ..), all of one type."""
    write = put(m, instr.operands[0], result or kind)
    reads = [get(m, operand, kind) for operand in instr.operands[1:]]
    if len(reads) == 1:
        first = reads[0]
        return lambda sel: write(sel, function(first(sel)))
    if len(reads) == 2:
        left, right = reads
        return lambda sel: write(sel, function(left(sel), right(sel)))
    return lambda sel: write(sel, function(*[read(sel) for read in reads]))


def high(a: Any, b: Any) -> Any:
    """The upper half of a 64-bit product, from 32-bit halves."""
    a, b = np.asarray(a), np.asarray(b)
    signed = a.dtype.kind == "i"
    ua, ub = a.astype(np.uint64), b.astype(np.uint64)
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = ua & mask, ua >> half, ub & mask, ub >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & mask)
    upper = a1 * b1 + (middle >> half) + (other >> half)
    if not signed:
        return upper
    upper = upper - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return upper.view(np.int64)


def times(instr: Instr, kind: str) -> tuple[Callable[[Any, Any], Any], str]:
    """mul's and mad's product (9.7.1.3, 9.7.1.4) and the type of its result."""
    if "lo" in instr.mods or kind not in INTEGER:
        return (lambda a, b: np.multiply(a, b)), kind
    if "wide" in instr.mods:
        wide = VALUE[DOUBLE[kind]]
        return (lambda a, b: np.asarray(a).astype(wide) * np.asarray(b).astype(wide)), DOUBLE[kind]
    if "hi" in instr.mods:
        if kind in ("u64", "s64"):
            return high, kind
        wide, shift, narrow = VALUE[DOUBLE[kind]], 8 * WIDTH[kind], VALUE[kind]
        return (lambda a, b: (np.asarray(a).astype(wide) * np.asarray(b).astype(wide) >> shift).astype(narrow)), kind
    raise PtxError(f"product of {instr}")


def multiply(m: Machine, instr: Instr, kind: str) -> Step:
    product, result = times(instr, kind)
    return elementwise(m, instr, kind, product, result)


def multiply_add(m: Machine, instr: Instr, kind: str) -> Step:
    product, result = times(instr, kind)
    write = put(m, instr.operands[0], result)
    a, b = get(m, instr.operands[1], kind), get(m, instr.operands[2], kind)
    c = get(m, instr.operands[3], result)
    return lambda sel: write(sel, product(a(sel), b(sel)) + c(sel))


def quotient(a: Any, b: Any) -> Any:
    """Rounds to zero; what a division by zero gives is not stated, here all ones."""
    a, b = np.broadcast_arrays(a, b)
    safe = np.where(b == 0, np.ones_like(b), b)
    out = a // safe
    if out.dtype.kind == "i":
        out = out + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, ~np.zeros_like(out), out).astype(a.dtype)


def remainder(a: Any, b: Any) -> Any:
    return a - quotient(a, b) * b


def shifted_left(a: Any, count: Any) -> Any:
    bits = 8 * np.asarray(a).itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), np.zeros_like(a))


def shifted_right(a: Any, count: Any) -> Any:
    bits = 8 * np.asarray(a).itemsize
    moved = a >> np.minimum(count, bits - 1).astype(np.asarray(a).dtype)
    return moved if np.asarray(a).dtype.kind == "i" else np.where(count < bits, moved, np.zeros_like(moved))


@opcode("shl", "shr")
def shift(m: Machine, instr: Instr) -> Step:
    kind = type_of(instr)
    write, a, count = put(m, instr.operands[0], kind), get(m, instr.operands[1], kind), get(m, instr.operands[2], "u32")
    function = shifted_left if instr.opcode == "shl" else shifted_right
    return lambda sel: write(sel, function(a(sel), count(sel)))


@opcode("shf")
def funnel(m: Machine, instr: Instr) -> Step:
    """Section 9.7.8.7: 32 bits of the 64 in {b, a}."""
    write = put(m, instr.operands[0], "b32")
    low, top, count = (get(m, operand, "u32") for operand in instr.operands[1:])
    left, wrap = instr.mods[0] == "l", "wrap" in instr.mods

    def run(sel: Sel) -> None:
        whole = np.asarray(top(sel)).astype(np.uint64) << np.uint64(32) | np.asarray(low(sel)).astype(np.uint64)
        n = np.asarray(count(sel)).astype(np.uint64)
        n = n & np.uint64(31) if wrap else np.minimum(n, np.uint64(32))
        write(sel, ((whole << n) >> np.uint64(32) if left else whole >> n).astype(np.uint32))

    return run


@opcode("lop3")
def lop3(m: Machine, instr: Instr) -> Step:
    """Section 9.7.8.6: bit i of the table is the result where (a, b, c) spell i."""
    table = instr.operands[4]
    assert isinstance(table, Imm)
    bits = table.bits
    write = put(m, instr.operands[0], "b32")
    reads = [get(m, operand, "b32") for operand in instr.operands[1:4]]

    def run(sel: Sel) -> None:
        a, b, c = (np.asarray(read(sel)) for read in reads)
        out = np.uint32(0)
        for i in range(8):
            if bits >> i & 1:
                out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        write(sel, out)

    return run


@opcode("prmt")
def permute(m: Machine, instr: Instr) -> Step:
    """Section 9.7.9.7, generic form: each nibble of c picks a byte of {b, a}; its top bit replicates the byte's sign."""
    if instr.mods != ("b32",):
        raise PtxError(f"prmt mode in {instr}")
    write = put(m, instr.operands[0], "b32")
    a, b, c = (get(m, operand, "u32") for operand in instr.operands[1:])

    def run(sel: Sel) -> None:
        whole = np.asarray(b(sel)).astype(np.uint64) << np.uint64(32) | np.asarray(a(sel)).astype(np.uint64)
        control = np.asarray(c(sel)).astype(np.uint64)
        out = np.zeros(np.broadcast(whole, control).shape, np.uint64)
        for i in range(4):
            nibble = control >> np.uint64(4 * i)
            byte = whole >> ((nibble & np.uint64(7)) << np.uint64(3)) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            out |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
        write(sel, out.astype(np.uint32))

    return run


@opcode("bfe")
def extract(m: Machine, instr: Instr) -> Step:
    """Section 9.7.1.19."""
    kind = type_of(instr)
    bits, dtype = 8 * WIDTH[kind], np.dtype(VALUE[kind])
    write, a = put(m, instr.operands[0], kind), get(m, instr.operands[1], f"u{bits}")
    where, length = get(m, instr.operands[2], "u32"), get(m, instr.operands[3], "u32")

    def run(sel: Sel) -> None:
        values = np.broadcast_to(np.asarray(a(sel)), (m.size(sel),))
        pos, count = (np.broadcast_to(np.asarray(read(sel)) & 0xFF, values.shape).astype(np.int64) for read in (where, length))
        sign_at = np.minimum(pos + count - 1, bits - 1).clip(0)
        sign = values >> sign_at.astype(values.dtype) & values.dtype.type(1)
        moved = shifted_right(values, pos.astype(np.uint32))
        mask = shifted_left(np.ones_like(values), np.minimum(count, bits).astype(np.uint32)) - values.dtype.type(1)
        out = moved & mask
        if dtype.kind == "i":
            covered = shifted_left(
                np.ones_like(values), np.minimum(count, np.maximum(bits - pos, 0)).astype(np.uint32)
            ) - values.dtype.type(1)
            out = np.where((sign != 0) & (count > 0), out | ~covered, out)
        write(sel, out.view(dtype))

    return run


@opcode("bfi")
def insert(m: Machine, instr: Instr) -> Step:
    """Section 9.7.1.20: the low c+length bits of a into b."""
    kind = type_of(instr)
    write = put(m, instr.operands[0], kind)
    a, b = get(m, instr.operands[1], kind), get(m, instr.operands[2], kind)
    where, length = get(m, instr.operands[3], "u32"), get(m, instr.operands[4], "u32")

    def run(sel: Sel) -> None:
        base = np.broadcast_to(np.asarray(b(sel)), (m.size(sel),))
        pos, count = np.asarray(where(sel)) & 0xFF, np.asarray(length(sel)) & 0xFF
        one = np.ones_like(base)
        mask = shifted_left(shifted_left(one, count) - base.dtype.type(1), pos)
        moved = shifted_left(np.broadcast_to(np.asarray(a(sel)), base.shape), pos)
        write(sel, base & ~mask | moved & mask)

    return run


def count_leading(a: Array) -> Array:
    bits = 8 * a.itemsize
    out = np.full(a.shape, bits, np.uint32)
    for i in range(bits):
        out = np.where(a >> a.dtype.type(i) & a.dtype.type(1), np.uint32(bits - 1 - i), out)
    return out


def reversed_bits(a: Array) -> Array:
    out = np.zeros_like(a)
    for i in range(8 * a.itemsize):
        out |= (a >> a.dtype.type(i) & a.dtype.type(1)) << a.dtype.type(8 * a.itemsize - 1 - i)
    return out


def highest(a: Array) -> Array:
    """bfind: the place of the most significant bit that is no sign, all ones where there is none."""
    raw = np.where(a < 0, ~a, a).view(f"u{a.itemsize}") if a.dtype.kind == "i" else a
    leading = count_leading(raw)
    return np.where(raw == 0, np.uint32(0xFFFFFFFF), np.uint32(8 * a.itemsize - 1) - leading)


@opcode("clz", "popc", "brev", "bfind", "cnot", "not")
def single(m: Machine, instr: Instr) -> Step:
    kind = type_of(instr)
    functions: dict[str, tuple[Callable[[Any], Any], str]] = {
        "clz": (count_leading, "u32"),
        "popc": (lambda a: np.bitwise_count(a).astype(np.uint32), "u32"),
        "brev": (reversed_bits, kind),
        "bfind": (highest, "u32"),
        "cnot": (lambda a: (a == 0).astype(a.dtype), kind),
        "not": (lambda a: ~a, kind),
    }
    function, result = functions[instr.opcode]
    return elementwise(m, instr, kind, lambda a: function(np.atleast_1d(a)), result)


@opcode("and", "or", "xor")
def logic(m: Machine, instr: Instr) -> Step:
    return elementwise(m, instr, type_of(instr), {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[instr.opcode])


@opcode("mov")
def move(m: Machine, instr: Instr) -> Step:
    return elementwise(m, instr, type_of(instr), lambda a: a)


@opcode("selp")
def select(m: Machine, instr: Instr) -> Step:
    kind = type_of(instr)
    write = put(m, instr.operands[0], kind)
    a, b, p = get(m, instr.operands[1], kind), get(m, instr.operands[2], kind), get(m, instr.operands[3], "pred")
    return lambda sel: write(sel, np.where(p(sel), a(sel), b(sel)))


@opcode("slct")
def select_sign(m: Machine, instr: Instr) -> Step:
    kinds = [mod for mod in instr.mods if mod in WIDTH]
    write = put(m, instr.operands[0], kinds[0])
    a, b, c = get(m, instr.operands[1], kinds[0]), get(m, instr.operands[2], kinds[0]), get(m, instr.operands[3], kinds[1])
    return lambda sel: write(sel, np.where(c(sel) >= 0, a(sel), b(sel)))


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(name: str, floating: bool) -> Callable[[Any, Any], Any]:
    """Section 9.3.1: eq .. ge are false where an operand is NaN, equ .. geu true."""
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) ^ (name == "num")
    if name.endswith("u") and name[:-1] in COMPARE:
        plain = COMPARE[name[:-1]]
        return lambda a, b: plain(a, b) | np.isnan(a) | np.isnan(b)
    plain = COMPARE[name]
    if name == "ne" and floating:
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return plain


@opcode("set")
def set_value(m: Machine, instr: Instr) -> Step:
    """Section 9.7.6.1 without a second predicate: 1.0, or all ones, where the comparison holds, else 0."""
    from .floating import widened

    kinds = [mod for mod in instr.mods if mod in WIDTH]
    if len(kinds) != 2 or instr.mods[1] in ("and", "or", "xor"):
        raise PtxError(f"form of {instr}")
    compare = comparison(instr.mods[0], kinds[1][0] == "f" or kinds[1] == "bf16")
    yes = np.float32(1) if kinds[0] == "f32" else np.uint32(0xFFFFFFFF)
    write = put(m, instr.operands[0], "f32" if kinds[0] == "f32" else "b32")
    a, b = (widened(kinds[1], get(m, operand, kinds[1])) for operand in instr.operands[1:3])
    return lambda sel: write(sel, np.where(compare(a(sel), b(sel)), yes, yes.dtype.type(0)))


@opcode("setp")
def set_predicate(m: Machine, instr: Instr) -> Step:
    from .floating import widened

    kind = type_of(instr)
    if kind in ("f16x2", "bf16x2"):
        raise PtxError(f"two comparisons at once in {instr}")
    floating = kind[0] == "f" or kind == "bf16"
    compare = comparison(instr.mods[0], floating)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(instr.mods[1])
    target = instr.operands[0]
    targets = list(target.items) if isinstance(target, Vec) else [target]
    writes = [put(m, one, "pred") for one in targets]
    a, b = (widened(kind, get(m, operand, kind)) for operand in instr.operands[1:3])
    other = get(m, instr.operands[3], "pred") if combine else None

    def run(sel: Sel) -> None:
        result = compare(a(sel), b(sel))
        results = [result, ~result]
        for write, value in zip(writes, results, strict=False):
            write(sel, combine(value, other(sel)) if combine and other else value)

    return run
