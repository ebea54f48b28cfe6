"""Loads, stores and atomics (PTX ISA, sections 9.7.9.8 to 9.7.9.13, 9.7.13.6, 9.7.13.7) and what orders them.

Fences order nothing here, since every store is seen at once: what a missing fence does is not modelled.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .floating import packed, unpacked
from .machine import Machine, Sel, Step, opcode
from .memory import LOCAL, READ, SHARED, WINDOW, WRITE, Array, BlockMemory, Fault, Space
from .operands import VALUE, address, get, items, put, type_of
from .parse import WIDTH, Address, Instr, PtxError, Symbol

SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const")


def space_of(instr: Instr) -> str:
    found = next((mod for mod in instr.mods if mod in SPACES), "generic")
    return found.partition("::")[0]


def places(m: Machine, space: str, where: Array, size: int, right: int, sel: Sel) -> tuple[Space, Array]:
    """Checked addresses as places of a space's bytes; generic ones must all lie in one window."""
    if space == "generic":
        if ((where >= SHARED) & (where < SHARED + WINDOW)).all():
            space, where = "shared", where - SHARED
        elif ((where >= LOCAL) & (where < LOCAL + WINDOW)).all():
            space, where = "local", where - LOCAL
    if space == "shared":
        return m.shared, m.shared.check(where, size, m.block_of[sel])
    if space == "local":
        return m.local, m.local.check(where, size, m.thread_index[sel])
    return m.memory, m.memory.check(where, size, right)


