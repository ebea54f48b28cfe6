"""Mesh: the named axes of a job, this rank's place on them, one communicator an axis, and scatter and gather."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch.compiler import is_exporting
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.data import DistributedSampler

from .. import native
from ..errors import MeshError, ShapeError
from ..function import untraceable
from ..graph_ops import keep, traced
from .carried import carried_by
from .findings import Findings
from .layout import Cuts, Interval, Names, block, coordinates_of, dims_of_axes, interval, members, slices
from .live import Live
from .modes import Axes as Axes
from .modes import GridShape, Place
from .modes import axes_of as axes_of
from .modes import axes_of_device_mesh as axes_of_device_mesh
from .modes import groups_of as groups_of
from .modes import neighbours as neighbours
from .scatter import Gather, Scatter, own_cuts
from .told import Told
from .zigzag import back_of, is_zigzag, places_of

LABELS = 4096  # kept at a time


class Mesh(GridShape, Live):
    """Made by `gingham.init`. `ranks`: the job's ranks that it is made of, in mesh order; `rank`: this one, `index`: its place among
    them, `coordinates`: its place by axis; `outer`, `inner`: the two activation layouts; `grid`: (pm, pn, pk); `axis(names)`: the
    communicator of the ranks that differ in the axes `names` only."""

    def __init__(
        self,
        axes: Axes,
        ranks: Sequence[int],
        job: native.Job,
        id: int,
        device_mesh: DeviceMesh,
        device: torch.device,
        timeout: float = 60.0,
        source: str = "window",
        slices: int | None = None,
        link: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Collective over `ranks`. id: the number of their program in the job, and id + 1 that of the sums over depth beside it."""
        super().__init__(axes)
        self.ranks, self.rank, self.index = tuple(ranks), job.rank, list(ranks).index(job.rank)
        self.device_mesh, self._link = device_mesh, link
        self.job = job
        self.device, self.source, self.slices = device, source, slices
        self.coordinates = coordinates_of(self.index, self.sizes)
        groups = groups_of(axes)
        lines = [self.parts(names) for names in groups.values()]
        self.program = native.Program(job, id, self.ranks, lines, timeout)
        self._sums: native.Program | None = None
        if (axes.depth or self.program.spans) and not job.has_gpu:
            self._sums = native.Program(job, id + 1, self.ranks, lines, timeout)
            self.program.pair_with(self._sums)
        self._axes: dict[frozenset[str], native.Axis] = {}
        self._found: dict[Names, native.Axis | None] = {}  # by the names that were asked for
        self.known_cuts: dict[tuple[tuple[Any, ...], int], Cuts] = {}  # of placements, by these and the number of dims
        self._keys: dict[str, native.Axis] = {}
        for index, (key, names) in enumerate(groups.items()):
            made = native.Axis(self.program, index, members(names, self.sizes, self.coordinates), source, *link)
            if key == "world":
                self.world = made
            if key != "world" or len(groups) > 2:
                self._keys[key] = made
            if key != "world":
                self._axes[frozenset(names)] = made
        self.carried_by = carried_by(self._keys, tell=self.index == 0) if job.has_gpu else {}
        self.timeout = timeout
        self.whole: Mesh | None = None  # of a stage of a pipeline: the mesh of all the job's ranks, whose first axis is "pipeline"
        self.schedule, self.chosen = dict[str, Any](), ""  # of its pipeline, as init was told; what "auto" took, and why
        self.borders = {"bytes_sent": 0, "bytes_received": 0, "messages": 0}  # of activations and gradients between stages
        self.steps: dict[Any, Any] = {}
        self.handle = f"mesh{next(_numbers)}"
        keep(self)
        _alive.append(weakref.ref(self, _alive.remove))
        self._labels: dict[str, native.Label] = {}
        self._next_number = count()
        self.told, self.findings = Told(), Findings()
        self.checks: Any = None  # while the first step is checked: see checks/
        self.sums: Any = None  # those behind a backward pass: autograd/background.py
        self.ahead: Any = None  # weights that are gathered before their layers begin: autograd/early.py
        self.ended = self.zigzag = False  # zigzag: whether a sequence was cut in that order
        self.one_batch = False  # whether a tool that takes the ranks for one process gives all of them the same batch, with data too
        self._groups, self._background = groups, dict[str, native.Axis]()  # of the program of those sums, by key

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{name}={size}' for name, size in self.sizes.items())}; rank {self.rank} at {self.coordinates})"

    def axis(self, names: Names) -> native.Axis | None:
        """The communicator over the axes `names` in mesh order, or None where it would have one rank."""
        if names in self._found:
            return self._found[names]
        kept = frozenset(name for name in names if self.sizes[name] > 1)
        joint = kept and kept not in self._axes and len(kept) == sum(size > 1 for size in self.sizes.values())
        found = self._found[names] = self.world if joint else self._axes[kept] if kept else None
        return found

    def joint(self, names: Names) -> native.Axis:
        """`axis`, where the axes `names` are known to have more than one rank."""
        found = self.axis(names)
        assert found is not None, names
        return found

    def axes_over(self, names: Names) -> list[native.Axis]:
        """Communicators that together span the axes `names`: one where there is one, else one an axis."""
        kept = frozenset(name for name in names if self.sizes[name] > 1)
        joint = kept in self._axes or len(kept) == sum(size > 1 for size in self.sizes.values())
        return [self.joint(names)] if joint and kept else [self._axes[frozenset((name,))] for name in self.sizes if name in kept]

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
        ids = operand == "rows"
        return (replace(layout, features=()) if ids else layout).cuts(ndim, dim % ndim, ids)

    @property
    def data(self) -> Place:
        """Which of the replicas of data parallelism this rank belongs to: the ranks of one load the same batch."""
        return Place(self.coordinates.get("data", 0), self.sizes.get("data", 1))

    @property
    def pipeline(self) -> Place:
        """Which stage of the pipeline this rank's mesh is; Place(0, 1) without one."""
        return Place(0, 1) if self.whole is None else Place(self.whole.coordinates["pipeline"], self.whole.sizes["pipeline"])

    def over_stages(self, x: torch.Tensor, label: str) -> list[torch.Tensor]:
        """x of the ranks of all stages at this rank's place, in the stages' order; [x] without a pipeline. Collective over the job's
        ranks; not counted as traffic."""
        if self.whole is None:
            return [x]
        self.whole.say(label)
        return self.whole.joint(("pipeline",)).all_gather(x.contiguous(), counted=False)

    def sampler(self, dataset: Any, shuffle: bool = True, seed: int = 0, drop_last: bool = False) -> DistributedSampler[Any]:
        """For a DataLoader of each data rank's own batches: torch's DistributedSampler over `data`, alike on the ranks of one data rank, in
        all stages of a pipeline.
        set_epoch(epoch) before each epoch, as with torch. Its batches go through scatter(own=True)."""
        return DistributedSampler(dataset, self.data.size, self.data.rank, shuffle, seed, drop_last)

    def scatter(
        self, x: torch.Tensor, operand: str | None = None, dim: int = 0, own: bool = False, order: str | None = None
    ) -> torch.Tensor:
        """This rank's block of a full tensor that is the same on every rank. operand: "x" (default: rows over the row
        axes, last dim over outer's feature axes), "inner", "rows" (default for integers), "a", "b", "c" (matmul's);
        dim: where the rows lie. own=True: x is the batch of this data rank alone, the same on its ranks; the job's batch is that of data
        rank 0, then 1, and so on, of as many rows as each has. order="zigzag": each rank's rows are one piece from the front and one from
        the back (mesh/zigzag.py), for SelfAttention(dim=1, order="zigzag"). Differentiable; not counted as traffic. Its gradient
        is gathered, never summed."""
        if self.checks is not None and isinstance(x, torch.Tensor):
            x = self.checks.take_full(x, own)
        check_local(x, "scatter's x", self)
        if self.checks is not None:
            self.checks.alike(x, own)
        operand = operand or ("x" if x.is_floating_point() else "rows")
        cuts = self.cuts(operand, x.dim(), dim)
        if own and operand in ("a", "b", "c"):
            raise MeshError(f"scatter(operand={operand!r}, own=True): matrices of matmul belong to the whole job; leave own out")
        held = own_cuts(cuts) if own else cuts
        if is_zigzag(order, "scatter", self):
            x = x.index_select(dim, self._zigzag(x, held, dim, "scatter"))
            self.zigzag = True
        if torch.compiler.is_compiling():
            return traced("scatter", [self.handle, operand, str(dim), str(int(own))], [x])[0]
        mine = Scatter.apply(x, self, held, block(x.shape, held, self.sizes, self.coordinates), own)
        self.told.scattered(mine.shape[dim] if x.dim() else 0)
        return mine if self.checks is None else self.checks.hand_out(mine, cuts)

    def _zigzag(self, full: torch.Tensor, cuts: Cuts, dim: int, what: str) -> torch.Tensor:
        if dim % full.dim() == 0 and full.dim() > 1:
            raise ShapeError(f"{what}: rank {self.rank} got order='zigzag' with dim={dim}; it orders a sequence: dim=1")
        return places_of(full.shape[dim], [self.sizes[name] for name in cuts[dim]]).to(full.device)

    def gather(
        self,
        x: torch.Tensor,
        operand: str | None = None,
        dim: int = 0,
        features: int | None = None,
        order: str | None = None,
        own: bool = False,
    ) -> torch.Tensor:
        """The full tensor, on every rank, of blocks as `scatter` makes them (order as there); sizes are learned from the ranks' own, only a
        compiled graph must be told `features`, the full last dim, where ranks cut it unevenly. own=True: the rows of this data rank
        alone, on its ranks, whose loss is a part of a sum over data: loss(rows, reduction="sum") / the job's rows, not a mean.
        Differentiable (the gradient is this rank's block of it); not counted as traffic. Raises ShapeError where blocks do not fit
        together, or features; LayoutError in the first step for a mean over rows of own=True."""
        check_local(x, "gather's x", self)
        operand = operand or ("x" if x.is_floating_point() else "rows")
        given, followed = self.cuts(operand, x.dim(), dim), self.checks is not None and hasattr(x, "checks")
        if self.checks is not None:
            fix = "name the layout it has: mesh.gather(y, operand='inner'), 'rows', 'x' or 'c'"
            x = self.checks.take(x, given, f"gather(operand={operand!r})", fix)
        cuts = own_cuts(given) if own else given
        if torch.compiler.is_compiling():
            full = traced("gather", [self.handle, operand, str(dim), str(int(own)), str(features or 0)], [x])[0]
        else:
            full = Gather.apply(x, self, cuts, own)
        if is_zigzag(order, "gather", self):
            full = full.index_select(dim, back_of(self._zigzag(full, cuts, dim, "gather")))
        if torch.compiler.is_compiling():
            return full
        if features not in (None, full.shape[-1]):
            raise ShapeError(f"gather: rank {self.rank} got features={features}, but the ranks' blocks make {full.shape[-1]}")
        return self.checks.give_own(full, given) if own and followed else full

    def parameter(self, full: torch.Tensor, cuts: Cuts, wait: bool = False) -> torch.nn.Parameter:
        """This rank's block of a full parameter (the same on every rank) as a DTensor in the shared heap; of a meta tensor
        the block is allocated only, or with wait=True stays on meta (mesh/promised.py)."""
        mine = block(full.shape, cuts, self.sizes, self.coordinates)
        lengths = [length for _, length in mine]
        local = torch.empty(lengths, dtype=full.dtype, device="meta") if wait else self.empty(lengths, full.dtype, lasting=True)
        if not full.is_meta:
            local.copy_(full[slices(mine)])
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims_of_axes(tuple(self.sizes), cuts)]
        stride = torch.empty(full.shape, device="meta").stride()
        made = DTensor.from_local(local, self.device_mesh, placements, run_check=False, shape=full.shape, stride=stride)
        parameter = torch.nn.Parameter(made)
        parameter.made_on = self.handle  # type: ignore[attr-defined]
        return parameter

    def empty(self, shape: Sequence[int], dtype: torch.dtype, lasting: bool = False) -> torch.Tensor:
        """Uninitialised tensor in the heap that the ranks share, where peers read it in place; on a GPU mesh, on the GPU; in a process
        forked from a rank, its own. lasting: a parameter, which such a process sees as it stands and not as it was at the fork."""
        if self.ended:
            raise MeshError(f"{self} was used after destroy: call gingham.init again")
        return self.program.empty(list(shape), str(dtype).removeprefix("torch."), lasting)

    def next_number(self) -> int:
        """Of a layer among those made on this mesh."""
        return next(self._next_number)

    def say(self, label: str, moves: bool = True) -> None:
        """Whose call the next one is; ranks that say otherwise there disagree. moves False: a call in itself, that moves nothing; ranks
        that make another are told at the next that does."""
        known = self._labels.get(label)
        if known is None:
            if len(self._labels) >= LABELS:
                self._labels.clear()
            known = self._labels[label] = native.Label(label)
        self.program.say(known) if moves else self.program.note(known)

    def traffic(self, reset: bool = False) -> dict[str, dict[str, int]]:
        """Payload of steps and layers by axis: bytes_sent, bytes_received, messages (received) of this rank since the
        last reset; scatter, gather and control messages are not in it. "pipeline": what crossed the borders of stages.
        Where the job is on several hosts bytes_crossed too: of those received what came from another host."""
        counts = {key: axis.traffic(reset) for key, axis in self._keys.items()}
        if self.whole is not None:
            counts["pipeline"] = dict(self.borders)
            self.borders = dict.fromkeys(self.borders, 0) if reset else self.borders
        for key, axis in self._background.items():
            for name, number in axis.traffic(reset).items() if key in counts else ():
                counts[key][name] += number
        return counts

    def close(self) -> None:
        """For destroy: later calls of the others that wait for this rank raise PeerDied."""
        self.findings.end()
        self.ahead = None
        self.program.close()
        if self._sums is not None:
            self._sums.close()

    @property
    def has_background(self) -> bool:
        """Whether gradients are summed by a thread of their own."""
        return self._sums is not None

    @property
    def background(self) -> native.Program:
        """The program of that thread."""
        assert self._sums is not None, self
        return self._sums

    def background_axis(self, names: Names) -> native.Axis | None:
        """`axis`, of the program of a thread beside the main one; counted under the same key."""
        kept = {name for name in names if self.sizes[name] > 1}
        key = next((key for key, those in self._groups.items() if kept and {name for name in those if self.sizes[name] > 1} == kept), "")
        if key and key not in self._background:
            ranks, index = members(self._groups[key], self.sizes, self.coordinates), list(self._groups).index(key)
            self._background[key] = native.Axis(self.background, index, ranks, self.source, *self._link)
        if kept and not key:
            raise KeyError(names)
        return self._background.get(key)

    def memory(self) -> dict[str, int]:
        """Bytes of this rank's part of the shared heap: tensors, workspace, workspace_peak; and its allocations."""
        return self.job.memory()


