"""mbarrier objects in shared memory (PTX ISA, section 9.7.13.15).

A phase ends when as many arrivals as the barrier was made for have come and the bytes it expects have landed. A thread in try_wait sleeps
until the phase of its parity has ended; now and then it is told false although it might have slept on, which code must expect.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .access import shared_places
from .machine import AGAIN, MBARRIER, RUN, Leap, Machine, Sel, Step, leap, opcode
from .memory import Fault
from .operands import address, get, put
from .parse import Instr, PtxError

FALSE_ALARMS = 0.1
MOST = (1 << 20) - 1  # arrivals and bytes of a phase


@dataclass
class Barrier:
    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0


class MBarriers:
    def __init__(self, m: Machine) -> None:
        self.m = m
        self.made: dict[int, Barrier] = {}  # by place in shared memory
        self.waits_at = np.full(m.total, -1, np.int64)
        self.waits_for = np.zeros(m.total, np.int64)  # parity
        m.reset_hooks.append(self.reset)
        m.end_hooks.append(self.end)

    def reset(self) -> None:
        self.made.clear()
        self.waits_at[:] = -1

    def end(self) -> None:
        """Arrivals beyond a phase open the next one: legal, and in a kernel whose threads arrive equally often a sign of a wrong count."""
        for barrier in self.made.values():
            if barrier.pending != barrier.expected or barrier.bytes:
                came = barrier.expected - barrier.pending
                raise PtxError(
                    f"the kernel ends within a phase of an mbarrier: {came} of {barrier.expected} arrivals, {barrier.bytes} bytes"
                )

    def find(self, place: int, which: int = 0) -> Barrier:
        if place not in self.made:
            raise Fault("no mbarrier was initialised here", which)
        return self.made[place]

    def change(self, place: int, arrivals: int, more_bytes: int, which: int = 0) -> int:
        """Arrivals and expected (positive) or landed (negative) bytes; returns the phase before."""
        barrier = self.find(place, which)
        before = barrier.phase
        barrier.bytes += more_bytes
        barrier.pending -= arrivals
        if barrier.pending < 0:
            raise Fault(f"more than the {barrier.expected} arrivals that this mbarrier takes", which)
        if abs(barrier.bytes) > MOST:
            raise Fault(f"an mbarrier expects {barrier.bytes} bytes", which)
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.expected
            woken = (self.waits_at == place) & (self.waits_for != barrier.phase % 2)
            self.m.state[woken & (self.m.state == MBARRIER)] = RUN
            self.waits_at[woken] = -1
        return before


def mbarriers_of(m: Machine) -> MBarriers:
    if "mbarriers" not in m.attached:
        m.attached["mbarriers"] = MBarriers(m)
    found = m.attached["mbarriers"]
    assert isinstance(found, MBarriers)
    return found


@leap("mbarrier")
def wait(m: Machine, instr: Instr) -> Leap | None:
    """try_wait.parity and test_wait.parity: true once the phase of this parity has ended, that is, the current one has the other.

    An arrival ends a segment too, so that others may run before what follows it.
    """
    if instr.mods[0] == "arrive":
        arrive = mbarrier(m, instr)

        def go_on(sel: Sel) -> int:
            arrive(sel)
            return instr.index + 1

        return go_on
    if instr.mods[0] not in ("try_wait", "test_wait"):
        return None
    if "parity" not in instr.mods:
        raise PtxError(f"form of {instr}")
    own, sleeps = mbarriers_of(m), instr.mods[0] == "try_wait"
    write, where, parity = put(m, instr.operands[0], "pred"), address(m, instr.operands[1]), get(m, instr.operands[2], "u32")

    def run(sel: Sel) -> int:
        threads = m.thread_index[sel]
        at = shared_places(m, where(sel), 8, sel)
        wanted = np.broadcast_to(np.asarray(parity(sel), np.int64), at.shape)
        if (wanted > 1).any():
            raise Fault("a parity other than 0 and 1", int(np.argmax(wanted > 1)))
        phases = np.array([own.find(int(place), i).phase for i, place in enumerate(at)])
        done = phases % 2 != wanted
        told = done | (m.random.random(len(at)) < FALSE_ALARMS) if sleeps else np.ones(len(at), bool)
        write(threads[told], done[told])
        m.pc[threads] = np.where(told, instr.index + 1, instr.index)
        asleep = threads[~told]
        m.state[asleep] = MBARRIER
        own.waits_at[asleep], own.waits_for[asleep] = at[~told], wanted[~told]
        return instr.index + 1 if told.all() else AGAIN

    return run


@opcode("mbarrier")
def mbarrier(m: Machine, instr: Instr) -> Step:
    own, form = mbarriers_of(m), instr.mods[0]
    operands = list(instr.operands)
    state = put(m, operands.pop(0), "b64") if form == "arrive" and "noComplete" not in instr.mods else None
    if form not in ("init", "inval", "arrive", "expect_tx") or state is None and form == "arrive":
        raise PtxError(f"unknown opcode mbarrier.{'.'.join(instr.mods)} in {instr}")
    where = address(m, operands[0])
    count = get(m, operands[1], "u32") if len(operands) > 1 else lambda sel: 1
    expects = "expect_tx" in instr.mods

    def run(sel: Sel) -> None:
        at = shared_places(m, where(sel), 8, sel)
        counts = np.broadcast_to(np.asarray(count(sel), np.int64), at.shape)
        before: Any = np.zeros(len(at), np.uint64)
        for i, (place, number) in enumerate(zip(at.tolist(), counts.tolist(), strict=True)):
            if form == "init":
                if not 1 <= number <= MOST:
                    raise Fault(f"an mbarrier of {number} arrivals", i)
                own.made[place] = Barrier(number, number)
            elif form == "inval":
                own.find(place, i)
                del own.made[place]
            else:
                arrivals = 0 if form == "expect_tx" else (1 if expects else number)
                before[i] = own.change(place, arrivals, number if expects else 0, i)
        if state:
            state(sel, before)

    return run
