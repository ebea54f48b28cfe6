"""Small products and sweeps that a changed kernel is held to, each a second or two, with copies landing early and late.

    PYTHONPATH=tests python -m cuda.ptx.check CSRC UNIT CHECK ...

compiles CSRC/kernels/UNIT.cu, takes the rest from the checkout, and ends with 0 where all is well, with CAUGHT where a result is wrong or
the interpreter refused to go on. Anything else means that the question could not be asked (the change does not compile, say).
"""

import ctypes
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from . import layers, overlap
from .attention import Case, attention
from .host import Host
from .machine import Fault
from .memory import Array
from .parse import PtxError

CAUGHT = 3


class Wrong(Exception):
    pass


def normal(rows: int, cols: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, cols))


def close(name: str, got: Array, expected: Array, limit: float) -> None:
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not error <= limit:
        raise Wrong(f"{name}: error {error:.1e}, limit {limit:.1e}")


class Checks:
    def __init__(self, csrc: Path, unit: str) -> None:
        self.csrc, self.unit = csrc, unit

    def hosts(self) -> Iterator[Host]:
        for timing in ("early", "late"):
            for seed in (1, 2, 3):
                yield self.host(timing, seed)

    def host(self, timing: str = "early", seed: int = 1) -> Host:
        return Host(timing=timing, seed=seed, groups=3, csrc=self.csrc, unit=self.unit, capacity=16 << 20)

    def product(
        self,
        host: Host,
        shape: tuple[int, int, int],
        dtype: str,
        orders: str,
        wide: int = 0,
        add: bool = True,
        chunks: tuple[int, int] = (1, 1),
    ) -> None:
        m, n, k = shape
        kind = "f32" if dtype == "tf32" else dtype
        a, b = host.matrix(normal(m, k, 1), kind, orders[0] == "c"), host.matrix(normal(k, n, 2), kind, orders[1] == "c")
        c = host.matrix(normal(m, n, 3), "f64" if dtype == "f64" else "f32", pad=8)
        before = host.read(c) if add else 0
        if wide:
            host.sm90(a, b, c, add, wide=wide, chunks=chunks)
        else:
            host.gemm(a, b, c, add, tf32=dtype == "tf32")
        limit = {"tf32": 1e-3, "f64": 1e-13}.get(dtype, 2e-6)
        close(f"{m}x{n}x{k} {dtype} {orders}", host.read(c), before + host.read(a) @ host.read(b), limit)

    def gemm(self) -> None:
        for host in self.hosts():
            self.product(host, (72, 64, 200), "bf16", "rc")
            self.product(host, (72, 64, 200), "bf16", "cr")

    def unaligned(self) -> None:
        for host in self.hosts():
            self.product(host, (70, 66, 90), "bf16", "rr")

    def narrow(self) -> None:
        """Lines of C that 16-byte words do not divide, with room behind them."""
        for host in self.hosts():
            self.product(host, (72, 60, 64), "bf16", "rc", add=False)

    def pieces(self) -> None:
        for host in self.hosts():
            self.product(host, (40, 24, 1100), "bf16", "rc")

    def plain(self) -> None:
        for host in self.hosts():
            self.product(host, (40, 24, 40), "f32", "rc")

    def tf32(self) -> None:
        for host in self.hosts():
            self.product(host, (40, 24, 40), "tf32", "cr")

    def sm90(self) -> None:
        """Twice around the ring, and blocks of up to 4 and 3 tiles."""
        for host in self.hosts():
            self.product(host, (128, 136, 840), "bf16", "rc", wide=128)
            self.product(host, (72, 136, 584), "bf16", "cr", wide=256)
            self.product(host, (264, 264, 72), "bf16", "rc", wide=128, chunks=(1, 4))
            self.product(host, (136, 584, 264), "bf16", "rc", wide=256, chunks=(2, 3), add=False)
            self.product(host, (72, 136, 72), "f16", "rr", wide=256)
            self.product(host, (72, 136, 72), "bf16", "rc", wide=128, add=False)

    def boxes(self) -> None:
        """Results in 16 bits, which the accelerator stores: Z, then Y through the same memory; rows and columns that end in a box."""
        for host in self.hosts():
            for dtype, wide in (("bf16", 256), ("f16", 128)):
                a, b = host.matrix(normal(150, 72, 1), dtype), host.matrix(normal(72, 296, 2), dtype)
                bias = host.matrix(normal(1, 296, 3), dtype)
                z, y = host.empty(150, 296, dtype, pad=8), host.empty(150, 296, dtype)
                host.sm90(a, b, None, tail=host.tail("gelu", bias=bias, z=z, y=y), wide=wide, chunks=(1, 2))
                linear = host.read(a) @ host.read(b) + host.read(bias)
                close("Z", host.read(z), linear, 2.0**-8)
                close("Y", host.read(y), linear / 2 * (1 + np.vectorize(math.erf)(linear / 2**0.5)), 2.0**-8)

    def sm90_pieces(self) -> None:
        """Two pieces of K, their sums whole tiles of rows apart, or right behind each other."""
        for host in self.hosts():
            for apart in (256, 136):
                a, b, c = host.matrix(normal(136, 200, 1), "bf16"), host.matrix(normal(200, 72, 2), "bf16"), host.empty(2 * apart, 72)
                host.sm90(a, b, c, wide=128, piece=128)
                for i, (begin, end) in enumerate([(0, 128), (128, 200)]):
                    part = host.read(a)[:, begin:end] @ host.read(b)[begin:end]
                    close(f"piece {i} of k", host.read(c)[i * apart : i * apart + 136], part, 2e-6)

    def slabs(self) -> None:
        """Lines of C that begin anywhere, where blocks of several tiles are asked for."""
        for host in self.hosts():
            a, b, c = host.matrix(normal(136, 72, 1), "bf16"), host.matrix(normal(72, 264, 2), "bf16"), host.empty(136, 264, pad=1)
            host.sm90(a, b, c, wide=128, chunks=(1, 3))
            close("C by slabs", host.read(c), host.read(a) @ host.read(b), 2e-6)

    def overlap(self) -> None:
        """Blocks of two tiles: neither the producer nor a warpgroup waits for a store that is not its own."""
        for halves in (False, True):
            for found in (
                overlap.waits_for_a_store(self.host(), 256, halves),
                overlap.waits_for_the_other(self.host(), 256, halves, overlap.FIRST),
                overlap.waits_for_the_other(self.host(), 256, halves, overlap.SECOND),
            ):
                if found:
                    raise Wrong(found)

    def cast(self) -> None:
        for host in self.hosts():
            for column_major in (False, True):
                source, target = host.matrix(normal(70, 33, 1), "f32"), host.empty(70, 33, "bf16", column_major)
                host.run("cast", source, target)
                close("cast", host.read(target), host.read(host.matrix(host.read(source), "bf16")), 0)

    def accumulate(self) -> None:
        for host in self.hosts():
            a, b = host.matrix(normal(33, 65, 1), "f32"), host.matrix(normal(33, 65, 2), "f32", pad=1)
            expected = host.read(a) + host.read(b)
            for dtype in ("bf16", "f16"):
                out = host.empty(33, 65, dtype)
                host.run("accumulate_into", a, b, out)
                close("accumulate_into, rounded", host.read(out), host.read(host.matrix(expected, dtype)), 0)
            host.run("accumulate", a, b)
            close("accumulate", host.read(b), expected, 1e-7)

    def column_sums(self) -> None:
        for host in self.hosts():
            for cols, column_major in ((70, False), (72, False), (70, True)):
                a, out = host.matrix(normal(300, cols, 1) + 1, "f32", column_major), host.matrix(normal(1, cols, 5), "f32")
                expected = host.read(a).sum(0) + host.read(out)[0]
                host.run("column_sums", a, out, 1)
                close("column sums", host.read(out)[0], expected, 1e-6)

    def epilogue(self) -> None:
        for host in self.hosts():
            c, bias, residual = (
                host.matrix(normal(37, 44, 1), "f32"),
                host.matrix(normal(1, 44, 2), "bf16"),
                host.matrix(normal(37, 44, 3), "bf16"),
            )
            z, y = host.empty(37, 44, "bf16"), host.empty(37, 44, "bf16")
            host.run("epilogue", c, host.tail("silu", bias=bias, residual=residual, z=z, y=y))
            linear = host.read(c) + host.read(bias)
            close("Z", host.read(z), linear, 2.0**-8)
            close("Y", host.read(y), linear / (1 + np.exp(-linear)) + host.read(residual), 2.0**-8)

    def dropout(self) -> None:
        for host in self.hosts():
            sizes = np.array([3, 5, 30, 4, 6, 41, 1, 1, 7], np.int64)
            x, y = host.matrix(normal(15, 30, 1), "bf16"), host.empty(15, 30, "bf16")
            given = host.memory.read(x.address)
            expected = np.zeros_like(given)
            shared = (x.matrix.dtype, 3, ctypes.c_void_p(sizes.ctypes.data), ctypes.c_double(0.3))
            host.call("host_cpu_dropout", ctypes.c_void_p(given.ctypes.data), ctypes.c_void_p(expected.ctypes.data), *shared)
            host.call("host_dropout", ctypes.c_void_p(x.address), ctypes.c_void_p(y.address), *shared)
            if host.memory.read(y.address).tobytes() != expected.tobytes():
                raise Wrong("dropout draws other bits than the CPU")

    def pairs(self, make: Callable[[Host], Iterator[layers.Pair]], limit: float = 1e-6) -> None:
        for host in self.hosts():
            for name, got, expected in make(host):
                close(name, got, expected, limit)

    def attention(self) -> None:
        """Two keys' runs, the second of which finds sums; two tiles of keys in the first."""
        case = Case(queries=10, keys=150, causal=True)
        for host in list(self.hosts())[::3]:
            for name, got, expected in attention(host, case, "bf16"):
                close(name, got, expected, 1e-2 if name != "lse" else 1e-6)

    def layer_norm(self) -> None:
        self.pairs(lambda host: layers.layer_norm(host, 5, 270, "f32"), 1e-5)

    def layer_norm_whole(self) -> None:
        for cols in (1032, 2053):
            self.pairs(lambda host, cols=cols: layers.layer_norm(host, 3, cols, "f32", whole=True), 1e-5)

    def cross_entropy(self) -> None:
        self.pairs(lambda host: layers.cross_entropy(host, 4, 301, "f32", 0.1))

    def embedding(self) -> None:
        self.pairs(lambda host: layers.embedding(host, 20, 9, 330, "f32"))

    def indices(self) -> None:
        self.pairs(lambda host: layers.indices(host, 1500), 0)


def main(csrc: str, unit: str, *names: str) -> int:
    checks = Checks(Path(csrc), unit)
    for name in names:
        run: Callable[[], None] = getattr(checks, name)
        try:
            run()
        except (Wrong, PtxError, Fault) as error:
            print(f"{name}: {error}")
            return CAUGHT
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
