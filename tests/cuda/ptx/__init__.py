"""Runs the output of `nvcc -ptx`, unmodified, on numpy: rung 4 of the ladder that checks CUDA code without a GPU.

    memory = Memory()
    x = memory.array(np.ones(256, np.float32))
    launch(text, ["scale"], memory, grid=2, block=128, args=[x, 256, 3.0])
    print(memory.read(x))

It checks what inline PTX and the compiler's output compute, and how they wait: accesses out of bounds or misaligned, shared memory read
before it was written (NaN), copies and products that land early or late, warps that run ahead of each other. It knows nothing of speed,
of the order in which other threads see plain stores (fences do nothing), or of what ptxas makes of the text.
"""

from collections.abc import Sequence

from . import access, control, convert, copies, floating, integer, mbarriers, warp, wgmma  # noqa: F401  they register the opcodes
from .machine import Counts, Launch, Machine
from .memory import Memory
from .parse import Entry, Module, PtxError, parse

Size = int | tuple[int, ...]


def triple(size: Size) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else size
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def launch(
    module: Module | str,
    name: Sequence[str],
    memory: Memory,
    grid: Size,
    block: Size,
    args: Sequence[int | float | bytes],
    **options: object,
) -> Counts:
    """Runs the entry whose mangled name contains every part of `name`. Options: those of Launch."""
    parsed = parse(module) if isinstance(module, str) else module
    return Machine(parsed, parsed.find(*name), memory, Launch(triple(grid), triple(block), args, **options)).run()  # type: ignore[arg-type]


__all__ = ["Counts", "Entry", "Launch", "Machine", "Memory", "Module", "PtxError", "launch", "parse"]
