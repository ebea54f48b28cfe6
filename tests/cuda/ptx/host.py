"""Calls the kernels' public functions of namespace gingham::cuda: their host code chooses, and every launch runs in the interpreter.

host = Host(timing="late", seed=1)
a, b = host.matrix(values), host.matrix(values, column_major=True)
c = host.empty(m, n, "f32")
host.gemm(a, b, c)
print(host.read(c))
"""

import ctypes
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .build import CSRC, build
from .floating import bf16_bits, bf16_value
from .machine import Counts, Launch, Machine
from .memory import Array, Memory
from .parse import Entry, Module, PtxError, parse

DTYPES = {"f32": 0, "f64": 1, "bf16": 2, "f16": 3, "bytes1": 4, "bytes2": 5, "bytes4": 6, "bytes8": 7}
STORED = {
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
    "f16": np.float16,
    "bytes1": np.uint8,
    "bytes2": np.uint16,
    "bytes4": np.uint32,
}
STORED["bytes8"] = np.uint64
KINDS = {"none": 0, "gelu": 1, "silu": 2}


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("col_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class Tail(ctypes.Structure):
    _fields_ = [
        *[(name, Matrix) for name in ("bias", "residual", "slope_at")],
        ("kind", ctypes.c_int32),
        *[(name, Matrix) for name in ("z", "y")],
        ("keeps_sum", ctypes.c_bool),
    ]

    def __init__(self, keeps_sum: bool = True, **more: Any) -> None:
        super().__init__(keeps_sum=keeps_sum, **more)


LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))
ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)


@cache
def parsed(path: Path) -> Module:
    return parse(path.read_text())


