"""Mesh: the named axes of a job, this rank's place on them, one communicator an axis, and scatter and gather.

The only module that knows modes; to everything above, a mesh is axes and layouts (THEORY.md section 2):

    mode   axes (mesh order)     m            n      k     outer rows / features   inner features
    1d     tp                    -            tp     -     - / - (or tp / -)       tp
    2d     row, col              row          col    -     row / col               col
    2.5d   depth, row, col       depth, row   col    -     depth, row / col        col
    3d     k, n, m               m            n      k     m / k, n                n, k
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import isqrt, prod
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from . import _C
from .compiled import KNOWN, Meta, Traced, find, keep, traced
from .errors import MeshError, ShapeError
from .layout import Block, Cuts, Interval, Layout, Names, block, blocks_from_shapes, coordinates_of, dims_of_axes, interval, members, slices

Job = _C.Job
version = _C.version
set_num_threads = _C.set_num_threads
device_report, set_nccl_path, fake_device = _C.device_report, _C.set_nccl_path, _C.fake_device
blas, hopper_status = _C.blas, _C.hopper_status


@dataclass(frozen=True)
class Axes:
    """The grid of a job. `depth`: axes of m over which weights are replicated; sizes: in mesh order."""

    sizes: Mapping[str, int]
    m: Names
    n: Names
    k: Names
    outer: Layout
    inner: Layout
    depth: Names = ()

    @property
    def size(self) -> int:
        return prod(self.sizes.values())


def axes_of(
    mode: str | None,
    size: int | None = None,
    depth: int | None = None,
    grid: Sequence[int] | None = None,
    sequence: bool = False,
    shard_depth: bool = False,
) -> Axes:
    """The axes of a mode. Raises MeshError, naming the nearest valid choices, where the numbers do not fit it."""
    if grid is not None:
        mode, size = "grid", _grid_size(mode, size, grid)
    if mode is None:
        if size not in (None, 1):
            raise MeshError(f"size={size} without a mode: say mode='1d', '2d', '2.5d' or '3d', or grid=(pm, pn, pk)")
        mode, size = "1d", 1
    if mode == "sequence":
        raise NotImplementedError("mode='sequence' is not built yet; mode='1d' with sequence=True shards the rows between layers")
    if mode not in ("1d", "2d", "2.5d", "3d", "grid"):
        raise MeshError(f"unknown mode {mode!r}: expected '1d', '2d', '2.5d', '3d' or grid=(pm, pn, pk)")
    if not isinstance(size, int) or size < 1:
        raise MeshError(f"mode {mode!r} needs size=, the number of ranks; got {size!r}")
    if depth not in (None, 1) and mode != "2.5d":
        raise MeshError(f"depth={depth} belongs to mode '2.5d'; got mode {mode!r}")
    if sequence and mode != "1d":
        raise MeshError(f"sequence=True belongs to mode '1d'; got mode {mode!r}")
    if shard_depth and mode != "2.5d":
        raise MeshError(f"shard_depth=True belongs to mode '2.5d'; got mode {mode!r}")
    if mode == "1d":
        outer = Layout(("tp",) if sequence else (), ())
        return _without_size_one(Axes({"tp": size}, (), ("tp",), (), outer, Layout((), ("tp",))))
    if mode in ("2d", "2.5d"):
        return _square_axes(mode, size, depth or 1, shard_depth)
    if mode == "3d":
        side = round(size ** (1 / 3))
        _require(size == side**3, "3d", size, "p*p*p", [p**3 for p in range(1, side + 2)])
        grid = (side, side, side)
    pm, pn, pk = grid  # type: ignore[misc]
    outer, inner = Layout(("m",), ("k", "n")), Layout(("m",), ("n", "k"))
    return _without_size_one(Axes({"k": pk, "n": pn, "m": pm}, ("m",), ("n",), ("k",), outer, inner))


def _grid_size(mode: str | None, size: int | None, grid: Sequence[int]) -> int:
    if mode is not None:
        raise MeshError(f"mode={mode!r} and grid={tuple(grid)} exclude each other: give one of them")
    if len(grid) != 3 or any(not isinstance(p, int) or p < 1 for p in grid):
        raise MeshError(f"grid={grid!r}: expected three numbers (pm, pn, pk), each at least 1")
    if size not in (None, prod(grid)):
        raise MeshError(f"grid={tuple(grid)} has {prod(grid)} ranks; got size={size}")
    return prod(grid)


def _square_axes(mode: str, size: int, depth: int, shard_depth: bool) -> Axes:
    if not isinstance(depth, int) or depth < 1:
        raise MeshError(f"depth={depth!r}: expected a number of at least 1")
    q = isqrt(size // depth)
    wanted = "q*q*depth" if mode == "2.5d" else "q*q"
    _require(size == q * q * depth, f"{mode}, depth={depth}" if depth > 1 else mode, size, wanted, [p * p * depth for p in range(1, q + 3)])
    if mode == "2d":
        both = Layout(("row",), ("col",))
        return _without_size_one(Axes({"row": q, "col": q}, ("row",), ("col",), (), both, both))
    both = Layout(("depth", "row"), ("col",))
    sizes = {"depth": depth, "row": q, "col": q}
    return _without_size_one(Axes(sizes, ("depth", "row"), ("col",), (), both, both, () if shard_depth else ("depth",)))


def _require(good: bool, mode: str, size: int, formula: str, valid: list[int]) -> None:
    if not good:
        near = sorted(sorted(set(valid), key=lambda other: abs(other - size))[:3])
        raise MeshError(f"mode {mode} needs size = {formula}; got size={size}, nearest valid sizes: {', '.join(map(str, near))}")


def _without_size_one(axes: Axes) -> Axes:
    """An axis of size 1 cuts nothing: leaving it out of the layouts lets equal layouts compare equal."""

    def kept(names: Names) -> Names:
        return tuple(name for name in names if axes.sizes[name] > 1)

    outer, inner = (Layout(kept(layout.rows), kept(layout.features)) for layout in (axes.outer, axes.inner))
    return replace(axes, m=kept(axes.m), n=kept(axes.n), k=kept(axes.k), depth=kept(axes.depth), outer=outer, inner=inner)


def axes_of_device_mesh(device_mesh: DeviceMesh) -> Axes:
    """The axes of a torch DeviceMesh, by its dim names: (tp), (row, col), (depth, row, col) or (k, n, m)."""
    names, shape = tuple(device_mesh.mesh_dim_names or ()), tuple(device_mesh.shape)
    if names == ("k", "n", "m"):
        return axes_of(None, grid=(shape[2], shape[1], shape[0]))
    modes = {("tp",): "1d", ("row", "col"): "2d", ("depth", "row", "col"): "2.5d"}
    if names not in modes:
        raise MeshError(f"DeviceMesh with dims {names}: expected (tp), (row, col), (depth, row, col) or (k, n, m)")
    if names[-1] == "col" and shape[-1] != shape[-2]:
        raise MeshError(f"DeviceMesh of shape {shape}: row and col must have the same size")
    return axes_of(modes[names], prod(shape), shape[0] if len(shape) == 3 else None)


class Mesh:
    """Made by `gingham.init`. `coordinates`: this rank's place by axis; `outer`, `inner`: the two activation layouts;
    `grid`: (pm, pn, pk); `axis(names)`: the communicator of the ranks that differ in the axes `names` only."""

    def __init__(
        self,
        axes: Axes,
        rank: int,
        jobs: tuple[Any, Any],
        device_mesh: DeviceMesh,
        source: str,
        slices: int,
        link: tuple[float, float],
        device: torch.device,
    ) -> None:
        self.axes, self.rank, self.device_mesh, self._link = axes, rank, device_mesh, link
        self.job, self.background = jobs
        self.device = device
        self.source, self.slices, self.size = source, slices, axes.size
        self.sizes, self.outer, self.inner = dict(axes.sizes), axes.outer, axes.inner
        self.coordinates = coordinates_of(rank, self.sizes)
        self.grid = tuple(self.parts(names) for names in (axes.m, axes.n, axes.k))
        every = tuple(self.sizes)
        groups: dict[str, Names] = {name: (name,) for name in every if self.sizes[name] > 1}
        groups |= {key: names for key, names in {"m": axes.m, "features": axes.outer.features}.items() if len(names) > 1}
        indices = {key: index for index, key in enumerate(dict.fromkeys([*every, "m", "features", "world"]))}
        self._axes: dict[frozenset[str], Any] = {}
        self._keys: dict[str, Any] = {}
        for key, names in groups.items():
            self._keys[key] = _C.Axis(self.job, indices[key], members(names, self.sizes, self.coordinates), *link)
            self._axes[frozenset(names)] = self._keys[key]
        self.steps: dict[Any, Any] = {}
        self.handle = f"mesh{next(_numbers)}"
        keep(self)
        self.depth_sums: Any = None
        self.ended = False
        self._background: Any = None
        self.world = _C.Axis(self.job, indices["world"], list(range(self.size)), *link)
        if len(groups) > 1:
            self._keys["world"] = self.world

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{name}={size}' for name, size in self.sizes.items())}; rank {self.rank} at {self.coordinates})"

    def __deepcopy__(self, memo: Any) -> Mesh:
        return self  # copies of a model stand on its mesh

    def parts(self, names: Names) -> int:
        return prod(self.sizes[name] for name in names)

    def axis(self, names: Names) -> Any:
        """The communicator over the axes `names` in mesh order, or None where it would have one rank."""
        kept = frozenset(name for name in names if self.sizes[name] > 1)
        if kept and kept not in self._axes and len(kept) == sum(size > 1 for size in self.sizes.values()):
            return self.world
        return self._axes[kept] if kept else None

    def layout(self, name: str) -> Layout:
        """ "outer", "inner" or "rows": outer's rows with whole features."""
        if name not in ("outer", "inner", "rows"):
            raise MeshError(f"layout={name!r}: expected 'outer', 'inner' or 'rows'")
        return {"outer": self.outer, "inner": self.inner, "rows": Layout(self.outer.rows, ())}[name]

    def interval(self, size: int, names: Names) -> Interval:
        """(offset, length) of this rank's piece of a dim of `size` cut over the axes `names`."""
        return interval(size, names, self.sizes, self.coordinates)

    def cuts(self, operand: str, ndim: int, dim: int = 0) -> Cuts:
        """How an operand of scatter and gather is cut; `dim`: the dim of its rows."""
        axes = self.axes
        if operand in ("a", "b", "c"):
            if ndim != 2:
                raise ShapeError(f"operand {operand!r} is a matrix; got {ndim} dims")
            return {"a": (axes.m, axes.k + axes.n), "b": (axes.k + axes.m, axes.n), "c": (axes.m, axes.n + axes.k)}[operand]
        if operand not in ("x", "outer", "inner", "rows"):
            raise ShapeError(f"operand={operand!r}: expected 'x', 'inner', 'rows', 'a', 'b' or 'c'")
        if not -ndim <= dim < ndim:
            raise ShapeError(f"dim={dim} of a tensor of {ndim} dims")
        layout = self.inner if operand == "inner" else self.outer
        return (Layout(layout.rows, ()) if operand == "rows" else layout).cuts(ndim, dim % ndim)

    def scatter(self, x: torch.Tensor, operand: str | None = None, dim: int = 0) -> torch.Tensor:
        """This rank's block of a full tensor that is the same on every rank. operand: "x" (default: rows over the row
        axes, last dim over outer's feature axes), "inner", "rows" (default for integers), "a", "b", "c" (matmul's);
        dim: where the rows lie. Differentiable; not counted as traffic. Its gradient is gathered, never summed."""
        check_local(x, "scatter's x", self)
        operand = operand or ("x" if x.is_floating_point() else "rows")
        cuts = self.cuts(operand, x.dim(), dim)
        if torch.compiler.is_compiling():
            return traced("scatter", [self.handle, operand, str(dim)], [x])[0]
        return _Scatter.apply(x, self, cuts, block(x.shape, cuts, self.sizes, self.coordinates))

    def gather(self, x: torch.Tensor, operand: str | None = None, dim: int = 0, features: int | None = None) -> torch.Tensor:
        """The full tensor, on every rank, of blocks as `scatter` makes them; sizes are learned from the ranks' own, only a
        compiled graph must be told `features`, the full last dim, where ranks cut it unevenly. Differentiable (the gradient
        is this rank's block of it); not counted as traffic. Raises ShapeError where blocks do not fit together, or features."""
        check_local(x, "gather's x", self)
        operand = operand or ("x" if x.is_floating_point() else "rows")
        if torch.compiler.is_compiling():
            return traced("gather", [self.handle, operand, str(dim), str(features or 0)], [x])[0]
        full: torch.Tensor = _Gather.apply(x, self, self.cuts(operand, x.dim(), dim))
        if features not in (None, full.shape[-1]):
            raise ShapeError(f"gather: rank {self.rank} got features={features}, but the ranks' blocks make {full.shape[-1]}")
        return full

    def extents(self, layout: Layout, rows: int, features: int) -> tuple[Interval, int, Interval, int]:
        """From every rank's own sizes: my rows' (offset, length) and the global number of rows, the same of features.
        A control message over the world; not cached, since a peer's size may change."""
        if self.size == 1:
            return (0, rows), rows, (0, features), features
        total, blocks = blocks_from_shapes(self.world.sizes([rows, features]), (layout.rows, layout.features), self.sizes)
        mine = blocks[self.rank]
        return mine[0], total[0], mine[1], total[1]

    def parameter(self, full: torch.Tensor, cuts: Cuts) -> torch.nn.Parameter:
        """This rank's block of a full parameter (the same on every rank) as a DTensor in the shared heap; of a meta tensor
        the block is allocated only."""
        mine = block(full.shape, cuts, self.sizes, self.coordinates)
        local = self.empty([length for _, length in mine], full.dtype)
        if not full.is_meta:
            local.copy_(full[slices(mine)])
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims_of_axes(tuple(self.sizes), cuts)]
        stride = torch.empty(full.shape, device="meta").stride()
        return torch.nn.Parameter(DTensor.from_local(local, self.device_mesh, placements, run_check=False, shape=full.shape, stride=stride))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised tensor in the heap that the ranks share, where peers read it in place; on a GPU mesh, on the GPU."""
        if self.ended:
            raise MeshError(f"{self} was used after destroy: call gingham.init again")
        return self.job.empty(list(shape), str(dtype).removeprefix("torch."))

    def traffic(self, reset: bool = False) -> dict[str, dict[str, int]]:
        """Payload of steps and layers by axis: bytes_sent, bytes_received, messages (received) of this rank since the
        last reset; scatter, gather and control messages are not in it."""
        counts = {key: axis.traffic(reset) for key, axis in self._keys.items()}
        if self._background is not None:
            for name, count in self._background.traffic(reset).items():
                counts[self.axes.depth[0]][name] += count
        return counts

    def background_axis(self) -> Any:
        """A second communicator over depth, in a job of its own, for a thread beside the main one; counted under depth."""
        if self._background is None:
            ranks = members(self.axes.depth, self.sizes, self.coordinates)
            self._background = _C.Axis(self.background, 0, ranks, *self._link)
        return self._background

    def background_empty(self, like: torch.Tensor) -> torch.Tensor:
        return self.background.empty(list(like.shape), str(like.dtype).removeprefix("torch."))

    def memory(self) -> dict[str, int]:
        """Bytes of this rank's part of the shared heap: tensors, workspace, workspace_peak; and its allocations."""
        return self.job.memory()


