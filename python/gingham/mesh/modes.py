"""Modes: the only module below the planner that knows their names; to all above, a mesh is axes and layouts (docs/theory.md section 2):

mode   axes (mesh order)     m            n      k     outer rows / features   inner features
1d     tp                    -            tp     -     - / - (or tp / -)       tp
2d     row, col              row          col    -     row / col               col
2.5d   depth, row, col       depth, row   col    -     depth, row / col        col
3d     k, n, m               m            n      k     m / k, n                n, k
sequence  m                  m            -      -     m, the sequence / -     -
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Any

from ..errors import MeshError
from .layout import Layout, Names, coordinates_of, position

ATTENTIONS = ("ring", "heads", "gathered", "auto")  # of mode "sequence": plan/formulas.py
SHARDS = "None (weights replicated over data), 'state' (cut at rest, whole while used) or 'all' (cut, and gathered as they are used)"


@dataclass(frozen=True)
class Axes:
    """The grid of a job. `depth`: axes of m over which weights are replicated; `kept`: those over which they are cut at rest and stand
    whole while they are used; sizes: in mesh order."""

    sizes: Mapping[str, int]
    m: Names
    n: Names
    k: Names
    outer: Layout
    inner: Layout
    depth: Names = ()
    kept: Names = ()
    attention: str | None = None

    @property
    def size(self) -> int:
        return prod(self.sizes.values())

    @property
    def again(self) -> Names:
        """The axes of m that cut weights at rest, in mesh order."""
        return tuple(name for name in self.sizes if name in self.m and name not in self.depth)

    @property
    def replicas(self) -> Names:
        """The axes of m over which a step has weights whole: gradients of theirs and of biases are summed over them."""
        return self.kept + self.depth

    @property
    def gathered(self) -> Names:
        """Those of `again` over which a step gathers weights."""
        return tuple(name for name in self.again if name not in self.kept)


@dataclass(frozen=True)
class Place:
    """Of this rank on an axis of the job: its number there, and how many there are."""

    rank: int
    size: int


class GridShape:
    """What arithmetic needs of a grid: axes, sizes, layouts. A Mesh is one on which calls run; the planner's are only thought of.

    `grid`: (pm, pn, pk); `outer`, `inner`: the two activation layouts.
    """

    def __init__(self, axes: Axes) -> None:
        self.axes, self.size = axes, axes.size
        self.sizes, self.outer, self.inner = dict(axes.sizes), axes.outer, axes.inner
        self.grid = tuple(self.parts(names) for names in (axes.m, axes.n, axes.k))
        self._layouts = {"outer": self.outer, "inner": self.inner, "rows": replace(self.outer, features=())}

    def parts(self, names: Names) -> int:
        """The number of pieces that the axes `names` cut a dim into."""
        pieces = 1
        for name in names:  # a loop, which torch.compile follows
            pieces *= self.sizes[name]
        return pieces

    def layout(self, name: str) -> Layout:
        """ "outer", "inner" or "rows": outer's rows with whole features."""
        if name not in ("outer", "inner", "rows"):
            raise MeshError(f"layout={name!r}: expected 'outer', 'inner' or 'rows'")
        return self._layouts[name]


def axes_of(
    mode: str | None,
    size: int | None = None,
    depth: int | None = None,
    grid: Sequence[int] | None = None,
    sequence: bool = False,
    shard_depth: bool = False,
    data: int = 1,
    shard: str | None = None,
    attention: str | None = None,
) -> Axes:
    """The axes of a mode of `size` ranks, and of `data` replicas of it (with_data). Raises MeshError, naming the nearest valid choices,
    where the numbers do not fit it."""
    if attention not in (None, *ATTENTIONS):
        raise MeshError(f"attention={attention!r}: expected {', '.join(map(repr, ATTENTIONS))}")
    if attention is not None and mode != "sequence":
        raise MeshError(f"attention={attention!r} belongs to mode 'sequence'; got mode {mode!r}. Elsewhere: SelfAttention(dim=1, ring=)")
    axes = _tensor_axes(mode, size, depth, grid, sequence, shard_depth)
    return with_data(replace(axes, attention=attention), data, shard)