def count_conflicts(m: Machine, instr: Instr, at: Array, size: int, sel: Sel) -> None:
    """Accesses of shared memory beyond the fewest: 32 banks of 4 bytes; 8 bytes go by half warps, 16 by quarter warps."""
    if m.launch.conflicts is None:
        return
    lanes = 32 * 4 // max(size, 4)
    threads = m.thread_index[sel]
    wave = threads // lanes
    words = np.unique(np.stack([np.repeat(wave, max(size // 4, 1)), (at[:, None] // 4 + np.arange(max(size // 4, 1))).reshape(-1)]), axis=1)
    load = np.unique(np.stack([words[0], words[1] % 32]), axis=1, return_counts=True)
    order = np.zeros(int(wave.max()) + 1, np.int64)
    np.maximum.at(order, load[0][0], load[1])
    extra = int((order[order > 0] - 1).sum())
    if extra:
        m.launch.conflicts[str(instr)] = m.launch.conflicts.get(str(instr), 0) + extra


def load_parameter(m: Machine, instr: Instr) -> Step | None:
    """A parameter at a fixed place is the same for all threads."""
    source = instr.operands[1]
    assert isinstance(source, Address)
    if not isinstance(source.base, Symbol):
        return None
    targets, kind = items(instr.operands[0]), type_of(instr)
    width = WIDTH[kind]
    where = np.array([m.global_address(source.base.name) + source.offset + i * width for i in range(len(targets))])
    at = m.memory.check(where, width, READ)
    values = m.memory.load(at, f"u{width}").view(VALUE[kind])
    writes = [put(m, target, kind) for target in targets]

    def run(sel: Sel) -> None:
        for write, value in zip(writes, values, strict=True):
            write(sel, value)

    return run


@opcode("ld", "ldu")
def load(m: Machine, instr: Instr) -> Step:
    space = space_of(instr)
    if space == "param":
        fixed = load_parameter(m, instr)
        if fixed:
            return fixed
    kind, targets = type_of(instr), items(instr.operands[0])
    width, vector = WIDTH[kind], len(targets)
    writes = [put(m, target, kind) for target in targets]
    where, raw, value_type = address(m, instr.operands[1]), f"u{width}", VALUE[kind]

    def run(sel: Sel) -> None:
        source, at = places(m, space, where(sel), width * vector, READ, sel)
        if source is m.memory and space in ("global", "generic"):
            m.counts.read += width * vector * m.size(sel)
        values = source.load(at, raw, vector)
        if source is m.shared:
            count_conflicts(m, instr, at % m.shared.stride, width * vector, sel)
        if vector == 1:
            writes[0](sel, values.view(value_type))
        else:
            for i, write in enumerate(writes):
                write(sel, values[:, i].view(value_type))

    return run


@opcode("st")
def store(m: Machine, instr: Instr) -> Step:
    space, kind, sources = space_of(instr), type_of(instr), items(instr.operands[1])
    if "async" in instr.mods:
        raise PtxError(f"unknown opcode st.async in {instr}")
    width, vector = WIDTH[kind], len(sources)
    reads = [get(m, source, f"b{8 * width}") for source in sources]
    where, raw = address(m, instr.operands[0]), f"u{width}"

    def run(sel: Sel) -> None:
        target, at = places(m, space, where(sel), width * vector, WRITE, sel)
        if target is m.memory:
            m.counts.written += width * vector * m.size(sel)
        if target is m.shared:
            count_conflicts(m, instr, at % m.shared.stride, width * vector, sel)
        if vector == 1:
            target.store(at, reads[0](sel), raw)
        else:
            values = np.empty((m.size(sel), vector), raw)
            for i, read in enumerate(reads):
                values[:, i] = read(sel)
            target.store(at, values, raw, vector)

    return run


def pair_sum(kind: str) -> Callable[[Any, Any], Any]:
    def run(old: Any, new: Any) -> Any:
        (a, b), (c, d) = unpacked(kind, old), unpacked(kind, new)
        return packed(kind, a + c, b + d)

    return run


ATOMICS: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "exch": lambda old, new: new, "inc": lambda old, new: np.where(old >= new, 0, old + 1).astype(np.uint32),
    "dec": lambda old, new: np.where((old == 0) | (old > new), new, old - 1).astype(np.uint32),
}  # fmt: skip


@opcode("atom", "red")
def atomic(m: Machine, instr: Instr) -> Step:
    """One thread after the other, in random order."""
    space, kind = space_of(instr), type_of(instr)
    name = next((mod for mod in instr.mods if mod in ATOMICS or mod == "cas"), "")
    if not name or "async" in instr.mods:
        raise PtxError(f"atomic operation of {instr}")
    function = pair_sum(kind) if kind in ("f16x2", "bf16x2") and name == "add" else ATOMICS.get(name)
    operands = list(instr.operands)
    results = [put(m, target, kind) for target in items(operands.pop(0))] if instr.opcode == "atom" else []
    where = address(m, operands[0])
    reads = [get(m, source, kind) for source in items(operands[1])]
    swap = get(m, operands[2], kind) if name == "cas" else None
    width, vector = WIDTH[kind], len(reads)

    def run(sel: Sel) -> None:
        base = where(sel)
        target, at = places(m, space, base, width * vector, READ | WRITE, sel)
        view = target.data.view(VALUE[kind])
        order = m.random.permutation(len(at))
        for i, read in enumerate(reads):
            values = np.broadcast_to(read(sel), at.shape)
            other = np.broadcast_to(swap(sel), at.shape) if swap else None
            old = np.empty(at.shape, VALUE[kind])
            for j in order:
                place = (at[j] + i * width) // width
                old[j] = view[place]
                if other is not None:
                    if old[j] == values[j]:
                        view[place] = other[j]
                elif function is not None:
                    view[place] = function(view[place], values[j])
            if results:
                results[i](sel, old)

    return run


@opcode("fence", "membar", "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "pmevent", "discard", "applypriority")
def nothing(m: Machine, instr: Instr) -> Step:
    return lambda sel: None


@opcode("createpolicy")
def policy(m: Machine, instr: Instr) -> Step:
    write = put(m, instr.operands[0], "b64")
    return lambda sel: write(sel, np.uint64(0))


def shared_places(m: Machine, where: Array, size: int, sel: Sel) -> Array:
    """Shared addresses of 32 bits, as ldmatrix, cp.async and mbarriers take them, or generic ones."""
    generic = where >= SHARED
    space, at = places(m, "shared", np.where(generic, where - SHARED, where), size, READ | WRITE, sel)
    if not isinstance(space, BlockMemory):
        raise Fault("no shared address")
    return at