def check_local(x: Any, what: str, mesh: Mesh | None = None) -> None:
    """Raises TypeError unless x is a plain tensor of real numbers on the device of `mesh` (none: of the current mesh, or the CPU)."""
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        found = f"a {type(x).__name__}"
        fix = "pass x.to_local()" if isinstance(x, DTensor) else "pass this rank's block as a torch.Tensor"
        raise TypeError(f"{what}: got {found}, expected a plain local torch.Tensor; {fix}")
    mesh = mesh or _current
    expected = torch.device("cpu") if mesh is None else mesh.device
    if x.device != expected:
        raise TypeError(f"{what}: got a tensor on {x.device}, expected the mesh's device {expected}; move it with .to('{expected}')")
    if x.is_complex() or x.layout != torch.strided:
        raise TypeError(f"{what}: got {x.dtype}, {x.layout}, expected a dense tensor of real numbers")


class _Scatter(torch.autograd.Function):
    """Full -> block `mine`; the gradient is gathered from the ranks' blocks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Mesh, cuts: Cuts, mine: Block) -> torch.Tensor:
        ctx.mesh, ctx.cuts = mesh, cuts
        return mesh.empty([length for _, length in mine], x.dtype).copy_(x[slices(mine)])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Gather.apply(grad, ctx.mesh, ctx.cuts), None, None, None


class _Gather(torch.autograd.Function):
    """Blocks -> full; the gradient is this rank's block of the full one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Mesh, cuts: Cuts) -> torch.Tensor:
        parts = mesh.world.all_gather(x.contiguous(), mesh.source, False)
        try:
            total, blocks = blocks_from_shapes([part.shape for part in parts], cuts, mesh.sizes)
        except ValueError as error:
            raise ShapeError(f"gather: {error}") from None
        ctx.mesh, ctx.cuts, ctx.mine = mesh, cuts, blocks[mesh.rank]
        full = x.new_empty(total)
        for part, place in zip(parts, blocks, strict=True):
            full[slices(place)] = part
        return full

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Scatter.apply(grad, ctx.mesh, ctx.cuts, ctx.mine), None, None


