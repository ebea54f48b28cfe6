"""gingham.pipeline: what a user calls, and the methods that a model gets by it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch

from ..autograd.early import turn
from ..autograd.gradients import make_sums, no_sync
from ..checkpoint.tensors import plain_keys
from ..errors import MeshError, PeerDied, PeerOutOfMemory, PeerStalled, ShapeError
from ..mesh import Mesh, current
from ..mesh.carried import on_host
from ..mesh.checksums import checksum
from ..nn import cross_entropy
from ..nn.clip import note_stage
from ..plan.pipeline import rank_of
from .build import built, fill
from .cut import Part, cut, drop, parts_of
from .families import BORDER, check_places, family_of, images_here, samples_of, shifted
from .given import Given, check, split
from .given import cut as cut_given
from .orders import of_rank, stages_of
from .run import Runner
from .ties import line_of, sum_ties, tags_of, ties_of
from .wire import Wire

IGNORED = -100
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def pipeline(
    model: torch.nn.Module | Callable[[], torch.nn.Module],
    mesh: Mesh | None = None,
    microbatches: int | None = None,
    schedule: str | None = None,
    stages: int | None = None,
    loss: Loss | None = None,
    layout: str | None = None,
    dim: int = 0,
    order: str | None = None,
) -> Any:
    """Cuts a model of layers in a row into stages, keeps this rank's, and gives the model `step`, which trains on a batch. In place; every
    rank calls it alike, on the same whole model (the same seed). Of a model built under torch.device("meta"), or given as the function
    that builds it, each rank makes its stages alone, with the weights of one process after the same seed.

        mesh = gingham.init(parallel=dict(pipeline=2, data=2, tensor=dict(size=2, mode="1d")))     # 8 ranks
        model = gingham.pipeline(model, mesh, microbatches=4, schedule="1f1b")
        loss = model.step(ids, labels)     # forward and backward of all micro-batches; the same number on every rank

    model: a torch.nn.Sequential of gingham's and elementwise layers, one with a method in_a_row() (pipeline/cut.py), or after
    gingham.parallelize one that families.py knows: GPT-2, Llama (labels are shifted, as by the original), BERT, ViT. One tensor passes from
    each layer to the next. Stages are balanced by the flops of their linears. Without a pipeline the same `step` accumulates.
    microbatches: default those of init, else twice the number of ranks; they need not divide the batch. schedule: "gpipe", "1f1b" (the
    default), "interleaved", "zero_bubble", "zbv" or "dual", torch.distributed.pipelining's; stages: of each rank, for the middle two.
    loss(y, labels): the mean over a micro-batch from this rank's blocks of both, weighed by rows; default: cross-entropy, the mean over
    all labels of the step that are not -100. layout: of the outputs, "outer" | "inner" | "rows"; default what the last linear says. dim,
    order: as scatter's of x and labels, for models whose attention goes over cut sequences: dim=1, order="zigzag".
    Raises MeshError where numbers do not fit, NotImplementedError for a model that is not known to be layers in a row.
    Bytes: 2 x activations of the batch at each border between ranks (plan/pipeline.py); sums over replicas once a step.
    """
    mesh = current(mesh)
    schedule = schedule or mesh.schedule.get("schedule") or "1f1b"
    if microbatches is None:
        microbatches = mesh.schedule.get("microbatches") or (2 * mesh.pipeline.size if mesh.whole else 1)
    model, tape = (model, None) if isinstance(model, torch.nn.Module) else built(model)
    own = "default" if loss is None else getattr(loss, "__name__", type(loss).__name__)
    # one that is cut has other keys in each stage
    keys = 0 if hasattr(model, "_pipeline") else crc32(repr((sorted(plain_keys(model)), _made_of(model))).encode())
    said = f"schedule={schedule!r}, microbatches={microbatches!r}, stages={stages!r}, layout={layout!r}, loss={own}"
    alike(mesh, f"gingham.pipeline({type(model).__name__} {keys:08x}, {said})")
    count = stages_of(schedule, stages)
    if not isinstance(microbatches, int) or isinstance(microbatches, bool) or microbatches < 1:
        raise MeshError(f"gingham.pipeline: microbatches={microbatches!r}, expected a number of at least 1")
    if hasattr(model, "step") or hasattr(model, "_pipeline"):
        raise MeshError(f"gingham.pipeline: {type(model).__name__} has a method step already; call gingham.pipeline once, on a plain model")
    made = Pipelined(model, mesh, microbatches, schedule, count if mesh.whole else 1, loss, Cutting(layout, dim, order))
    fill(model, tape, mesh.device)
    kind = type(model)
    methods = _ConvertedMethods if made.family is not None else _Methods
    model.__class__ = type(kind.__name__, (methods, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
    object.__setattr__(model, "_pipeline", made)
    note_stage(mesh, model.parameters())
    return model


def alike(mesh: Mesh, call: str) -> None:
    """Tells all ranks of the job, where one makes another call than the others or gives it other options, whose and which. Raises
    MeshError there."""
    job = mesh.whole or mesh
    if job.size > 1:
        job.say(call)
        job.world.sizes([0])


def _made_of(model: torch.nn.Module) -> list[int]:
    """Digests of what its layers were made with, but of parameters that were written to since: not alike where ranks had other seeds."""
    drawn = [(each, getattr(each, "_drawn", (None, None))) for each in model.parameters()]
    return [digest for each, (digest, version) in drawn if digest is not None and version == each._version]


class _Methods:
    """What a pipelined model has beside its own class's."""

    _pipeline: Pipelined

    def step(self, x: torch.Tensor, labels: torch.Tensor, own: bool = False, scaler: Any = None, **given: Any) -> torch.Tensor:
        """Forward and backward passes of all micro-batches; gradients are added to .grad. Returns the loss of the batch, [], the same on
        every rank. x, labels: full, alike on all ranks, or with own=True this data rank's. scaler: a gingham.GradScaler that scales it.
        given: what a converted model takes beside x, of the same batch: attention_mask ([rows, time], or [rows, 1, time, time]),
        position_ids and, of GPT-2 and BERT, token_type_ids. Padded tokens count unless their labels are -100, as in the original."""
        return self._pipeline.step(x, labels, own, scaler, given)

    def eval_step(self, x: torch.Tensor, labels: torch.Tensor, own: bool = False, **given: Any) -> torch.Tensor:
        """`step`'s loss without gradients."""
        with torch.no_grad():
            return self._pipeline.step(x, labels, own, None, given, train=False)

    def forward(self, x: torch.Tensor, **given: Any) -> torch.Tensor:
        """Full x, alike on all ranks, to full outputs, on every rank; without gradients, which `step` makes. given: as `step`'s."""
        with torch.no_grad():
            return self._pipeline.outputs(x, given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Refused by name where there are stages: their functions are the original's, and messages have one receiver."""
        if self._pipeline.mesh.whole is None:
            theirs = getattr(super(), "__deepcopy__", None)
            if theirs is not None:
                return theirs(memo)
            new = memo[id(self)] = type(self).__new__(type(self))
            new.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return new
        raise NotImplementedError(
            f"copy.deepcopy of a {type(self).__name__} on a pipeline, as in AveragedModel(model): rank {self._pipeline.mesh.rank} has one"
            " stage of it and the messages to the others; expected the copy before the cut, average = AveragedModel(model), then"
            " gingham.pipeline(model) and gingham.pipeline(average.module), whose parameters lie alike"
        )


class _ConvertedMethods(_Methods):
    """Of a model of transformers, what needs all its layers is refused."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("generate on a pipeline: gingham.save it, and load it into a model of gingham.parallelize")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("save_pretrained on a pipeline: gingham.save it, and load it into a model of gingham.parallelize")


@dataclass(frozen=True)
class Cutting:
    """How inputs and labels are cut (dim, order: scatter's) and outputs are (layout)."""

    layout: str | None
    dim: int
    order: str | None


class Pipelined:
    """One rank's part of a pipelined model."""

    def __init__(
        self, model: torch.nn.Module, mesh: Mesh, microbatches: int, schedule: str, count: int, loss: Loss | None, cutting: Cutting
    ) -> None:
        self.model, self.mesh, self.parts, self.loss, self.cutting = model, mesh, microbatches, loss, cutting
        self.size, self.place = mesh.pipeline.size, mesh.pipeline.rank
        self.schedule, total = schedule, self.size * count
        self.family = family_of(model) if hasattr(model, BORDER) else None
        if self.family is not None:
            getattr(model, BORDER).inside.everywhere = True  # stages call its modules without the border
        self.given = Given(mesh)
        stages = cut(model, parts_of(model, self.given), total)
        place_of = [rank_of(stage, self.size, schedule) for stage in range(total)]
        mine = [stage for stage in range(total) if place_of[stage] == self.place]
        self.layout = cutting.layout or _layout_of([module for part in stages[-1] for module in part.modules])
        self.ties = ties_of(stages, place_of, self.place)
        self.last = place_of[-1]
        self.absent, self.first_keys = _absent(model, stages, mine)
        used = [{id(each) for part in stage for outer in part.modules for each in outer.modules()} for stage in stages]
        self.others = set[int]().union(*used) - set[int]().union(*(used[stage] for stage in mine))
        self.passes = 2 * total * microbatches  # tags of run.py
        wire = None if mesh.whole is None else Wire(mesh, line_of(mesh), self.passes + tags_of(self.ties, self.size))
        ordered = wire is not None and wire.ordered
        self.orders = {train: of_rank(self.place, self.size, schedule, microbatches, count, train, ordered) for train in (True, False)}
        held: dict[int, Any] = {stage: stages[stage] for stage in mine}
        self.runner = Runner(held, total, place_of, self.place, microbatches, wire, self._begin)
        self.parts_given: list[dict[str, torch.Tensor]] = []  # of the batch under way, by micro-batch
        self.dtypes: tuple[int, ...] = ()  # a number for the parameters' of each stage's rank

    def holds(self, path: str) -> bool:
        """Whether this rank's stages use the module of that path; one that no stage uses is everyone's."""
        return id(self.model.get_submodule(path)) not in self.others

    def step(self, x: torch.Tensor, labels: torch.Tensor, own: bool, scaler: Any, given: Any, train: bool = True) -> torch.Tensor:
        how = (
            f"{'step' if train else 'eval_step'}(own={own}, scaler={type(scaler).__name__}{''.join(f', {name}' for name in sorted(given))})"
        )
        self._told(lambda: self._compare([x, labels, *(given[name] for name in sorted(given))], how))
        self._check(x, labels, given)
        labels = shifted(labels, IGNORED) if self.family is not None and self.family.shifts else labels
        xs, targets = self._split(x, "x", own), self._split(labels, "labels", own)
        weights = self._weights(targets, own)

        def lose(y: torch.Tensor, part: int) -> torch.Tensor:
            target = self._scatter(targets[part], own)
            if self.mesh.outer.time and y.dim() == 2 and target.dim() == 1:
                target = target[: len(y)]  # of a first token, whose rows are on the rank that has it
            if self.loss is not None:
                value = self.loss(y, target)
            else:
                value = cross_entropy(y, target, mesh=self.mesh, layout=self.layout, reduction="sum")
            shares[part], kinds[0] = value.detach().double() * weights[part], _DTYPES.index(value.dtype)
            value = value * weights[part]
            return value if scaler is None else scaler.scale(value)

        if scaler is not None:  # it begins with the first scale() on each rank
            scaler.scale(torch.zeros((), device=self.mesh.device))
        shares: dict[int, torch.Tensor] = {}
        kinds = [0]
        self._told(lambda: self._run(xs, own, lose, train, given))
        total = sum((shares[part] for part in sorted(shares)), torch.zeros((), dtype=torch.float64, device=self.mesh.device))
        told = self.mesh.over_stages(torch.stack([total, total.new_tensor(kinds[0])]), "the loss of a pipeline's step")
        value, kind = told[self.last]
        return value.to(_DTYPES[int(kind)])

    def outputs(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        how = f"forward({', '.join(sorted(given))})"
        self._told(lambda: self._compare([x, *(given[name] for name in sorted(given))], how))
        self._check(x, None, given)
        xs = self._split(x, "x", False)
        found = self._told(lambda: self._run(xs, False, lambda y, part: self._gather(y), False, given))
        full = torch.cat(found) if found else None
        if self.mesh.whole is None:
            assert full is not None
            return full
        words = ([full.dim(), *full.shape] if full is not None else []) + [0] * 9
        words = words[:9] + [0 if full is None else _DTYPES.index(full.dtype)]
        told = self.mesh.over_stages(torch.tensor(words, device=self.mesh.device), "the outputs of a pipeline")[self.last]
        *sizes, kind = on_host(self.mesh, told).tolist()
        if full is None:
            full = torch.empty(sizes[1 : 1 + sizes[0]], dtype=_DTYPES[kind], device=self.mesh.device)
        self.mesh.whole.say("the outputs of a pipeline")
        self.mesh.whole.joint(("pipeline",)).broadcast_(full, self.last, counted=False)
        return full

    def _scatter(self, x: torch.Tensor, own: bool) -> torch.Tensor:
        if self.family is not None and self.family.images and x.dim() == 4:
            return images_here(self.mesh, x, own)
        return self.mesh.scatter(x, dim=self.cutting.dim, own=own, order=self.cutting.order)

    def _gather(self, y: torch.Tensor) -> torch.Tensor:
        return self.mesh.gather(y, self.layout, self.cutting.dim, order=self.cutting.order)

    def _begin(self, rows: int, part: int) -> None:
        """A micro-batch's forward or backward pass begins in a stage."""
        self.given.now = self.parts_given[part]
        turn(self.mesh)
        self.mesh.told.begin(rows)  # also where this rank has none of its rows: passes are counted alike on all

    def _run(self, xs: Sequence[torch.Tensor], own: bool, lose: Any, train: bool, given: Any) -> list[torch.Tensor]:
        rows, samples = [len(each) for each in xs], samples_of(self.mesh, own)
        parts = split(given, sum(rows), self.parts)
        self.parts_given = [cut_given(self.mesh, each, count, samples) for each, count in zip(parts, rows, strict=True)]
        inputs: Any = _Scattered(xs, lambda x: self._scatter(x, own))
        kind = self.mesh.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        keys = [(tuple(each.shape), each.dtype, cast, self.dtypes) for each in xs]
        with no_sync(self.model):
            found = self.runner.run(self.orders[train], inputs, keys, lose, train)
        self.given.now, self.parts_given = {}, []
        if train:
            make_sums(self.model.parameters())
            sum_ties(self.mesh, self.ties, self.place, self.runner.wire, self.passes)
        return found

    def _told(self, work: Callable[[], Any]) -> Any:
        """work(), whose error is told to the ranks of the other stages."""
        try:
            return work()
        except (PeerDied, PeerStalled, PeerOutOfMemory):
            raise
        except BaseException as error:
            if self.mesh.whole is not None:
                rank, stage = self.mesh.rank, self.place
                self.mesh.job.fail(rank, f"rank {rank} raised {type(error).__name__} in stage {stage} of a pipeline: {error}")
            raise

    def _compare(self, batch: Sequence[Any], how: str) -> None:
        """Raises MeshError where ranks make other calls, or where the stages were given different batches: labels of the last would belong
        to other inputs."""
        alike(self.mesh, f"a pipeline's {how}{'' if self.model.training else ' of a model in eval()'}")
        if self.mesh.whole is None:
            return
        found = 0
        for each in batch:
            if isinstance(each, torch.Tensor):
                found = checksum(each, crc32(f"{tuple(each.shape)} {each.dtype}".encode(), found))
        dtypes = crc32(repr(sorted({str(each.dtype) for each in self.model.parameters()})).encode())
        told = self.mesh.over_stages(torch.tensor([found, dtypes], device=self.mesh.device), "the batch of a pipeline's step")
        sums, dtypes_of_all = on_host(self.mesh, torch.stack(told)).T.tolist()
        self.dtypes = tuple(dtypes_of_all)
        if len(set(sums)) > 1:
            raise MeshError(
                f"gingham.pipeline: ranks {line_of(self.mesh)}, the stages of one batch, got different ones; give"
                " every stage the same x and labels: seed loaders alike, or use mesh.sampler"
            )

    def _check(self, x: Any, labels: Any, given: Any) -> None:
        """Raises ShapeError where inputs, labels or what is given beside them do not fit a converted model, TypeError for what it does not
        take."""
        if self.family is None:
            check(type(self.model).__name__, self.mesh, x, given, ())
            return
        for name, each, dims in (("x", x, 4 if self.family.images else 2), ("labels", labels, self.family.labels)):
            if isinstance(each, torch.Tensor) and each.dim() != dims:
                got = tuple(each.shape)
                raise ShapeError(f"step: rank {self.mesh.rank} got {name} {got}, expected {dims} dims for a {type(self.model).__name__}")
        check(type(self.model).__name__, self.mesh, x, given, self.family.takes)
        check_places(self.model, self.mesh, x)

    def _split(self, x: torch.Tensor, name: str, own: bool) -> list[torch.Tensor]:
        if not isinstance(x, torch.Tensor) or x.dim() < 1 or len(x) < self.parts:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ShapeError(f"step: rank {self.mesh.rank} got {name} {got}, expected a batch of at least microbatches={self.parts} rows")
        rows = self.mesh.parts(samples_of(self.mesh, own))
        if self.family is not None and len(x) // self.parts < rows:  # models' own code cannot view an empty tensor as heads
            raise ShapeError(
                f"step: rank {self.mesh.rank} got {len(x)} rows of {name} for {self.parts} micro-batches; a converted model on this"
                f" mesh needs at least {rows} rows in each: a larger batch, fewer micro-batches or a mesh that cuts fewer rows"
            )
        return list(x.tensor_split(self.parts))

    def _weights(self, targets: Sequence[torch.Tensor], own: bool) -> list[float]:
        """By which each micro-batch's loss, a sum of valid labels or a mean of rows, counts in the step's."""
        counts = [len(each) if self.loss is not None else int((each != IGNORED).sum()) for each in targets]
        if own and self.mesh.data.size > 1:
            self.mesh.say("the labels of a pipeline's step")
            told, tensor = self.mesh.world.sizes([sum(counts)]), self.mesh.size // self.mesh.data.size
            total = sum(each for (each,) in told) // tensor
            if self.loss is not None:
                raise NotImplementedError("gingham.pipeline: loss= with own=True over several data ranks; give the whole batch (own=False)")
        else:
            total = sum(counts)
        scale = 1 / total if total else float("nan")
        return [count * scale for count in counts] if self.loss is not None else [scale] * len(counts)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


class _Scattered:
    """This rank's blocks of the micro-batches, each cut when it is asked for."""

    def __init__(self, xs: Sequence[torch.Tensor], scatter: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.xs, self.scatter = xs, scatter

    def __getitem__(self, part: int) -> torch.Tensor:
        return self.scatter(self.xs[part])


def _layout_of(modules: Sequence[torch.nn.Module]) -> str:
    """Of the outputs of the last layer that says one."""
    found = "outer"
    for module in modules:
        for each in module.modules():
            said = getattr(each, "layout", None)
            found = said.rpartition("->")[2] if isinstance(said, str) else found
    return found


def _absent(model: torch.nn.Module, stages: Sequence[Sequence[Part]], mine: Sequence[int]) -> tuple[set[str], dict[str, str]]:
    """Drops what other stages alone use. The keys of that; and of tied parameters, by a later key that is here, the first, which is not."""
    keys, firsts = set(plain_keys(model)), dict[int, str]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        firsts.setdefault(id(parameter), name)
    drop(stages, mine)
    absent = keys - set(plain_keys(model))
    left = {name: firsts[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    return absent, {name: first for name, first in left.items() if first in absent}
