"""Control flow and barriers of a block (PTX ISA, sections 9.7.12 and 9.7.13.1 to 9.7.13.3; cluster barriers for clusters of one block)."""

from typing import Any

import numpy as np

from .machine import AGAIN, BARRIER, ENDED, RUN, Leap, Machine, Sel, Step, leap, opcode
from .memory import Fault
from .operands import get, put
from .parse import Instr, PtxError, Symbol
from .warp import bits_of, converge, mask_of

NAMED = 16
CLUSTER = NAMED  # the barrier behind barrier.cluster


class Barriers:
    """Arrivals by block and barrier; a barrier opens when as many threads have come as it takes: all that live, where none is given."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.arrived = np.zeros((m.wave, NAMED + 1), np.int64)
        self.needed = np.zeros((m.wave, NAMED + 1), np.int64)  # 0: all that live
        self.waits_at = np.full(m.total, -1)
        m.reset_hooks.append(self.reset)
        m.exit_hooks.append(lambda sel: self.open(np.unique(m.block_of[sel])))

    def reset(self) -> None:
        self.arrived[:] = 0
        self.needed[:] = 0
        self.waits_at[:] = -1

    def arrive(self, sel: Sel, barrier: Any, count: Any, waits: bool) -> None:
        m = self.m
        blocks = m.block_of[sel]
        barrier = np.broadcast_to(np.asarray(barrier, np.int64), blocks.shape)
        count = np.broadcast_to(np.asarray(count, np.int64), blocks.shape)
        if (barrier >= NAMED + 1).any():
            raise Fault("a barrier beyond the 16th", int(np.argmax(barrier)))
        open_ = self.arrived[blocks, barrier] > 0
        differ = open_ & (self.needed[blocks, barrier] != count)
        if differ.any():
            raise Fault("threads of one barrier give different counts", int(np.argmax(differ)))
        self.needed[blocks, barrier] = count
        np.add.at(self.arrived, (blocks, barrier), 1)
        if waits:
            m.state[sel] = BARRIER
            self.waits_at[sel] = barrier
        self.open(np.unique(blocks))

    def open(self, blocks: Any) -> None:
        m = self.m
        for block in blocks:
            for barrier in np.flatnonzero(self.arrived[block]):
                needed = self.needed[block, barrier] or int(((m.block_of == block) & (m.state < ENDED)).sum())
                if self.arrived[block, barrier] < needed:
                    continue
                if self.arrived[block, barrier] > needed:
                    raise Fault(f"{self.arrived[block, barrier]} threads at barrier {barrier}, which takes {needed}")
                self.arrived[block, barrier] = 0
                opened = (m.block_of == block) & (self.waits_at == barrier) & (m.state == BARRIER)
                m.state[opened] = RUN
                self.waits_at[opened] = -1


def barriers_of(m: Machine) -> Barriers:
    if "barriers" not in m.attached:
        m.attached["barriers"] = Barriers(m)
    found = m.attached["barriers"]
    assert isinstance(found, Barriers)
    return found


@leap("bra")
def branch(m: Machine, instr: Instr) -> Leap:
    if instr.target not in m.entry.labels:
        raise PtxError(f"no label {instr.target} for {instr}")
    target = m.entry.labels[instr.target]
    return lambda sel: target


@leap("brx")
def branch_indexed(m: Machine, instr: Instr) -> Leap:
    index, table = get(m, instr.operands[0], "u32"), instr.operands[1]
    assert isinstance(table, Symbol)
    targets = np.array([m.entry.labels[label] for label in m.entry.tables[table.name]])

    def run(sel: Sel) -> int:
        at = np.broadcast_to(index(sel), (m.size(sel),))
        if (at >= len(targets)).any():
            raise Fault("a branch beyond its table", int(np.argmax(at)))
        m.pc[sel] = targets[at]
        return AGAIN

    return run


@leap("ret", "exit")
def finish(m: Machine, instr: Instr) -> Leap:
    barriers_of(m)

    def run(sel: Sel) -> int:
        m.state[sel] = ENDED
        for hook in m.exit_hooks:
            hook(sel)
        m.rejoin(m.thread_index[sel])
        return AGAIN

    return run


@leap("trap", "brkpt")
def trap(m: Machine, instr: Instr) -> Leap:
    def run(sel: Sel) -> int:
        raise Fault("trap")

    return run


@leap("bar", "barrier")
def barrier(m: Machine, instr: Instr) -> Leap | None:
    """bar.sync a{, b}, bar.arrive a, b, bar.warp.sync mask, barrier.cluster.arrive and .wait."""
    following = instr.index + 1
    if "cluster" in instr.mods:
        return cluster_barrier(m, instr, following)
    if "warp" in instr.mods or "red" in instr.mods:
        return None
    if "sync" not in instr.mods and "arrive" not in instr.mods:
        raise PtxError(f"form of {instr}")
    own, waits = barriers_of(m), "sync" in instr.mods
    which = get(m, instr.operands[0], "u32")
    count = get(m, instr.operands[1], "u32") if len(instr.operands) > 1 else lambda sel: 0

    def run(sel: Sel) -> int:
        if "aligned" in instr.mods or instr.opcode == "bar":
            converge(m, sel, 0xFFFFFFFF)
        m.pc[sel] = following
        own.arrive(sel, which(sel), count(sel), waits)
        return AGAIN

    return run


def cluster_barrier(m: Machine, instr: Instr, following: int) -> Leap:
    """Of a cluster of one block: arrive counts for nothing but its wait, which takes all threads of the block."""
    own = barriers_of(m)

    def run(sel: Sel) -> int:
        m.pc[sel] = following
        if "wait" in instr.mods:
            own.arrive(sel, CLUSTER, 0, waits=True)
        return AGAIN

    return run


@opcode("bar", "barrier")
def warp_barrier(m: Machine, instr: Instr) -> Step:
    if "warp" not in instr.mods:
        raise PtxError(f"form of {instr}")
    mask = mask_of(m, instr.operands[0])
    return lambda sel: converge(m, sel, mask(sel))


@opcode("match")
def match(m: Machine, instr: Instr) -> Step:
    """match.any.sync: the lanes that hold the same value (9.7.13.11)."""
    if "any" not in instr.mods:
        raise PtxError(f"form of {instr}")
    write, a, mask = put(m, instr.operands[0], "b32"), get(m, instr.operands[1], instr.mods[-1]), mask_of(m, instr.operands[2])

    def run(sel: Sel) -> None:
        converge(m, sel, mask(sel))
        values = np.broadcast_to(a(sel), (m.size(sel),))
        out = np.zeros(len(values), np.uint32)
        for value in np.unique(values):
            same = values == value
            out = np.where(same, bits_of(m, sel, same)[0].astype(np.uint32), out)
        write(sel, out)

    return run