def _gather_arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    x, mesh = tensors[0], find(words[0])
    return [x, mesh, mesh.cuts(words[1], x.dim(), int(words[2]))]


def _scatter_arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    x, mesh, cuts = _gather_arguments(words, tensors)
    return [x, mesh, cuts, block(x.shape, cuts, mesh.sizes, mesh.coordinates)]


def _gathered(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    x, mesh, cuts = _gather_arguments(words, tensors)
    shape = [length * mesh.parts(names) for length, names in zip(x.shape, cuts, strict=True)]
    features = int(words[3])
    if features and mesh.interval(features, cuts[-1])[1] == x.shape[-1]:
        shape[-1] = features
    return [(shape, x.dtype)]


def _scattered(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    x, _, _, mine = _scatter_arguments(words, tensors)
    return [([length for _, length in mine], x.dtype)]


KNOWN["scatter"] = Traced(_Scatter, _scatter_arguments, _scattered, saves=False)
KNOWN["gather"] = Traced(_Gather, _gather_arguments, _gathered, saves=False)


_current: Mesh | None = None
_numbers = count()


def current(mesh: Mesh | None = None) -> Mesh:
    """`mesh`, or that of gingham.init. Raises MeshError where there is none."""
    if mesh is None and _current is None:
        raise MeshError("no mesh: call gingham.init(...) first (after gingham.destroy() a new init is needed)")
    return mesh or _current  # type: ignore[return-value]


def has_mesh() -> bool:
    return _current is not None


def set_current(mesh: Mesh | None) -> None:
    """For init and destroy."""
    global _current
    _current = mesh