@cache
def library(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    assert found.host_bytes_of_tail() == ctypes.sizeof(Tail), "struct Tail of kernels/epilogue.h has changed: change Tail here too"
    found.host_message.restype = ctypes.c_char_p
    found.host_sm90_status.restype = ctypes.c_char_p
    return found


@dataclass
class Launched:
    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    counts: Counts


@dataclass
class View:
    """A strided matrix inside of an array of the interpreter's memory."""

    matrix: Matrix
    address: int
    dtype: str
    index: Any  # of the elements in the flat array

    @property
    def t(self) -> "View":
        m = self.matrix
        return View(Matrix(m.data, m.cols, m.rows, m.col_stride, m.row_stride, m.dtype), self.address, self.dtype, self.index.T)


@dataclass
class Host:
    timing: str = "late"
    seed: int = 0
    groups: int = 2
    csrc: Path = CSRC
    unit: str = ""
    capacity: int = 64 << 20
    launches: list[Launched] = field(default_factory=list)
    conflicts: dict[str, int] | None = None
    order: tuple[int, ...] = ()
    trace: list[tuple[str, int, int]] | None = None

    def __post_init__(self) -> None:
        self.memory = Memory(self.capacity)
        built = build(self.csrc, self.unit)
        self.library = library(built.library)
        self.modules = [parsed(path) for path in built.ptx.values()]
        self.error: BaseException | None = None
        self.callbacks = (LAUNCH(self.launched), ALLOCATE(self.memory.room))

    def entry(self, name: str) -> tuple[Module, Entry]:
        for module in self.modules:
            if name in module.entries:
                return module, module.entries[name].whole()
        raise PtxError(f"no entry {name}")

    def launched(self, name: bytes, sizes: Any, shared: int, args: Any) -> int:
        try:
            module, entry = self.entry(name.decode())
            values = [ctypes.string_at(args[i], param.size) for i, param in enumerate(entry.params)]
            grid, block = (sizes[0], sizes[1], sizes[2]), (sizes[3], sizes[4], sizes[5])
            own: dict[str, Any] = {"conflicts": self.conflicts, "order": self.order, "trace": self.trace}
            options = Launch(grid, block, values, shared, self.timing, self.seed, self.groups, **own)
            counts = Machine(module, entry, self.memory, options).run()
            self.launches.append(Launched(entry.name, grid, block, shared, counts))
            return 0
        except BaseException as error:  # it cannot pass through the C++ frames
            self.error = error
            return 1

    def call(self, name: str, *args: Any) -> None:
        self.error = None
        self.library.host_begin(*self.callbacks)
        if self.library[name](*args):
            raise self.error or PtxError(self.library.host_message().decode())

    def matrix(self, values: Array, dtype: str = "f32", column_major: bool = False, pad: int = 0, offset: int = 0) -> View:
        """`pad` elements between lines, `offset` of them before the first; what lies there is NaN."""
        rows, cols = values.shape
        lines, length = (cols, rows) if column_major else (rows, cols)
        stored = self.stored(values, dtype)
        flat = np.full(offset + lines * (length + pad), -1 if stored.dtype.kind == "u" else np.nan).astype(stored.dtype)
        line, along = np.arange(lines)[:, None], np.arange(length)[None]
        index = offset + line * (length + pad) + along
        index = index.T if column_major else index
        flat[index] = stored
        address = self.memory.array(flat)
        strides = (1, length + pad) if column_major else (length + pad, 1)
        data = address + offset * flat.itemsize
        return View(Matrix(data, rows, cols, *strides, DTYPES[dtype]), address, dtype, index)

    def stored(self, values: Array, dtype: str) -> Array:
        if dtype == "bf16":
            return bf16_bits(values.astype(np.float32))
        return values.astype(STORED[dtype])

    def empty(self, rows: int, cols: int, dtype: str = "f32", column_major: bool = False, pad: int = 0, offset: int = 0) -> View:
        poison = np.zeros((rows, cols), STORED[dtype]) if dtype.startswith("bytes") else np.full((rows, cols), np.nan)
        return self.matrix(poison, dtype, column_major, pad, offset)

    def read(self, view: View) -> Array:
        """As float64; bytes as they are. The padding must be untouched."""
        flat = self.memory.read(view.address)
        outside = np.ones(flat.shape, bool)
        outside[view.index] = False
        untouched = (
            np.isnan(flat[outside]) if flat.dtype.kind == "f" else flat[outside] == flat.dtype.type(-1 & (1 << 8 * flat.itemsize) - 1)
        )
        if not untouched.all():
            raise PtxError("elements between the lines of a matrix were written")
        values = flat[view.index]
        if view.dtype == "bf16":
            return bf16_value(values).astype(np.float64)
        return values if view.dtype.startswith("bytes") else values.astype(np.float64)

    def tail(self, kind: str = "none", **views: View) -> Tail:
        return Tail(kind=KINDS[kind], **{name: view.matrix for name, view in views.items()})

    def gemm(self, a: View, b: View, c: View | None, accumulate: bool = False, tail: Tail | None = None, tf32: bool = False) -> None:
        out = c.matrix if c else Matrix()
        self.call("host_gemm", *(ctypes.byref(x) for x in (a.matrix, b.matrix, out, tail or Tail())), int(accumulate), int(tf32))

    def sm90(
        self,
        a: View,
        b: View,
        c: View | None,
        accumulate: bool = False,
        tail: Tail | None = None,
        wide: int = 128,
        piece: int = 0,
        chunks: tuple[int, int] = (1, 1),
    ) -> None:
        """`chunks`: blocks a wave, and the most tiles a block."""
        matrices = [ctypes.byref(x) for x in (a.matrix, b.matrix, c.matrix if c else Matrix(), tail or Tail())]
        self.call("host_sm90", *matrices, int(accumulate), ctypes.c_int64(piece or a.matrix.cols), wide, *chunks)

    def integers(self, values: Array) -> ctypes.c_void_p:
        """The address of a copy as int64."""
        return ctypes.c_void_p(self.memory.array(np.asarray(values, np.int64)))

    def run(self, name: str, *views: Any) -> None:
        """host_<name> of host.cc; matrices and tails by address."""
        self.call(
            f"host_{name}", *(ctypes.byref(v.matrix if isinstance(v, View) else v) if isinstance(v, View | Tail) else v for v in views)
        )
