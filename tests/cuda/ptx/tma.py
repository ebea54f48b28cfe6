"""The tensor memory accelerator: cp.async.bulk.tensor (PTX ISA, sections 5.5 tensors, 9.7.9.27.1) and its plain sibling cp.async.bulk.

A load copies a box of a tensor of up to 3 dimensions into shared memory, zeros for what lies outside of the tensor, the innermost dimension
contiguous, with the 16-byte chunks of the shared address swizzled (section 5.5.8). It lands at the issue (timing early), or when no thread
can run without it (late), in random order, and then counts its bytes down on the mbarrier. Stores land at the issue (early) or at the wait.
Tensor maps are those of host.cc's cuTensorMapEncodeTiled, with the driver's checks.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .access import shared_places
from .copies import copies_of
from .machine import Machine, Sel, Step
from .mbarriers import mbarriers_of
from .memory import READ, WRITE, Array, Fault
from .operands import Get, address, get
from .parse import Address, Imm, Instr, PtxError

MAGIC = 0x544D4150
MAP = struct.Struct("<IBBBBQ3Q2Q3I")
SPANS = {0: 0, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle
BITS = {0: 0, 32: 1, 64: 3, 128: 7}


@dataclass(frozen=True)
class TensorMap:
    width: int  # of an element
    rank: int
    span: int  # of the swizzle
    base: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, the innermost too
    box: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.width


def decode(data: bytes) -> TensorMap:
    magic, width, rank, swizzle, _, base, *rest = MAP.unpack(data[: MAP.size])
    if magic != MAGIC:
        raise Fault("no tensor map lies here")
    return TensorMap(width, rank, SPANS[swizzle], base, tuple(rest[:rank]), (width, *rest[3 : 2 + rank]), tuple(rest[5 : 5 + rank]))


def encode(width: int, span: int, base: int, sizes: tuple[int, ...], pitches: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """A kernel's CUtensorMap parameter; sizes and box innermost first, pitches in bytes, of all dimensions but the innermost."""
    swizzle = next(mode for mode, bytes_ in SPANS.items() if bytes_ == span)
    sizes, pitches, box = (*sizes, 0, 0)[:3], (*pitches, 0, 0)[:2], (*box, 0, 0)[:3]
    rank = sum(size > 0 for size in sizes)
    return MAP.pack(MAGIC, width, rank, swizzle, 0, base, *sizes, *pitches, *box).ljust(128, b"\0")


def swizzled(where: Array, span: int) -> Array:
    """Address bits 4.. are exclusive-ored with bits 7..: one, two or three of them for 32, 64 and 128 bytes."""
    return where ^ ((where >> 7 & BITS[span]) << 4)


def cells(tensor: TensorMap, start: tuple[int, ...]) -> tuple[Array, Array]:
    """Of the box at `start`: each element's address in global memory and whether it exists, innermost dimension last."""
    place: Array = np.zeros((1,) * tensor.rank, np.int64) + tensor.base
    inside: Array = np.ones((1,) * tensor.rank, bool)
    for dim in range(tensor.rank):
        shape = [1] * tensor.rank
        shape[tensor.rank - 1 - dim] = tensor.box[dim]
        index = (start[dim] + np.arange(tensor.box[dim])).reshape(shape)
        place = place + index * tensor.strides[dim]
        inside = inside & (index >= 0) & (index < tensor.sizes[dim])
    return place.reshape(-1), np.broadcast_to(inside, place.shape).reshape(-1)


def added(one: Array, two: Array) -> Array:
    """add.f32 of the accelerator (section 9.7.9.27.1.3): to nearest, subnormal numbers count as zeros before and after."""
    tiny = np.finfo(np.float32).tiny
    flushed = [np.where(np.abs(each) < tiny, np.float32(0), each).astype(np.float32) for each in (one, two)]
    total = flushed[0] + flushed[1]
    return np.where(np.abs(total) < tiny, np.float32(0), total).astype(np.float32)


