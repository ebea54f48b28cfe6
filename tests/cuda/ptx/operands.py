"""Operands as functions of the threads (PTX ISA, section 6): typed reads and writes of registers, immediates, special registers.

Registers hold raw bits. Reading with a narrower type truncates, writing one extends by the sign of the type (sections 9.4 and 9.6).
bf16 and packed pairs stay raw; f16, f32 and f64 are numpy's floats.
"""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import Machine, Sel
from .memory import Array
from .parse import WIDTH, Address, Imm, Instr, Operand, PtxError, Reg, Symbol, Vec
from .registers import NUMPY

Get = Callable[[Sel], Any]
Put = Callable[[Sel, Any], None]

VALUE = {"pred": "?", "f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4", "tf32": "u4"}
VALUE |= {f"b{n}": f"u{n // 8}" for n in (8, 16, 32, 64)}
VALUE |= {f"u{n}": f"u{n // 8}" for n in (8, 16, 32, 64)} | {f"s{n}": f"i{n // 8}" for n in (8, 16, 32, 64)}


def type_of(instr: Instr) -> str:
    """The last type among the modifiers, which is that of the data."""
    for mod in reversed(instr.mods):
        if mod in WIDTH:
            return mod
    raise PtxError(f"no type in {instr}")


def immediate(imm: Imm, kind: str) -> Any:
    dtype = np.dtype(VALUE[kind])
    if imm.real:
        value = struct.unpack("<f" if imm.real == "f" else "<d", imm.bits.to_bytes(4 if imm.real == "f" else 8, "little"))[0]
        if dtype.kind == "f":
            return dtype.type(value)
        return dtype.type(imm.bits)
    if kind == "pred":
        return np.bool_(imm.bits)
    raw = imm.bits & ((1 << 8 * dtype.itemsize) - 1)
    if dtype.kind == "f" and not imm.bits:
        return dtype.type(0)
    return np.array(raw, f"u{dtype.itemsize}").view(dtype)[()]


