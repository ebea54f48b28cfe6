"""init and destroy: from what a user asks for to a mesh; a rank's uncaught exception is told to the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from .. import checks, mesh, native
from ..errors import MeshError, PeerDied, PeerOutOfMemory, PeerStalled
from ..mesh import Axes, Mesh, axes_of, axes_of_device_mesh, neighbours, random
from ..mesh.layout import Layout
from ..plan import choose
from ..plan.workload import Linears, Workload
from . import auto, rendezvous, world
from . import ending as ending  # registers what it does at the end
from .describe import describe
from .parallel_config import parse_parallel, parse_pipeline


def init(
    mode: str | DeviceMesh | None = None,
    size: int | None = None,
    depth: int | None = None,
    grid: Sequence[int] | None = None,
    parallel: Mapping[str, Any] | str | None = None,
    sequence: bool = False,
    shard_depth: bool = False,
    timeout: float = 60.0,
    heap: int | None = None,
    source: str | None = None,
    slices: int | None = None,
    link: tuple[float, float] | None = None,
    device: str | None = None,
    model: Any = None,
    tokens: tuple[int, int] | None = None,
    machine: Mapping[str, float] | None = None,
    ranks: Sequence[int] | None = None,
    default: bool = True,
    attention: str | None = None,
) -> Mesh:
    """Makes a mesh, on all its ranks alike, and makes it the default one: that of layers and functions that are given none.

    mode "1d" (sequence=True: rows sharded between layers), "2d", "2.5d" (depth=; shard_depth=True cuts the weights over depth too), "3d",
    "sequence" (attention="ring" | "heads" | "gathered" | "auto": see SelfAttention's ring), or grid=(pm, pn, pk), or a torch DeviceMesh, or
    parallel=dict(tensor=dict(size=, mode=, depth=)), with data=2 or data=dict(size=, shard=None | "all") for replicas with whole weights or
    cut ones (ZeRO-3), see Mesh.scatter(own=True), and pipeline=2 or dict(size=, schedule=, microbatches=): the mesh is that of this
    rank's stage, the job's ranks are numbered by pipeline, data and tensor, outermost first; see gingham.pipeline.
    ranks: the job's ranks that the mesh is made of, in mesh order (default: all; those of the DeviceMesh, which may be a slice
    of a larger one). Where they are not all, the first init is still one of all ranks of the job, each with its own mesh.
    default=False: a mesh beside the first, on ranks that have one already; name it by mesh=.
    mode "auto": the cheapest grid of `size` ranks (default: all) that fits, by choose.py's model: model= a torch.nn or
    Hugging Face model, also on the meta device, with tokens=(batch, context) of a step, or a gingham.Workload;
    machine=dict(memory=bytes of tensors a rank may hold, latency=, bandwidth=, speed=), of choose.Machine. parallel="auto", or "auto" for
    a part of it (launch/auto.py): the same among hybrids; train on the mesh by gingham.pipeline's step. mesh.chosen says why it was taken.
    device "cpu" (the default, or GINGHAM_DEVICE) | "cuda": GPU number LOCAL_RANK, one rank a GPU, over NCCL; fp32 products
    are in tf32 where torch.backends.cuda.matmul.allow_tf32 says so at this moment.
    source "window" (the CPU's default) | "ring" (the only one on GPUs) and `slices` say how panels travel (default: 1, on CPUs 4 of large
    weights, 2 of very large ones); link=(seconds, bytes per second) slows messages; timeout: seconds until a silent peer is PeerStalled.
    heap: bytes of address space for each rank's tensors and workspace (default: rank 0's available memory, at most 16 TiB
    over the number of ranks; rank 0's number is everyone's). Memory is taken as it is needed; a rank that finds too little
    raises MemoryError, and all others PeerOutOfMemory naming it, after which the mesh can be used again.
    timeout, source, slices and link are the mesh's own; heap and device are the job's, and a mesh beside the first has them too.
    Creates torch.distributed's default process group (Gloo) where there is none. Raises MeshError before any of that
    where the numbers do not fit; PeerStalled naming ranks that do not come; PeerDied naming one that dies or raises here;
    MemoryError where the address space is limited (`ulimit -v`); ValueError for a wrong GINGHAM_FAULT (launch/faults.py).
    """
    _refuse_twice(default)
    parallel, why = _decided(parallel, model, tokens, machine)
    others: dict[str, Any] = {"depth": depth, "grid": grid, "sequence": sequence, "shard_depth": shard_depth, "attention": attention}
    if mode == "auto" and parallel is None:
        axes, why = _planned(size or (None if ranks is None else len(ranks)), others, model, tokens, machine)
    else:
        axes = _named(mode, size, parallel, others)
    device, source = _device_and_source(device, source, slices, link)
    sizes = _operands(model, tokens) if mode == "auto" and ranks is None else None
    plan = world.Plan(axes, (), mode if isinstance(mode, DeviceMesh) else None, timeout, heap, source, slices, link, device, sizes)
    return _begun(_made_of(plan, parse_pipeline(parallel or {}), ranks, default), why, default)


def _begun(made: Mesh, why: str, default: bool) -> Mesh:
    made.chosen = why
    if default:
        mesh.set_current(made)
    checks.install(made)
    return made


def _made(plan: world.Plan) -> Mesh:
    joined = world.current()
    if plan.heap is not None and plan.heap < 1:
        raise MeshError(f"heap={plan.heap}: expected bytes for each rank, at least 1")
    if joined is not None and plan.heap is not None:
        raise MeshError(f"heap={plan.heap}: the job's heaps were made by its first init, and hold all its meshes; leave heap out")
    if joined is not None and (plan.device == "cuda") != joined.job.has_gpu:
        found = "GPUs" if joined.job.has_gpu else "CPU"
        raise MeshError(f"device={plan.device!r}: the job's first mesh is on the {found}, and so are all others")
    _watch()
    return world.add_mesh(plan)


def _refuse_twice(default: bool) -> None:
    if mesh.has_mesh() and default:
        raise MeshError("gingham.init was called twice: call gingham.destroy() first, or pass default=False for a mesh beside the first")


def _made_of(plan: world.Plan, pipeline: Mapping[str, Any], ranks: Sequence[int] | None, default: bool) -> Mesh:
    """The mesh of a plan that has no ranks yet."""
    if pipeline["size"] > 1:
        made = _made_stage(plan, pipeline["size"], ranks, default)
    else:
        made = _made(replace(plan, ranks=_ranks(plan.axes, ranks, plan.device_mesh)))
    made.schedule = dict(pipeline)
    return made


def _made_stage(plan: world.Plan, count: int, ranks: Sequence[int] | None, default: bool) -> Mesh:
    """The mesh of this rank's stage, of a pipeline of `count`, which knows the mesh of all the job's ranks around it."""
    if ranks is not None or not default:
        raise MeshError("parallel= with pipeline above 1 is a mesh of all ranks, the default one: leave ranks= and default= out")
    rank, size = rendezvous.world()
    each = plan.axes.size
    if each * count != size:
        raise MeshError(_wrong_size(each * count, size))
    stages = [tuple(each * stage + place for place in neighbours(plan.axes)) for stage in range(count)]
    around = Axes({"pipeline": count, **plan.axes.sizes}, (), (), (), Layout((), ()), Layout((), ()))
    whole = _made(replace(plan, axes=around, stage=f"each stage {plan.cuts()}", ranks=tuple(place for stage in stages for place in stage)))
    made = _made(replace(plan, ranks=stages[rank // each], heap=None))
    made.whole = whole
    return made


def _ranks(axes: Axes, ranks: Sequence[int] | None, device_mesh: DeviceMesh | None) -> tuple[int, ...]:
    """The ranks of the mesh, where the numbers fit the job."""
    rank, size = rendezvous.world()
    if device_mesh is not None:
        if ranks is not None:
            raise MeshError("ranks= beside a DeviceMesh, which has its own: give one or the other")
        found = tuple(device_mesh.mesh.flatten().tolist())
    elif ranks is not None:
        found = tuple(int(each) for each in ranks)
    else:
        if axes.size != size:
            raise MeshError(_wrong_size(axes.size, size))
        found = neighbours(axes)
    wrong = [each for each in found if not 0 <= each < size]
    if wrong or len(set(found)) < len(found):
        raise MeshError(f"ranks={list(found)}: expected different ranks of the job, 0 to {size - 1}")
    if len(found) != axes.size:
        raise MeshError(f"the mesh has {axes.size} ranks, ranks={list(found)} names {len(found)}")
    if rank not in found:
        raise MeshError(
            f"gingham.init: rank {rank} is not among the ranks of its mesh, {list(found)}; each rank calls it with a mesh that it is"
            " part of, for example its own slice of a DeviceMesh"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size > native.max_ranks or here > native.max_host_ranks:
        raise MeshError(
            f"a host has at most {native.max_host_ranks} ranks of a job, a job at most {native.max_ranks}; got {here} of {size}"
        )
    return found


def _wrong_size(size: int, world: int) -> str:
    if size == 1:
        return (
            f"gingham.init got no mesh, which is one of 1 rank, but the job has {world}: say which, for example"
            f" gingham.init(grid=(1, {world}, 1)), or mode= and size={world}; python -m gingham plan --ranks {world} lists them"
        )
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if world == 1 and "RANK" not in os.environ and tasks != "1":
        return (
            f"the mesh has {size} ranks but the job has 1: RANK and WORLD_SIZE are not set, and Slurm's {tasks} tasks are not read; start"
            " torchrun on each host, or set RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS MASTER_ADDR=.. MASTER_PORT=.. (both: docs/hosts.md)"
        )
    start = f"torchrun --nproc-per-node {size} {os.path.basename(sys.argv[0]) or 'train.py'}"
    fix = f"start {size} processes ({start}), choose a mesh of {world}, or name its ranks with ranks="
    return f"the mesh has {size} ranks but the job has {world}: {fix}"


def _named(mode: Any, size: int | None, parallel: Mapping[str, Any] | None, others: dict[str, Any]) -> Axes:
    """The axes that the arguments name."""
    if parallel is not None:
        if any(given is not None for given in (mode, size, others["depth"], others["grid"])):
            raise MeshError("parallel= excludes mode, size, depth and grid: give one or the other")
        return axes_of(**{**others, "mode": None, **parse_parallel(parallel, rendezvous.world()[1])})
    if isinstance(mode, DeviceMesh):
        return axes_of_device_mesh(mode)
    return axes_of(None if mode is None else str(mode), size, **others)


def _decided(parallel: Any, model: Any, tokens: Any, machine: Mapping[str, float] | None) -> tuple[Mapping[str, Any] | None, str]:
    """parallel= without "auto", and why the planner took what stands for it; the same on every rank, since it computes the same."""
    if not auto.has_auto(parallel):
        if isinstance(parallel, str):
            raise MeshError(f"parallel={parallel!r}: expected 'auto' or dict(data=.., pipeline=.., tensor=dict(size=.., mode=..))")
        return parallel, ""
    workload = _workload(model, tokens, f"parallel={parallel!r}")
    found, why = auto.chosen(parallel, rendezvous.world()[1], workload, choose.Machine(**machine or {}))
    return found.parallel, why


def _planned(size: int | None, others: dict[str, Any], model: Any, tokens: Any, machine: Mapping[str, float] | None) -> tuple[Axes, str]:
    """The axes that the planner chooses, and why; the same on every rank, since it computes the same."""
    given = [name for name, value in others.items() if value]
    if given:
        raise MeshError(f"mode='auto' chooses {', '.join(given)} itself: leave it out, or name a mode")
    count = size or rendezvous.world()[1]
    chosen = choose.choose(_workload(model, tokens), count, choose.Machine(**machine or {}))
    return axes_of(
        **chosen.arguments
    ), f"{chosen.name} {chosen.grid}: {chosen.seconds:.3g} s a step, the least of the grids of {count} ranks"


def _workload(model: Any, tokens: Any, what: str = "mode='auto'") -> Workload:
    if not isinstance(model, Workload):
        if not isinstance(model, torch.nn.Module) or tokens is None:
            raise MeshError(
                f"{what} got model={type(model).__name__}, tokens={tokens}: expected a torch.nn.Module and tokens=(batch, context),"
                " or a gingham.Workload"
            )
        model = describe(model, *tokens)
    return model


def _operands(model: Any, tokens: Any) -> tuple[int, int, int]:
    """Words of X, Y and W of all the linear maps of a model."""
    workload = _workload(model, tokens)
    rows = workload.batch * workload.context
    maps = [(times, part) for times, part in workload.parts if isinstance(part, Linears)]
    x, y = (rows * sum(times * size for times, size in sizes) for sizes in ([(t, p.k) for t, p in maps], [(t, sum(p.n)) for t, p in maps]))
    return x, y, sum(times * part.k * sum(part.n) for times, part in maps)


def _device_and_source(device: str | None, source: str | None, slices: int | None, link: tuple[float, float] | None) -> tuple[str, str]:
    device = device or os.environ.get("GINGHAM_DEVICE", "cpu")
    if device not in ("cpu", "cuda"):
        raise MeshError(f"device={device!r}: expected 'cpu' or 'cuda'")
    source = source or ("ring" if device == "cuda" else "window")
    if source not in ("window", "ring") or (slices is not None and slices < 1):
        raise MeshError(f"source={source!r}, slices={slices}: expected 'window' or 'ring', and at least 1")
    if device == "cuda" and (source == "window" or link):
        raise MeshError(f"device='cuda' with source={source!r}, link={link}: GPUs move panels through rings; leave both out")
    return device, source


def destroy(of: Mesh | None = None) -> None:
    """Ends all meshes of this process, or the one given, and with the last one the job, and the process group if init made it. Does
    nothing where there is none; init may follow. Every rank of a mesh ends it."""
    joined = world.current()
    ended = ([] if joined is None else list(joined.meshes)) if of is None else [of] if of.whole is None else [of, of.whole]
    if of is not None and of.ended:
        return
    if mesh.has_mesh() and mesh.current() in ended:
        mesh.set_current(None)
    world.end(ended)


def report_failure(error: BaseException) -> None:
    """Tells the other ranks that this one failed, so that they raise PeerDied with the message at once."""
    if not isinstance(error, PeerDied | PeerStalled | PeerOutOfMemory):
        world.report_failure(f"rank {rendezvous.world()[0]} raised {type(error).__name__}: {error}")


_first_hook = _previous_hook = sys.excepthook
_reporting = False


def _watch() -> None:
    """Uncaught exceptions, random operations on parameters."""
    random.install()
    global _previous_hook
    if sys.excepthook is not _report_and_print:
        _previous_hook, sys.excepthook = sys.excepthook, _report_and_print


def _report_and_print(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Another library's hook may hold this one as the one before it, as this holds that: then the round ends here."""
    global _reporting
    if _reporting:
        return _first_hook(kind, error, trace)
    _reporting = True
    try:
        report_failure(error)
        _previous_hook(kind, error, trace)
    finally:
        _reporting = False