def check_local(x: Any, what: str, mesh: Mesh | None = None) -> None:
    """Raises TypeError unless x is a plain tensor of real numbers on the device of `mesh` (none: of the current mesh, or the CPU), and
    NotImplementedError for what torch.fx and torch.export put in a tensor's place."""
    if type(x) not in (torch.Tensor, torch.nn.Parameter) and not (isinstance(x, torch.Tensor) and hasattr(x, "checks")):
        kind = type(x).__name__
        tool = "torch.fx.symbolic_trace" if kind == "Proxy" else "torch.export" if kind == "FakeTensor" and is_exporting() else None
        if tool is not None:
            raise untraceable(what.partition("'")[0], tool)
        found = f"a {type(x).__name__}"
        fix = "pass x.to_local()" if isinstance(x, DTensor) else "pass this rank's block as a torch.Tensor"
        raise TypeError(f"{what}: got {found}, expected a plain local torch.Tensor; {fix}")
    mesh = mesh or _current
    expected = torch.device("cpu") if mesh is None else mesh.device
    if x.device != expected:
        raise TypeError(f"{what}: got a tensor on {x.device}, expected the mesh's device {expected}; move it with .to('{expected}')")
    if x.is_complex() or x.layout != torch.strided:
        raise TypeError(f"{what}: got {x.dtype}, {x.layout}, expected a dense tensor of real numbers")