def _tensor_axes(
    mode: str | None, size: int | None, depth: int | None, grid: Sequence[int] | None, sequence: bool, shard_depth: bool
) -> Axes:
    if grid is not None:
        mode, size = "grid", _grid_size(mode, size, grid)
    if mode is None:
        if size not in (None, 1):
            raise MeshError(f"size={size} without a mode: say mode='1d', '2d', '2.5d' or '3d', or grid=(pm, pn, pk)")
        mode, size = "1d", 1
    if mode not in ("1d", "2d", "2.5d", "3d", "sequence", "grid"):
        raise MeshError(f"unknown mode {mode!r}: expected '1d', '2d', '2.5d', '3d', 'sequence' or grid=(pm, pn, pk)")
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
    if mode == "sequence":
        both = Layout(("m",), (), ("m",))
        return _without_size_one(Axes({"m": size}, ("m",), (), (), both, both))
    if mode in ("2d", "2.5d"):
        return _square_axes(mode, size, depth or 1, shard_depth)
    if mode == "3d":
        side = round(size ** (1 / 3))
        _require(size == side**3, "3d", size, "p*p*p", [p**3 for p in range(1, side + 2)])
        grid = (side, side, side)
    pm, pn, pk = grid  # type: ignore[misc]
    outer, inner = Layout(("m",), ("k", "n")), Layout(("m",), ("n", "k"))
    return _without_size_one(Axes({"k": pk, "n": pn, "m": pm}, ("m",), ("n",), ("k",), outer, inner))


def with_data(axes: Axes, size: int, shard: str | None = None) -> Axes:
    """The axes with one more of rows, "data": activations' rows are cut over it before all others; weights stand whole on each of its
    ranks (shard=None), as over depth, or are cut over it too ("all": ZeRO-3), or are cut over it at rest, with gradients and states, and
    kept whole from one step of the optimizer to the next ("state": ZeRO-1 and 2). Where axes cut one dim they stand in mesh order: on grids
    data comes after k and n, and with "state" last, so that the pieces of a whole lie side by side. Example: 2d x data 2 is 2.5d of
    depth 2 under another name."""
    if shard not in (None, "all", "state"):
        raise MeshError(f"data shard={shard!r}: expected {SHARDS}")
    if "data" in axes.sizes:
        raise MeshError(f"the mesh has an axis data already: {dict(axes.sizes)}")
    if size == 1:
        return axes
    names = [name for name in axes.sizes if name != "m"]
    before = len(names) if "m" in axes.sizes else 0
    if shard == "state":
        names, before = list(axes.sizes), len(axes.sizes)
    order = [*names[:before], "data", *(name for name in axes.sizes if name not in names[:before])]
    outer, inner = (replace(layout, rows=("data", *layout.rows)) for layout in (axes.outer, axes.inner))
    sizes = {name: size if name == "data" else axes.sizes[name] for name in order}
    depth = ("data", *axes.depth) if shard is None else axes.depth
    kept = ("data",) if shard == "state" else ()
    return replace(axes, sizes=sizes, m=("data", *axes.m), outer=outer, inner=inner, depth=depth, kept=kept)


