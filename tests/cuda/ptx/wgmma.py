"""wgmma (PTX ISA, section 9.7.16): products of a warpgroup (4 warps) that read their operands from shared memory by themselves.

They are computed at the issue (timing late: what TMA has not brought yet is missing) or when wait_group names them (timing early: what
TMA has brought too soon is there). Accumulators may not be touched in between, and whatever else writes them calls for wgmma.fence: both
are checked. Matrix descriptors are those of section 9.7.16.5.1.2, with these places of element (row, k), before the swizzle, row standing
for a row of A or a column of B, for 16-bit elements and a swizzle of S bytes:
    K-major             (row % 8) S + (row / 8) stride + 2 k
      without swizzle   (row % 8) 16 + (row / 8) stride + (k / 8) leading + 2 (k % 8)
    MN-major            2 (row % (S/2)) + (row / (S/2)) leading + (k % 8) S + (k / 8) stride
      without swizzle   2 (row % 8) + (row / 8) stride + 16 (k % 8) + (k / 8) leading
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .convert import to_tf32
from .floating import bf16_value
from .machine import Machine, Sel, Step, opcode
from .memory import Array, Fault
from .operands import Get, get, items, put
from .parse import Imm, Instr, PtxError, Reg, Vec
from .tma import swizzled
from .warp import fragment, matrices, need_whole

SPANS = {0: 0, 1: 128, 2: 64, 3: 32}
PATTERN = {0: 16, 32: 256, 64: 512, 128: 1024}


@dataclass(frozen=True)
class Form:
    n: int
    k: int
    kind: str  # of the operands
    trans_a: bool
    trans_b: bool
    negate_a: bool
    negate_b: bool


@dataclass
class Product:
    threads: Array
    group: Array  # of each thread
    run: Any
    done: bool = False


def places(descriptor: int, rows: int, form: Form, mn_major: bool) -> Array:
    """Shared addresses [row, k] of a matrix."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    span = SPANS[descriptor >> 62 & 3]
    if descriptor >> 49 & 7:
        raise Fault("a base offset in a matrix descriptor")
    if span and start % PATTERN[span] >= span:
        raise Fault(f"a matrix at {start:#x} begins within the pattern of its swizzle, and has no base offset")
    width = 4 if form.kind == "tf32" else 2
    per = 16 // width
    row, k = np.arange(rows)[:, None], np.arange(form.k)[None]
    if mn_major:
        if span:
            line = span // width
            offset = row % line * width + row // line * leading + k % 8 * span + k // 8 * stride
        else:
            offset = row % per * width + row // per * stride + k % 8 * 16 + k // 8 * leading
    elif span:
        offset = row % 8 * span + row // 8 * stride + k * width
    else:
        offset = row % 8 * 16 + row // 8 * stride + k // per * leading + k % per * width
    return swizzled(start + offset, span) if span else start + offset


class Warpgroups:
    def __init__(self, m: Machine) -> None:
        self.m = m
        self.pending: list[Product] = []
        self.group = np.zeros(m.total, np.int64)
        self.flying = np.zeros(m.total, np.int64)  # products under way, by thread
        self.fenced = np.zeros(m.total, bool)
        self.cache: dict[tuple[int, int, Form, bool], Array] = {}
        m.reset_hooks.append(self.reset)
        self.watch()

    def reset(self) -> None:
        self.pending.clear()
        self.group[:] = 0
        self.flying[:] = 0
        self.fenced[:] = False

    def watch(self) -> None:
        """Other instructions that use the registers of the products."""
        watched: set[str] = set()
        for instr in self.m.entry.instrs:
            if instr.opcode == "wgmma" and instr.mods[0] == "mma_async":
                watched |= {reg.name for vec in instr.operands if isinstance(vec, Vec) for reg in vec.items if isinstance(reg, Reg)}
        self.m.watchers.append((watched, self.touched))

    def touched(self, sel: Sel, writes: bool) -> None:
        flying = self.flying[sel]
        if flying.any():
            raise Fault("a register of a product under way is used before wgmma.wait_group", int(np.argmax(flying > 0)))
        if writes:
            self.fenced[sel] = False

    def issue(self, sel: Sel, run: Any) -> None:
        threads = self.m.thread_index[sel]
        missing = ~self.fenced[threads]
        if missing.any():
            raise Fault("registers of a product were written after the last wgmma.fence", int(np.argmax(missing)))
        self.m.note("product", threads[0])
        product = Product(threads, self.group[threads].copy(), run)
        self.flying[threads] += 1
        if self.m.launch.timing == "late":
            run()
            product.done = True
        self.pending.append(product)

    def wait(self, sel: Sel, last: int) -> None:
        waiting = np.zeros(self.m.total, bool)
        waiting[sel] = True
        kept = []
        for product in self.pending:
            now = waiting[product.threads] & (product.group < self.group[product.threads] - last)
            if not now.any():
                kept.append(product)
            elif not now.all():
                raise Fault("wgmma.wait_group by a part of the warps that issued a product")
            else:
                if not product.done:
                    product.run()
                self.flying[product.threads] -= 1
        self.pending = kept

    def operand(self, descriptor: int, block: int, rows: int, form: Form, mn_major: bool) -> Array:
        """[row, k] as float32."""
        key = (descriptor, rows, form, mn_major)
        if key not in self.cache:
            self.cache[key] = places(descriptor, rows, form, mn_major).reshape(-1)
        where = self.cache[key]
        width = 4 if form.kind == "tf32" else 2
        at = self.m.shared.check(where, width, np.full(len(where), block))
        raw = self.m.shared.load(at, f"u{width}").reshape(rows, form.k)
        if form.kind == "bf16":
            return np.asarray(bf16_value(raw))
        if form.kind == "f16":
            return raw.view(np.float16).astype(np.float32)
        return np.asarray(to_tf32(raw.view(np.float32), "rz")).view(np.float32)


