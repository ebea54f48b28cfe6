"""State spaces (PTX ISA, section 5.1): global memory with known allocations, shared memory of each block, local memory of each thread.

Every access is checked: inside of an allocation, aligned to its size. Windows of the generic address space are far apart, so that
a shared address taken for a generic one is out of bounds.
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Windows of the generic address space, far from where a process has its memory.
SHARED, LOCAL = 1 << 60, 1 << 59
WINDOW = 1 << 40
FIRST_SHARED = 1024  # the first kilobyte of the window is the system's on sm_80 and later
READ, WRITE = 1, 2


class Fault(Exception):
    """An access refused; `which` is its place among the threads that took part."""

    def __init__(self, message: str, which: int = 0) -> None:
        super().__init__(message)
        self.which = which


class Space:
    """A run of bytes with typed views, addressed from 0."""

    def __init__(self, size: int) -> None:
        self.data = np.zeros((size + 63) // 64 * 64, np.uint8)
        self.views: dict[tuple[str, int], Array] = {}

    def view(self, kind: str, vector: int) -> Array:
        """Of elements ("u4": four bytes), or of vectors of them."""
        key = (kind, vector)
        if key not in self.views:
            flat = self.data.view(kind)
            self.views[key] = flat if vector == 1 else flat.reshape(-1, vector)
        return self.views[key]

    def load(self, at: Array, kind: str, vector: int = 1) -> Array:
        return self.view(kind, vector)[at // (int(kind[1]) * vector)]

    def store(self, at: Array, value: Array, kind: str, vector: int = 1) -> None:
        self.view(kind, vector)[at // (int(kind[1]) * vector)] = value


def check_aligned(address: Array, size: int) -> None:
    bad = address & (size - 1)
    if bad.any():
        which = int(np.flatnonzero(bad)[0])
        raise Fault(f"misaligned: {size} bytes at {int(address[which]):#x}", which)


class Memory(Space):
    """Global memory: arrays are copied in, and copied out again by `read`. Its addresses are those of this process, so that host code that
    was compiled for the CPU can work on it."""

    def __init__(self, capacity: int = 64 << 20) -> None:
        super().__init__(capacity + 4096)
        self.data = self.data[-self.data.ctypes.data % 4096 :][:capacity]
        self.base = self.data.ctypes.data
        self.rights = np.zeros(len(self.data), np.uint8)
        self.top = 256
        self.sizes: dict[int, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}
        self.maps: list[Any] = []  # tensor maps, see tma.py

    def array(self, values: Array, offset: int = 0, writable: bool = True) -> int:
        """Copies an array in; its address is a multiple of 256, plus offset. Between arrays lies room that no one may touch."""
        values = np.ascontiguousarray(values)
        begin = self.top + offset
        self.top = (begin + values.nbytes + 511) // 256 * 256
        if self.top > len(self.data):
            raise Fault(f"memory of {len(self.data)} bytes is full")
        self.data[begin : begin + values.nbytes] = values.reshape(-1).view(np.uint8)
        self.rights[begin : begin + values.nbytes] = READ | WRITE if writable else READ
        self.sizes[self.base + begin] = (values.nbytes, values.dtype, values.shape)
        return self.base + begin

    def room(self, size: int) -> int:
        """Workspace, poisoned with NaN patterns."""
        return self.array(np.full(size, 0xFF, np.uint8))

    def read(self, address: int) -> Array:
        size, dtype, shape = self.sizes[address]
        begin = address - self.base
        return self.data[begin : begin + size].view(dtype).reshape(shape).copy()

    def check(self, address: Array, size: int, right: int) -> Array:
        """Addresses -> places in data."""
        check_aligned(address, size)
        at = address.astype(np.int64) - self.base
        outside = (at < 0) | (at + size > len(self.data))
        if not outside.any():
            allowed = self.rights[at] & self.rights[at + size - 1] & right
            outside = allowed == 0
            if not outside.any():
                return at
        which = int(np.flatnonzero(outside)[0])
        where = int(address[which])
        place = "shared window" if SHARED <= where < SHARED + WINDOW else "global memory"
        raise Fault(f"out of bounds: {size} bytes at {where:#x} ({place}{self.nearest(where)})", which)

    def nearest(self, where: int) -> str:
        below = [base for base in self.sizes if base <= where]
        if not below:
            return ""
        base = max(below)
        return f", {where - base} bytes into an array of {self.sizes[base][0]}"


class BlockMemory(Space):
    """Memory of `count` blocks (or threads) of `size` bytes each, whose addresses all begin at `first`."""

    def __init__(self, count: int, size: int, first: int, name: str) -> None:
        self.stride = (size + 1023) // 1024 * 1024
        super().__init__(count * self.stride)
        self.size, self.first, self.name = size, first, name

    def poison(self) -> None:
        self.data[:] = 0xFF

    def check(self, address: Array, size: int, owner: Array) -> Array:
        check_aligned(address, size)
        at = address.astype(np.int64) - self.first
        outside = (at < 0) | (at + size > self.size)
        if outside.any():
            which = int(np.flatnonzero(outside)[0])
            raise Fault(
                f"out of bounds: {size} bytes at {int(address[which]):#x} of {self.name} memory ({self.size} bytes from {self.first:#x})",
                which,
            )
        return at + owner * self.stride


def pack(values: list[int | float | bytes], sizes: list[int], aligns: list[int]) -> bytes:
    """Kernel parameters by the .param list: integers and addresses, floats by size, structs as bytes."""
    out = b""
    if len(values) != len(sizes):
        raise Fault(f"{len(values)} arguments for {len(sizes)} parameters")
    for value, size, align in zip(values, sizes, aligns, strict=True):
        out += b"\0" * (-len(out) % align)
        if isinstance(value, float):
            word = struct.pack("<f" if size == 4 else "<d", value)
        elif isinstance(value, bytes):
            word = value
        else:
            word = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        if len(word) != size:
            raise Fault(f"an argument of {len(word)} bytes for a parameter of {size}")
        out += word
    return out