class Accelerator:
    def __init__(self, m: Machine) -> None:
        self.m = m
        self.flying: list[tuple[int, Callable[[], None]]] = []  # block, what lands
        m.reset_hooks.append(self.flying.clear)
        m.idle_hooks.append(self.land_some)
        self.maps: dict[bytes, TensorMap] = {}

    def submit(self, block: int, land: Callable[[], None]) -> None:
        if self.m.launch.timing == "early":
            land()
        else:
            self.flying.append((block, land))

    def land_some(self) -> bool:
        """One of each block, chosen at random."""
        order = self.m.random.permutation(len(self.flying))
        chosen: dict[int, int] = {self.flying[i][0]: int(i) for i in order}
        landing = [self.flying[i][1] for i in chosen.values()]
        self.flying = [one for i, one in enumerate(self.flying) if i not in set(chosen.values())]
        for land in landing:
            land()
        return bool(landing)

    def tensor(self, where: int) -> TensorMap:
        at = self.m.memory.check(np.array([where], np.int64), 64, READ)[0]
        data = self.m.memory.data[at : at + 128].tobytes()
        if data not in self.maps:
            self.maps[data] = decode(data)
        return self.maps[data]

    def shared_addresses(self, tensor: TensorMap, to: int) -> Array:
        """Of each element of a box at the shared address `to`, within the block."""
        if to % 128:
            raise Fault(f"a box at {to:#x} of shared memory, which is no multiple of 128")
        linear = to + np.arange(int(np.prod(tensor.box))) * tensor.width
        return swizzled(linear, tensor.span)

    def move(self, tensor: TensorMap, block: int, to: int, start: tuple[int, ...], store: bool, add: bool = False) -> None:
        m = self.m
        place, inside = cells(tensor, start)
        here = self.shared_addresses(tensor, to)
        at = m.shared.check(here, tensor.width, np.full(len(here), block))
        kind = f"u{tensor.width}"
        source = m.memory.check(place[inside], tensor.width, WRITE if store else READ)
        if store:
            values = m.shared.load(at[inside], "f4" if add else kind)
            m.memory.store(source, added(values, m.memory.load(source, "f4")) if add else values, "f4" if add else kind)
            return
        values = np.zeros(len(here), kind)
        values[inside] = m.memory.load(source, kind)
        m.shared.store(at, values, kind)


def accelerator_of(m: Machine) -> Accelerator:
    if "tma" not in m.attached:
        m.attached["tma"] = Accelerator(m)
    found = m.attached["tma"]
    assert isinstance(found, Accelerator)
    return found


def coordinates(m: Machine, operand: Address) -> list[Get]:
    return [get(m, coord, "s32") for coord in operand.coords]


def load_tensor(m: Machine, instr: Instr) -> Step:
    to, tensor_at, barrier_at = instr.operands[:3]
    assert isinstance(tensor_at, Address)
    own, bars = accelerator_of(m), mbarriers_of(m)
    coords = coordinates(m, tensor_at)
    where, source, barrier = address(m, to), address(m, Address(tensor_at.base, tensor_at.offset)), address(m, barrier_at)

    def run(sel: Sel) -> None:
        threads = m.thread_index[sel]
        here, maps, starts = where(sel), source(sel), [np.broadcast_to(coord(sel), threads.shape) for coord in coords]
        places = shared_places(m, barrier(sel), 8, sel)
        for i, thread in enumerate(threads):
            block, start = int(m.block_of[thread]), tuple(int(s[i]) for s in starts)
            tensor, to_, place = own.tensor(int(maps[i])), int(here[i]), int(places[i])
            if tensor.rank != len(start):
                raise Fault(f"{len(start)} coordinates for a tensor of {tensor.rank} dimensions", i)
            own.shared_addresses(tensor, to_)
            bars.find(place, i)

            def land(
                tensor: TensorMap = tensor, block: int = block, to_: int = to_, start: tuple[int, ...] = start, place: int = place
            ) -> None:
                own.move(tensor, block, to_, start, store=False)
                bars.change(place, 0, -tensor.bytes)

            m.note("load", thread)
            own.submit(block, land)

    return run