def special(m: Machine, name: str) -> Get | None:
    """Special registers, section 10."""
    base, _, dim = name.removeprefix("%").partition(".")
    axis = {"x": 0, "y": 1, "z": 2, "": 0}.get(dim)
    if axis is None:
        return None
    if base in ("tid", "ctaid"):
        sizes = m.launch.block if base == "tid" else m.launch.grid
        source, below = (m.tid if base == "tid" else m.block_id), int(np.prod(sizes[:axis]))
        return lambda sel: (source[sel] // below % sizes[axis]).astype(np.uint32)
    fixed = {"ntid": m.launch.block[axis], "nctaid": m.launch.grid[axis], "cluster_nctaid": 1, "cluster_ctaid": 0, "cluster_ctarank": 0}
    fixed |= {
        "cluster_nctarank": 1,
        "nclusterid": m.launch.grid[axis],
        "dynamic_smem_size": m.launch.dynamic_shared,
        "nwarpid": (m.threads + 31) // 32,
    }
    fixed |= {"smid": 0, "nsmid": 1, "clock": 0, "clock64": 0, "globaltimer": 0, "total_smem_size": m.shared_size, "is_explicit_cluster": 0}
    if base in fixed:
        value = np.uint32(fixed[base])
        return lambda sel: value
    if base == "laneid":
        return lambda sel: m.lane[sel]
    if base == "warpid":
        return lambda sel: m.warp_of[sel].astype(np.uint32)
    if base == "clusterid":
        return lambda sel: m.block_id[sel].astype(np.uint32)
    masks = {
        "lanemask_eq": lambda lane: 1 << lane,
        "lanemask_lt": lambda lane: (1 << lane) - 1,
        "lanemask_le": lambda lane: (2 << lane) - 1,
        "lanemask_gt": lambda lane: 0xFFFFFFFF & ~((2 << lane) - 1),
        "lanemask_ge": lambda lane: 0xFFFFFFFF & ~((1 << lane) - 1),
    }
    if base in masks:
        table = np.array([masks[base](lane) for lane in range(32)], np.uint64).astype(np.uint32)
        return lambda sel: table[m.lane[sel]]
    return None


def register(m: Machine, name: str, kind: str) -> Get:
    values = m.regs[name]
    width = WIDTH[kind]
    if kind == "pred" or values.itemsize == width:
        typed = values.view(VALUE[kind])
        return lambda sel: typed[sel]
    if values.itemsize < width:
        raise PtxError(f"{name} is narrower than {kind}")
    raw, value = f"u{width}", VALUE[kind]
    return lambda sel: values[sel].astype(raw).view(value)


def get(m: Machine, operand: Operand, kind: str) -> Get:
    if isinstance(operand, Reg):
        return register(m, operand.name, kind)
    if isinstance(operand, Imm):
        value = immediate(operand, kind)
        return lambda sel: value
    if isinstance(operand, Symbol):
        if operand.name == "WARP_SZ":
            return lambda sel: np.uint32(32)
        if operand.name.startswith("%"):
            found = special(m, operand.name)
            if found is None:
                raise PtxError(f"unknown special register {operand.name}")
            value_type = VALUE[kind]
            return lambda sel: found(sel).astype(value_type)
        fixed = np.dtype(VALUE[kind]).type(m.global_address(operand.name))
        return lambda sel: fixed
    if isinstance(operand, Vec) and operand.items and operand.items[0] == Symbol("!"):
        inner = get(m, operand.items[1], "pred")
        return lambda sel: ~inner(sel)
    if isinstance(operand, Vec):
        return gathered(m, operand, kind)
    raise PtxError(f"operand {operand} read as {kind}")


def gathered(m: Machine, vec: Vec, kind: str) -> Get:
    """{lo, hi} read as one wider value: the first element holds the least bits."""
    width = WIDTH[kind] // len(vec.items)
    parts = [get(m, item, f"b{8 * width}") for item in vec.items]
    raw, value = f"u{width * len(parts)}", VALUE[kind]

    def read(sel: Sel) -> Array:
        columns = np.empty((m.size(sel), len(parts)), f"u{width}")
        for at, part in enumerate(parts):
            columns[:, at] = part(sel)
        return columns.view(raw)[:, 0].view(value)

    return read


def put(m: Machine, operand: Operand, kind: str) -> Put:
    if isinstance(operand, Symbol) and operand.name == "_":
        return lambda sel, value: None
    if isinstance(operand, Vec):
        return scattered(m, operand, kind)
    if not isinstance(operand, Reg):
        raise PtxError(f"operand {operand} written as {kind}")
    values = m.regs[operand.name]
    if kind == "pred" or values.itemsize == WIDTH[kind]:
        typed = values.view(VALUE[kind])

        def write(sel: Sel, value: Any) -> None:
            typed[sel] = value

        return write
    if values.itemsize < WIDTH[kind]:
        raise PtxError(f"{operand.name} is narrower than {kind}")
    narrow = np.dtype(VALUE[kind])
    narrow = np.dtype(f"u{narrow.itemsize}") if narrow.kind == "f" else narrow
    wide = values.view(f"{narrow.kind}{values.itemsize}")

    def extend(sel: Sel, value: Any) -> None:
        value = np.asarray(value)
        wide[sel] = value.view(narrow) if value.dtype.kind == "f" else value.astype(narrow)

    return extend


def scattered(m: Machine, vec: Vec, kind: str) -> Put:
    width = WIDTH[kind] // len(vec.items)
    parts = [put(m, item, f"b{8 * width}") for item in vec.items]

    def write(sel: Sel, value: Any) -> None:
        whole = np.ascontiguousarray(np.broadcast_to(value, (m.size(sel),)))
        columns = whole.view(f"u{width}").reshape(-1, len(parts))
        for at, part in enumerate(parts):
            part(sel, columns[:, at])

    return write


def items(operand: Operand) -> list[Operand]:
    return list(operand.items) if isinstance(operand, Vec) else [operand]


def address(m: Machine, operand: Operand) -> Get:
    """An address of as many bits as its register has, with its offset added, as int64."""
    assert isinstance(operand, Address)
    offset = operand.offset
    if isinstance(operand.base, Reg):
        values = m.regs[operand.base.name]
        if values.itemsize == 4:
            return lambda sel: values[sel].astype(np.int64) + offset
        signed = values.view(np.int64)
        return lambda sel: signed[sel] + offset
    if isinstance(operand.base, Imm):
        fixed = operand.base.bits + offset
    else:
        assert isinstance(operand.base, Symbol)
        fixed = m.global_address(operand.base.name) + offset
    return lambda sel: np.full(m.size(sel), fixed, np.int64)


__all__ = ["NUMPY", "VALUE", "Get", "Put", "address", "get", "items", "put", "type_of"]