def neighbours(axes: Axes) -> tuple[int, ...]:
    """The job's ranks in mesh order where init is given none: the ranks of one data rank are neighbours, as torchrun numbers them."""
    names = tuple(sorted(axes.sizes, key=lambda name: name != "data"))
    sizes = {name: axes.sizes[name] for name in names}
    return tuple(position(names, sizes, coordinates_of(index, axes.sizes)) for index in range(axes.size))


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
    if mode == "2.5d" and size != q * q * depth:
        depths = [d for d in range(1, size + 1) if size % d == 0 and isqrt(size // d) ** 2 == size // d]
        if depths != [size]:
            words = " or ".join(map(str, depths))
            near = ", ".join(map(str, _nearest(size, [p * p * depth for p in range(1, q + 3)])))
            raise MeshError(
                f"mode 2.5d, depth={depth} needs size = q*q*depth; got size={size}, which takes depth={words}; nearest valid sizes"
                f" with depth={depth}: {near}"
            )
    _require(size == q * q * depth, f"{mode}, depth={depth}" if depth > 1 else mode, size, wanted, [p * p * depth for p in range(1, q + 3)])
    if mode == "2d":
        both = Layout(("row",), ("col",))
        return _without_size_one(Axes({"row": q, "col": q}, ("row",), ("col",), (), both, both))
    both = Layout(("depth", "row"), ("col",))
    sizes = {"depth": depth, "row": q, "col": q}
    return _without_size_one(Axes(sizes, ("depth", "row"), ("col",), (), both, both, () if shard_depth else ("depth",)))


def _require(good: bool, mode: str, size: int, formula: str, valid: list[int]) -> None:
    if not good:
        near = ", ".join(map(str, _nearest(size, valid)))
        raise MeshError(f"mode {mode} needs size = {formula}; got size={size}, nearest valid sizes: {near}")


def _nearest(size: int, valid: list[int]) -> list[int]:
    return sorted(sorted(set(valid), key=lambda other: abs(other - size))[:3])


def _without_size_one(axes: Axes) -> Axes:
    """An axis of size 1 cuts nothing: leaving it out of the layouts lets equal layouts compare equal."""

    def kept(names: Names) -> Names:
        return tuple(name for name in names if axes.sizes[name] > 1)

    outer, inner = (Layout(kept(layout.rows), kept(layout.features), kept(layout.time)) for layout in (axes.outer, axes.inner))
    return replace(axes, m=kept(axes.m), n=kept(axes.n), k=kept(axes.k), depth=kept(axes.depth), outer=outer, inner=inner)


DIMS = "(tp), (row, col), (depth, row, col), (k, n, m) or (m), a sequence"
OTHERS = {
    "dp": "data",
    "dp_replicate": "data",
    "dp_shard": "data",
    "replicate": "data",
    "pp": "pipeline",
    "stage": "pipeline",
}  # torch's users' names


def axes_named(names: Sequence[str], shape: Sequence[int]) -> Axes:
    """The axes of a torch DeviceMesh, by its dims' names and sizes: (tp), (row, col), (depth, row, col), (k, n, m) or (m), which cuts the
    sequence, and with replicas of it a dim "data" where the mesh's axis stands: first, in grids before m; or "data" alone. Weights are
    replicated over it."""
    names, shape = tuple(names), tuple(shape)
    meant = sorted({name for name in names if OTHERS.get(name, name) == "pipeline"})
    if meant:
        raise MeshError(
            f"DeviceMesh with dims {names}: a mesh is that of one stage; leave {meant[0]} out, parent['data', 'row', 'col'] is this"
            " rank's slice, or let gingham make the stages: parallel=dict(pipeline=.., data=.., tensor=..)"
        )
    if "data" in names:
        at = names.index("data")
        return _with_data_dim(names, names[:at] + names[at + 1 :], shape[at], shape[:at] + shape[at + 1 :])
    replicas = [name for name in names if OTHERS.get(name) == "data"]
    if replicas:
        raise MeshError(f"DeviceMesh with dims {names}: call the dim of replicas 'data' in place of {replicas[0]!r}")
    if names == ("k", "n", "m"):
        return axes_of(None, grid=(shape[2], shape[1], shape[0]))
    modes = {("tp",): "1d", ("row", "col"): "2d", ("depth", "row", "col"): "2.5d", ("m",): "sequence"}
    if names not in modes:
        raise MeshError(f"DeviceMesh with dims {names}: expected {DIMS}, and 'data' beside them")
    if names[-1] == "col" and shape[-1] != shape[-2]:
        raise MeshError(f"DeviceMesh of shape {shape}: row and col must have the same size")
    return axes_of(modes[names], prod(shape), shape[0] if len(shape) == 3 else None)


def _with_data_dim(names: Names, others: Names, size: int, shape: tuple[int, ...]) -> Axes:
    tensor = axes_named(others, shape) if others else replace(axes_of(None, 1), sizes={})
    made = with_data(tensor, size)
    if size == 1:  # the DeviceMesh has the dim all the same
        order = with_data(tensor, 2).sizes
        made = replace(made, sizes={name: tensor.sizes.get(name, 1) for name in order})
    if tuple(made.sizes) != names:
        raise MeshError(f"DeviceMesh with dims {names}: expected them in the order of the mesh's axes, {tuple(made.sizes)}")
    return made


def groups_of(axes: Axes) -> dict[str, Names]:
    """The sets of axes that have a communicator, by the name under which `traffic` counts it: each axis, those that cut rows (m, on grids
    rows), those that cut features, those over which weights are replicated, those that cut them again, those of one data rank
    (tensor); "world" last."""
    every = tuple(axes.sizes)
    groups: dict[str, Names] = {name: (name,) for name in every if axes.sizes[name] > 1}
    tensor = tuple(name for name in every if name != "data")
    rows = "rows" if "m" in every else "m"  # a grid has an axis m
    for key, names in (
        (rows, axes.m),
        ("features", axes.outer.features),
        ("replicas", axes.replicas),
        ("again", axes.gathered),
        ("tensor", tensor if len(tensor) < len(every) else ()),
    ):
        if len(names) > 1 and names not in groups.values():
            groups[key] = names
    groups["world"] = every
    return groups


def axes_of_device_mesh(device_mesh: Any) -> Axes:
    """The axes of a torch DeviceMesh. Raises MeshError where its dims' names are those of no mode."""
    return axes_named(device_mesh.mesh_dim_names or (), device_mesh.shape)
