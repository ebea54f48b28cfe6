"""cp.async (PTX ISA, section 9.7.9.25.3): copies of 4, 8 or 16 bytes from global to shared memory that finish by themselves.

They land at the issue (timing early) or at the wait that names their group (late). A copy that no wait names never lands late, so that
reading it gives the poison.
"""

from dataclasses import dataclass

import numpy as np

from .access import count_conflicts, shared_places
from .machine import Machine, Sel, Step, opcode
from .memory import READ, Array
from .operands import address, get
from .parse import Imm, Instr, PtxError


@dataclass
class Copy:
    threads: Array
    group: Array
    to: Array  # places in shared memory
    source: Array  # places in global memory
    bytes: Array  # of each copy that are read; the rest is zeros
    size: int


class Copies:
    def __init__(self, m: Machine) -> None:
        self.m = m
        self.pending: list[Copy] = []
        self.group = np.zeros(m.total, np.int64)  # of the next copy, by thread
        m.reset_hooks.append(self.reset)

    def reset(self) -> None:
        self.pending.clear()
        self.group[:] = 0

    def issue(self, copy: Copy) -> None:
        self.m.counts.read += int(copy.bytes.sum())
        if self.m.launch.timing == "early":
            self.land(copy)
        else:
            self.pending.append(copy)

    def land(self, copy: Copy) -> None:
        rows = self.m.memory.data[copy.source[:, None] + np.arange(copy.size)]
        rows[np.arange(copy.size)[None] >= copy.bytes[:, None]] = 0
        self.m.shared.data[copy.to[:, None] + np.arange(copy.size)] = rows

    def wait(self, sel: Sel, last: int) -> None:
        """All but the newest `last` groups of these threads land; with last = -1 uncommitted copies too."""
        waiting = np.zeros(self.m.total, bool)
        waiting[sel] = True
        kept = []
        for copy in self.pending:
            now = waiting[copy.threads] & (copy.group < self.group[copy.threads] - last)
            for mine, keep in ((now, False), (~now, True)):
                if mine.any():
                    part = Copy(copy.threads[mine], copy.group[mine], copy.to[mine], copy.source[mine], copy.bytes[mine], copy.size)
                    if keep:
                        kept.append(part)
                    else:
                        self.land(part)
        self.pending = kept


def copies_of(m: Machine) -> Copies:
    if "copies" not in m.attached:
        m.attached["copies"] = Copies(m)
    found = m.attached["copies"]
    assert isinstance(found, Copies)
    return found


def copy(m: Machine, instr: Instr) -> Step:
    own, to, source = copies_of(m), address(m, instr.operands[0]), address(m, instr.operands[1])
    size_operand = instr.operands[2]
    assert isinstance(size_operand, Imm)
    size = size_operand.bits
    read_size = None
    if len(instr.operands) > 3:
        read_size = get(m, instr.operands[3], "u32")
    if len(instr.operands) > 4 or size not in (4, 8, 16) or ("cg" in instr.mods and size != 16):
        raise PtxError(f"form of {instr}")

    def run(sel: Sel) -> None:
        threads = m.thread_index[sel]
        at = shared_places(m, to(sel), size, sel)
        count_conflicts(m, instr, at % m.shared.stride, size, sel)
        count = np.minimum(
            np.broadcast_to(read_size(sel), threads.shape).astype(np.int64) if read_size else np.full(len(threads), size), size
        )
        where = source(sel)
        # an address from which nothing is read may be anything
        places = np.zeros(len(threads), np.int64)
        reading = count > 0
        if reading.any():
            places[reading] = (
                m.memory.check(where[reading], size, 0xFF) if (count[reading] == size).all() else partial(m, where[reading], count[reading])
            )
        own.issue(Copy(threads, own.group[sel].copy(), at, places, count, size))

    return run


def partial(m: Machine, where: Array, count: Array) -> Array:
    first = m.memory.check(where, 1, READ)
    m.memory.check(where + count - 1, 1, READ)
    return first


@opcode("cp")
def cp(m: Machine, instr: Instr) -> Step:
    if "bulk" in instr.mods:
        from .tma import bulk

        return bulk(m, instr)
    if instr.mods[0] != "async" or "mbarrier" in instr.mods:
        raise PtxError(f"unknown opcode cp.{'.'.join(instr.mods)} in {instr}")
    own = copies_of(m)
    if "commit_group" in instr.mods:

        def commit(sel: Sel) -> None:
            own.group[sel] += 1

        return commit
    if "wait_group" in instr.mods:
        count = instr.operands[0]
        assert isinstance(count, Imm)
        last = count.bits
        return lambda sel: own.wait(sel, last)
    if "wait_all" in instr.mods:
        return lambda sel: own.wait(sel, -1)
    return copy(m, instr)


__all__ = ["Copies", "copies_of"]
