"""A grid of blocks run on the instructions of one entry.

All threads of several blocks (a wave) are numpy arrays side by side. The warps of every block are dealt at random into groups, and a
group runs ahead until all of it waits or has ended: what one warp may do long before another, it does, so that a missing barrier shows.
Within a group the threads with the least program counter run, which brings diverged threads together again (PTX ISA, section 3.1).
Copies and matrix products that the hardware finishes at an unknown time land early (at the issue) or late (at the wait): `timing`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import FIRST_SHARED, Array, BlockMemory, Fault, Memory, pack
from .parse import Address, Entry, Instr, Module, Operand, PtxError, Reg, Variable, Vec
from .registers import Registers

Sel = Any  # a slice of the threads, or an array of their places
Step = Callable[[Sel], None]
Leap = Callable[[Sel], int]  # ends a segment: the next instruction, or AGAIN after setting the threads' states itself

RUN, BARRIER, MBARRIER, CONVERGE, ENDED, OUTSIDE = range(6)
AGAIN = -1
NEVER = 1 << 60
STATE_NAMES = ["running", "waiting at a barrier", "waiting at an mbarrier", "waiting for lanes of its warp", "ended", "outside"]

BUILDERS: dict[str, Callable[["Machine", Instr], Step]] = {}
LEAPS: dict[str, Callable[["Machine", Instr], Leap | None]] = {}  # None: this form of the opcode does not end a segment

WATCHING = {"wgmma"}  # opcodes that watch registers


def registers_in(operand: Operand) -> list[Reg]:
    if isinstance(operand, Reg):
        return [operand]
    if isinstance(operand, Vec):
        return [reg for item in operand.items for reg in registers_in(item)]
    if isinstance(operand, Address):
        return [reg for item in (operand.base, *operand.coords) for reg in registers_in(item)]
    return []


def opcode(*names: str) -> Callable[[Any], Any]:
    def register(builder: Any) -> Any:
        for name in names:
            BUILDERS[name] = builder
        return builder

    return register


def leap(*names: str) -> Callable[[Any], Any]:
    def register(builder: Any) -> Any:
        for name in names:
            LEAPS[name] = builder
        return builder

    return register


class Diverged(Exception):
    """A warp's instruction was reached by some of the lanes it names; `stuck`: these, of all warps where some are missing."""

    def __init__(self, stuck: Array) -> None:
        super().__init__()
        self.stuck = stuck