def warpgroups_of(m: Machine) -> Warpgroups:
    if "wgmma" not in m.attached:
        m.attached["wgmma"] = Warpgroups(m)
    found = m.attached["wgmma"]
    assert isinstance(found, Warpgroups)
    return found


def need_warpgroups(m: Machine, sel: Sel) -> int:
    need_whole(m, sel)
    first = m.thread_index[sel][::32]
    numbers = m.warp_of[first]
    if len(first) % 4 or (numbers[::4] % 4 != 0).any() or any((numbers[i::4] != numbers[::4] + i).any() for i in range(4)):
        raise Fault("an instruction of whole warpgroups met by a part of one")
    return len(first) // 4


def form_of(instr: Instr) -> Form:
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", instr.mods[3])
    d, kind, other = instr.mods[4:7]
    if shape is None or instr.mods[1:3] != ("sync", "aligned") or d != "f32" or kind != other or kind not in ("bf16", "f16", "tf32"):
        raise PtxError(f"form of {instr}")
    n, k = int(shape.group(1)), int(shape.group(2))
    numbers = [operand.bits for operand in instr.operands[4:] if isinstance(operand, Imm)]
    in_registers = isinstance(instr.operands[1], Vec)
    bits = 2 + (0 if kind == "tf32" else 1 if in_registers else 2)
    if len(numbers) != bits or n % 8 or not 8 <= n <= 256 or k != (8 if kind == "tf32" else 16) or not {abs(x) for x in numbers[:2]} == {1}:
        raise PtxError(f"form of {instr}")
    trans = [bool(x) for x in numbers[2:]]
    trans = [False, *trans] if in_registers else trans
    trans = trans + [False] * (2 - len(trans))
    return Form(n, k, kind, trans[0], trans[1], numbers[0] < 0, numbers[1] < 0)


def product(m: Machine, instr: Instr) -> Step:
    """d = a b + d, or a b where the predicate scale-d is false. d is 64 x n: warp w holds 16 rows from 16 w on, like mma."""
    own, form = warpgroups_of(m), form_of(instr)
    d = items(instr.operands[0])
    if len(d) != form.n // 2:
        raise PtxError(f"registers of {instr}")
    read_d, write_d = [get(m, x, "f32") for x in d], [put(m, x, "f32") for x in d]
    in_registers = isinstance(instr.operands[1], Vec)
    read_a: list[Get] = [get(m, x, "b32") for x in items(instr.operands[1])] if in_registers else [get(m, instr.operands[1], "b64")]
    read_b, scale = get(m, instr.operands[2], "b64"), get(m, instr.operands[3], "pred")
    where_a = fragment(f"m16n8k{form.k}", form.kind, "a")

    def run(sel: Sel) -> None:
        teams = need_warpgroups(m, sel)
        threads = m.thread_index[sel].copy()
        blocks = m.block_of[threads[::128]]
        descriptor_b = same(read_b(sel), teams)
        adds = np.broadcast_to(scale(sel), threads.shape)[::128]
        if in_registers:
            left = matrices([read(sel) for read in read_a], 4 * teams, form.kind, where_a).reshape(teams, 64, form.k)
        else:
            descriptor_a = same(read_a[0](sel), teams)

        def compute(team: int) -> None:
            own_threads, own_blocks = threads[128 * team : 128 * (team + 1)], blocks[team : team + 1]
            a = left[team] if in_registers else own.operand(descriptor_a[team], own_blocks[0], 64, form, form.trans_a)
            b = own.operand(descriptor_b[team], own_blocks[0], form.n, form, form.trans_b)
            c = (-a if form.negate_a else a) @ (-b if form.negate_b else b).T
            # [warp, half, row, column group, lane of four, pair] -> [register][thread]
            parts = c.reshape(4, 2, 8, form.n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(form.n // 2, 128)
            for i, write in enumerate(write_d):
                write(own_threads, read_d[i](own_threads) + parts[i] if adds[team] else parts[i])

        for team in range(teams):
            own.issue(threads[128 * team : 128 * (team + 1)], partial(compute, team))

    return run


def same(values: Any, teams: int) -> list[int]:
    """A value that all threads of a warpgroup must share."""
    table = np.broadcast_to(np.asarray(values), (128 * teams,)).reshape(teams, 128)
    if (table != table[:, :1]).any():
        raise Fault("threads of a warpgroup give different matrix descriptors")
    return [int(value) for value in table[:, 0]]


@opcode("wgmma")
def wgmma(m: Machine, instr: Instr) -> Step:
    own, form = warpgroups_of(m), instr.mods[0]
    if form == "mma_async" and "sp" not in instr.mods:
        return product(m, instr)
    if form == "fence":

        def fence(sel: Sel) -> None:
            need_warpgroups(m, sel)
            own.fenced[sel] = True

        return fence
    if form == "commit_group":

        def commit(sel: Sel) -> None:
            own.group[sel] += 1

        return commit
    if form == "wait_group":
        count = instr.operands[0]
        assert isinstance(count, Imm)
        last = count.bits
        return lambda sel: own.wait(sel, last)
    raise PtxError(f"unknown opcode wgmma.{'.'.join(instr.mods)} in {instr}")


@opcode("setmaxnreg")
def registers(m: Machine, instr: Instr) -> Step:
    """Section 9.7.19.5: the counts are checked, their sum over the block is not."""
    count = instr.operands[0]
    if not isinstance(count, Imm) or not 24 <= count.bits <= 256 or count.bits % 8:
        raise PtxError(f"form of {instr}")

    def run(sel: Sel) -> None:
        need_warpgroups(m, sel)

    return run