_current: Mesh | None = None
_numbers = count()


def current(mesh: Mesh | None = None) -> Mesh:
    """`mesh`, or that of gingham.init. Raises MeshError where there is none."""
    if mesh is None and _current is None:
        raise MeshError("no mesh: call gingham.init(...) first (after gingham.destroy() a new init is needed)")
    return mesh or _current  # type: ignore[return-value]


def has_mesh() -> bool:
    return _current is not None


_alive: list[weakref.ref[Mesh]] = []  # in the order in which they were made, which is the same on all their ranks


def mesh_on(device_mesh: DeviceMesh) -> Mesh | None:
    """The mesh of gingham that lies on a torch DeviceMesh, or on an equal one: DTensor hands on meshes that it has seen before. Of several
    the first that was made."""
    meshes = (known() for known in list(_alive))
    return next((mesh for mesh in meshes if mesh is not None and not mesh.ended and mesh.device_mesh == device_mesh), None)


def any_mesh() -> bool:
    """Whether this process has a mesh, the default one or another."""
    return any(mesh is not None and not mesh.ended for mesh in (known() for known in list(_alive)))


def mesh_of(parameter: DTensor) -> Mesh | None:
    return mesh_on(parameter.device_mesh)


def mesh_among(what: str, tensors: Iterable[Any]) -> Mesh | None:
    """The mesh on which those stand that are cut; where none is, init's, or None where there is none. Raises MeshError for several."""
    lie_on = {id(each.device_mesh): each.device_mesh for each in tensors if isinstance(each, DTensor)}
    found = {mesh.handle: mesh for mesh in map(mesh_on, lie_on.values()) if mesh is not None}
    if len(found) > 1:
        raise MeshError(f"{what}: got tensors of several meshes, {', '.join(map(repr, found.values()))}: call it for those of each")
    return next(iter(found.values()), _current)


def cuts_of(mesh: Mesh, placements: Sequence[Any], ndim: int) -> Cuts:
    """The cuts of a DTensor of the mesh."""
    if torch.compiler.is_compiling():  # whose graph is made once
        return _cuts_of(mesh, placements, ndim)
    asked = tuple(placements), ndim
    found = mesh.known_cuts.get(asked)
    if found is None:
        found = mesh.known_cuts[asked] = _cuts_of(mesh, placements, ndim)
    return found


def _cuts_of(mesh: Mesh, placements: Sequence[Any], ndim: int) -> Cuts:
    placed = list(zip(mesh.sizes, placements, strict=True))
    return tuple(tuple(name for name, placement in placed if placement.is_shard(dim)) for dim in range(ndim))


def set_current(mesh: Mesh | None) -> None:
    """For init and destroy."""
    global _current
    _current = mesh