@dataclass
class Launch:
    """`timing`: when asynchronous work lands, "early" or "late". With `order` every warpgroup is a group of its own, of which the first in
    this order that can run does, a segment at a time: what the last of them is not needed for happens before it moves."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: Sequence[int | float | bytes]
    dynamic_shared: int = 0
    timing: str = "late"
    seed: int = 0
    groups: int = 2
    budget: int = 3_000_000  # instructions, each for all threads that take part
    conflicts: dict[str, int] | None = None  # filled with shared memory's bank conflicts by instruction
    order: tuple[int, ...] = ()
    trace: list[tuple[str, int, int]] | None = None  # filled with what went to tensor cores and accelerator: what, block, warpgroup


@dataclass
class Counts:
    instructions: int = 0
    read: int = 0  # bytes of global memory, by all threads
    written: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)


class Machine:
    def __init__(self, module: Module, entry: Entry, memory: Memory, launch: Launch) -> None:
        self.module, self.entry, self.memory, self.launch = module, entry, memory, launch
        self.random = np.random.default_rng(launch.seed)
        self.counts = Counts()
        self.threads = int(np.prod(launch.block))
        self.blocks = int(np.prod(launch.grid))
        if entry.threads and self.threads > entry.threads:
            raise PtxError(f"{self.threads} threads a block, {entry.name} takes {entry.threads}")
        self.symbols: dict[str, int] = {}
        shared, static_end = self.lay_out()
        self.shared_size, self.static_end = shared, static_end
        self.lay_threads()
        self.reset_hooks: list[Callable[[], None]] = []
        self.end_hooks: list[Callable[[], None]] = []  # when all threads of some blocks have ended
        self.idle_hooks: list[Callable[[], bool]] = []  # may make a thread run again; true if they did
        self.exit_hooks: list[Callable[[Sel], None]] = []
        self.attached: dict[str, Any] = {}
        self.watchers: list[tuple[set[str], Callable[[Sel, bool], None]]] = []  # called when another instruction uses these registers
        self.regs = Registers(entry.regs, self.total)
        self.code: list[Any] = []
        self.build()

    def lay_out(self) -> tuple[int, int]:
        """Addresses of parameters and variables; returns the size of a block's shared memory and where the dynamic part begins."""
        params = self.entry.params
        words = pack(list(self.launch.args), [p.size for p in params], [p.align for p in params])
        base = self.memory.array(np.frombuffer(words or b"\0", np.uint8), writable=False)
        offset = 0
        for p in params:
            offset = (offset + p.align - 1) // p.align * p.align
            self.symbols[p.name] = base + offset
            offset += p.size
        for v in self.module.variables:
            if v.space in ("global", "const"):
                data = np.frombuffer(v.data.ljust(v.size, b"\0"), np.uint8)
                self.symbols[v.name] = self.memory.array(data, writable=v.space == "global")
        at, local = FIRST_SHARED, 0
        dynamic: list[Variable] = []
        for v in [*self.module.variables, *self.entry.variables]:
            if v.space == "shared" and v.dynamic:
                dynamic.append(v)
            elif v.space == "shared":
                at = (at + v.align - 1) // v.align * v.align
                self.symbols[v.name] = at
                at += v.size
            elif v.space == "local":
                local = (local + v.align - 1) // v.align * v.align
                self.symbols[v.name] = local
                local += v.size
        self.local_size = local
        align = max([v.align for v in dynamic], default=16)
        begin = (at + align - 1) // align * align
        if begin % (2 * align) == 0:  # no more aligned than stated
            begin += align
        for v in dynamic:
            self.symbols[v.name] = begin
        return begin + self.launch.dynamic_shared - FIRST_SHARED, at

    def lay_threads(self) -> None:
        """Places of a wave's threads: [group][block][warp][lane]; lanes that fill the last warp up are OUTSIDE."""
        warps = (self.threads + 31) // 32
        team = 4 if any(instr.opcode == "wgmma" for instr in self.entry.instrs) else 1
        teams = [list(range(first, min(first + team, warps))) for first in range(0, warps, team)]
        if not self.launch.order:
            self.random.shuffle(teams)
        groups = len(self.launch.order) or max(1, min(self.launch.groups, len(teams)))
        dealt = [sorted(warp for one in teams[group::groups] for warp in one) for group in range(groups)]
        room = max(1, (48 << 20) // max(self.shared_size, 1024))
        self.wave = max(1, min(self.blocks, 4096 // (32 * warps), room))
        order, self.group_bounds = [], [0]
        for own in dealt:
            for block in range(self.wave):
                order += [(block, warp) for warp in own]
            self.group_bounds.append(len(order) * 32)
        table = np.array(order, np.int64)
        self.total = len(order) * 32
        self.lane = np.tile(np.arange(32, dtype=np.uint32), len(order))
        self.block_of = np.repeat(table[:, 0], 32)
        self.warp_of = np.repeat(table[:, 1], 32)
        self.tid = self.warp_of * 32 + self.lane
        self.group_of = np.searchsorted(np.array(self.group_bounds[1:]), np.arange(self.total), side="right")
        self.pc = np.zeros(self.total, np.int64)
        self.state = np.zeros(self.total, np.int8)
        self.block_id = np.zeros(self.total, np.int64)
        self.shared = BlockMemory(self.wave, self.shared_size, FIRST_SHARED, "shared")
        self.local = BlockMemory(self.total, self.local_size, 0, "local")
        self.thread_index = np.arange(self.total)

    def build(self) -> None:
        """Each instruction becomes a function of the threads that run it; segments end at leaps and before labels."""
        instrs = self.entry.instrs
        leaps = [LEAPS[instr.opcode](self, instr) if instr.opcode in LEAPS else None for instr in instrs]
        self.leaps = [made is not None for made in leaps]
        for at, (instr, made) in enumerate(zip(instrs, leaps, strict=True)):
            if made is None and instr.opcode not in BUILDERS:
                raise PtxError(f"unknown opcode {instr.opcode}.{'.'.join(instr.mods)} in {instr}")
            self.code.append(self.guarded_leap(instr, made, at + 1) if made else self.unbuilt(instr, at))
        for at, instr in enumerate(instrs):
            if instr.opcode in WATCHING:
                self.code[at] = self.guarded(instr, BUILDERS[instr.opcode](self, instr))
        leaders = set(self.entry.labels.values())
        self.ends = [0] * len(instrs)
        end = len(instrs)
        for at in reversed(range(len(instrs))):
            if self.leaps[at] or at + 1 in leaders:
                end = at + 1
            self.ends[at] = end

    def unbuilt(self, instr: Instr, at: int) -> Step:
        """Most instructions of a kernel are never met: each is built when it first is."""

        def run(sel: Sel) -> None:
            self.code[at] = self.guarded(instr, self.watched(instr, BUILDERS[instr.opcode](self, instr)))
            self.code[at](sel)

        return run

    def watched(self, instr: Instr, step: Step) -> Step:
        """With calls of those who watch its registers."""
        names = [{reg.name for reg in registers_in(operand)} for operand in instr.operands]
        calls = [call for watched, call in self.watchers if any(watched & found for found in names)]
        if instr.opcode in WATCHING or not calls:
            return step
        writes = any(watched & names[0] for watched, _ in self.watchers)

        def run(sel: Sel) -> None:
            for call in calls:
                call(sel, writes)
            step(sel)

        return run

    def guarded(self, instr: Instr, step: Step) -> Step:
        if not instr.guard:
            return step
        pred, negated = self.regs[instr.guard], instr.negated

        def run(sel: Sel) -> None:
            mask = pred[sel] ^ negated
            if mask.all():
                step(sel)
            elif mask.any():
                step(self.subset(sel, mask))

        return run

    def guarded_leap(self, instr: Instr, step: Leap, following: int) -> Leap:
        if not instr.guard:
            return step
        pred, negated = self.regs[instr.guard], instr.negated

        def run(sel: Sel) -> int:
            mask = pred[sel] ^ negated
            if mask.all():
                return step(sel)
            if not mask.any():
                return following
            taken = self.subset(sel, mask)
            self.pc[self.subset(sel, ~mask)] = following
            target = step(taken)
            if target != AGAIN:
                self.pc[taken] = target
            return AGAIN

        return run

    def subset(self, sel: Sel, mask: Array) -> Array:
        return self.thread_index[sel][mask]

    def size(self, sel: Sel) -> int:
        return sel.stop - sel.start if isinstance(sel, slice) else len(sel)

    def run(self) -> Counts:
        with np.errstate(all="ignore"):
            for first in range(0, self.blocks, self.wave):
                self.reset(first)
                self.loop()
                for hook in self.end_hooks:
                    hook()
        return self.counts

    def reset(self, first: int) -> None:
        self.block_id[:] = first + self.block_of
        self.state[:] = RUN
        self.state[(self.tid >= self.threads) | (self.block_id >= self.blocks)] = OUTSIDE
        self.pc[:] = 0
        self.shared.poison()
        self.local.poison()
        self.regs.poison()
        for hook in self.reset_hooks:
            hook()

    def loop(self) -> None:
        group = int(self.random.integers(len(self.group_bounds) - 1))
        while True:
            if self.launch.order:
                able = set(self.group_of[self.state == RUN].tolist())
                group = next((each for each in self.launch.order if each in able), group)
            bounds = slice(self.group_bounds[group], self.group_bounds[group + 1])
            places = np.flatnonzero(self.state[bounds] == RUN)
            if places.size == 0:
                able = np.unique(self.group_of[self.state == RUN])
                if able.size:
                    group = int(self.random.choice(able))
                elif (self.state >= ENDED).all():
                    return
                elif not any(hook() for hook in self.idle_hooks):
                    self.deadlock()
                continue
            places += bounds.start
            counters = self.pc[places]
            least = int(counters.min())
            now = counters == least
            if now.all():
                chosen, limit = places, NEVER
            else:
                chosen, limit = places[now], int(counters[~now].min())
            first, last = int(chosen[0]), int(chosen[-1])
            sel: Sel = slice(first, last + 1) if last - first + 1 == chosen.size else chosen
            self.follow(least, sel, limit)

    def follow(self, at: int, sel: Sel, limit: int) -> None:
        """These threads alone, until they wait, part or meet others at `limit`."""
        while 0 <= at < limit:
            at = self.segment(at, sel)
            if self.launch.order:
                break
        if at != AGAIN:
            self.pc[sel] = at

    def segment(self, at: int, sel: Sel) -> int:
        begin, end = at, self.ends[at]
        code = self.code
        last = end - 1 if self.leaps[end - 1] else end
        try:
            while at < last:
                code[at](sel)
                at += 1
            return code[at](sel) if at < end else end
        except Diverged as diverged:
            self.pc[sel] = at
            self.state[diverged.stuck] = CONVERGE
            self.rejoin(diverged.stuck)
            return AGAIN
        except Fault as fault:
            self.blame(fault, at, sel)
            raise
        finally:
            self.counts.instructions += end - begin
            if self.counts.instructions > self.launch.budget:
                raise PtxError(f"{self.entry.name}: more than {self.launch.budget} instructions; last {self.entry.instrs[begin]}")

    def rejoin(self, places: Array) -> None:
        """Wakes the warps of these threads whose living lanes have all come to one instruction."""
        for first in np.unique(places // 32) * 32:
            warp = slice(first, first + 32)
            living = self.state[warp] < ENDED
            stuck = self.state[warp] == CONVERGE
            if stuck.any() and (stuck == living).all() and np.unique(self.pc[warp][living]).size == 1:
                self.state[self.thread_index[warp][stuck]] = RUN

    def note(self, what: str, thread: int) -> None:
        if self.launch.trace is not None:
            self.launch.trace.append((what, int(self.block_id[thread]), int(self.warp_of[thread]) // 4))

    def blame(self, fault: Fault, at: int, sel: Sel) -> None:
        instr = self.entry.instrs[at]
        threads = self.thread_index[sel]
        where = "?"
        if fault.which < len(threads):
            place = threads[fault.which]
            where = f"block {self.block_id[place]} thread {self.tid[place]}"
        raise PtxError(f"{fault} in {instr} by {where} of {self.entry.name}") from None

    def deadlock(self) -> None:
        """Names one thread for each place where some wait."""
        lines: dict[tuple[int, int], str] = {}
        for place in np.flatnonzero((self.state > RUN) & (self.state < ENDED)):
            state = int(self.state[place])
            at = int(self.pc[place]) - (state == BARRIER)
            lines.setdefault(
                (state, at), f"block {self.block_id[place]} thread {self.tid[place]} {STATE_NAMES[state]}, at {self.entry.instrs[at]}"
            )
        raise PtxError("deadlock: " + "; ".join(list(lines.values())[:8]))

    def global_address(self, name: str) -> int:
        if name not in self.symbols:
            raise PtxError(f"unknown symbol {name}")
        return self.symbols[name]


def run(module: Module, entry: Entry, memory: Memory, launch: Launch) -> Counts:
    return Machine(module, entry, memory, launch).run()