def store_tensor(m: Machine, instr: Instr) -> Step:
    tensor_at, source = instr.operands[:2]
    assert isinstance(tensor_at, Address)
    add = "reduce" in instr.mods
    own, groups = accelerator_of(m), bulk_of(m)
    coords = coordinates(m, tensor_at)
    where, maps_at = address(m, source), address(m, Address(tensor_at.base, tensor_at.offset))

    def run(sel: Sel) -> None:
        threads = m.thread_index[sel]
        here, maps, starts = where(sel), maps_at(sel), [np.broadcast_to(coord(sel), threads.shape) for coord in coords]
        for i, thread in enumerate(threads):
            tensor, start = own.tensor(int(maps[i])), tuple(int(s[i]) for s in starts)
            if add and tensor.width != 4:
                raise Fault("the accelerator adds in fp32 here, to elements of another size", i)

            def land(
                tensor: TensorMap = tensor, block: int = int(m.block_of[thread]), to: int = int(here[i]), start: tuple[int, ...] = start
            ) -> None:
                own.move(tensor, block, to, start, store=True, add=add)

            m.note("store", thread)
            groups.issue(int(thread), land)

    return run


class BulkGroups:
    """Stores by thread and group (section 9.7.9.25.2), each of which a wait must name before its thread ends."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.group = np.zeros(m.total, np.int64)
        self.pending: list[tuple[int, int, Callable[[], None]]] = []
        m.reset_hooks.append(self.pending.clear)
        m.exit_hooks.append(self.leave)

    def issue(self, thread: int, land: Callable[[], None]) -> None:
        if self.m.launch.timing == "early":
            land()
        else:
            self.pending.append((thread, int(self.group[thread]), land))

    def leave(self, sel: Sel) -> None:
        """A block's memory is another's when it ends: a thread waits until its stores have been read."""
        left = {thread for thread, _, _ in self.pending} & set(self.m.thread_index[sel].tolist())
        if left:
            raise Fault(f"thread {self.m.tid[min(left)]} ends before its stores have been read from shared memory")

    def wait(self, sel: Sel, last: int) -> None:
        waiting = set(self.m.thread_index[sel].tolist())
        kept = []
        for thread, group, land in self.pending:
            if thread in waiting and group < self.group[thread] - last:
                land()
            else:
                kept.append((thread, group, land))
        self.pending[:] = kept


def bulk_of(m: Machine) -> BulkGroups:
    if "bulk" not in m.attached:
        m.attached["bulk"] = BulkGroups(m)
    found = m.attached["bulk"]
    assert isinstance(found, BulkGroups)
    return found


def bulk(m: Machine, instr: Instr) -> Step:
    """Every cp.async.bulk form."""
    if "prefetch" in instr.mods:
        return lambda sel: None
    if "commit_group" in instr.mods:
        groups = bulk_of(m)

        def commit(sel: Sel) -> None:
            groups.group[sel] += 1

        return commit
    if "wait_group" in instr.mods:
        groups, count = bulk_of(m), instr.operands[0]
        assert isinstance(count, Imm)
        last = count.bits
        return lambda sel: groups.wait(sel, last)
    known = "tensor" in instr.mods and not {"im2col", "multicast::cluster", "cta_group::2"} & set(instr.mods)
    copies_of(m)
    if known and "mbarrier::complete_tx::bytes" in instr.mods and "global" in instr.mods:
        return load_tensor(m, instr)
    if known and "bulk_group" in instr.mods and ("reduce" not in instr.mods or "add" in instr.mods):
        return store_tensor(m, instr)
    raise PtxError(f"unknown opcode cp.{'.'.join(instr.mods)} in {instr}")
