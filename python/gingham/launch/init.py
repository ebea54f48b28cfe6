"""init and destroy: one job at a time, its mesh the default one; a rank's uncaught exception is told to the others."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from .. import checks, mesh, native
from ..errors import MeshError, PeerDied, PeerOutOfMemory, PeerStalled
from ..mesh import Axes, Mesh, axes_of, axes_of_device_mesh, random
from ..mesh.layout import odd_ranks
from . import faults, rendezvous
from .meeting import Meeting, seen_by_all
from .parallel_config import parse_parallel

_made_group = False


def init(
    mode: str | DeviceMesh | None = None,
    size: int | None = None,
    depth: int | None = None,
    grid: Sequence[int] | None = None,
    parallel: Mapping[str, Any] | None = None,
    sequence: bool = False,
    shard_depth: bool = False,
    timeout: float = 60.0,
    heap: int | None = None,
    source: str | None = None,
    slices: int = 1,
    link: tuple[float, float] | None = None,
    device: str | None = None,
    model: Any = None,
    tokens: tuple[int, int] | None = None,
    machine: Mapping[str, float] | None = None,
) -> Mesh:
    """Starts the job's mesh, on every rank alike, and makes it the default one.

    mode "1d" (sequence=True: rows sharded between layers), "2d", "2.5d" (depth=; shard_depth=True cuts the weights over
    depth too), "3d", or grid=(pm, pn, pk), or a torch DeviceMesh, or parallel=dict(tensor=dict(size=, mode=, depth=)).
    mode "auto": the cheapest grid of `size` ranks (default: all) that fits, by choose.py's model: model= a torch.nn or
    Hugging Face model, also on the meta device, with tokens=(batch, context) of a step, or a gingham.Workload;
    machine=dict(memory=bytes of tensors a rank may hold, latency=, bandwidth=, speed=), of choose.Machine.
    device "cpu" (the default, or GINGHAM_DEVICE) | "cuda": GPU number LOCAL_RANK, one rank a GPU, over NCCL; fp32 products
    are in tf32 where torch.backends.cuda.matmul.allow_tf32 says so at this moment.
    source "window" (the CPU's default) | "ring" (the only one on GPUs) and `slices` say how panels travel;
    link=(seconds, bytes per second) slows every message; timeout: seconds after which a silent peer is PeerStalled, here
    too: for each step of init, the others' coming first of all.
    heap: bytes of address space for each rank's tensors and workspace (default: rank 0's available memory, at most 16 TiB
    over the number of ranks; rank 0's number is everyone's). Memory is taken as it is needed; a rank that finds too little
    raises MemoryError, and all others PeerOutOfMemory naming it, after which the mesh can be used again.
    Creates torch.distributed's default process group (Gloo) where there is none. Raises MeshError before any of that
    where the numbers do not fit; PeerStalled naming ranks that do not come; PeerDied naming one that dies or raises here;
    MemoryError where the address space is limited (`ulimit -v`); ValueError for a wrong GINGHAM_FAULT (launch/faults.py).
    """
    if mesh.has_mesh():
        raise MeshError("gingham.init was called twice: call gingham.destroy() first")
    device_mesh = mode if isinstance(mode, DeviceMesh) else None
    if device_mesh is not None:
        axes = axes_of_device_mesh(device_mesh)
    elif parallel is not None:
        axes = _configured(parallel, (mode, size, depth, grid), {"sequence": sequence, "shard_depth": shard_depth})
    elif mode == "auto":
        axes = _planned(size, {"depth": depth, "grid": grid, "sequence": sequence, "shard_depth": shard_depth}, model, tokens, machine)
    else:
        axes = axes_of(None if mode is None else str(mode), size, depth, grid, sequence, shard_depth)
    device, source = _device_and_source(device, source, slices, link)
    return _start(axes, device_mesh, heap, (timeout, source, slices, link, device))


def _check_size(axes: Axes, heap: int | None) -> tuple[int, int]:
    """(rank, world), where the mesh fits the job."""
    rank, world = rendezvous.world()
    if axes.size != world:
        raise MeshError(_wrong_size(axes.size, world))
    if world > native.max_ranks:
        raise MeshError(f"a mesh has at most {native.max_ranks} ranks, those of one host; got {world}")
    if heap is not None and heap < 1:
        raise MeshError(f"heap={heap}: expected bytes for each rank, at least 1")
    return rank, world


def _start(axes: Axes, device_mesh: DeviceMesh | None, heap: int | None, options: tuple[Any, ...]) -> Mesh:
    """The steps of init, with a fault's point after each; what one rank fails in is told to all."""
    global _made_group
    timeout, source, slices, link, device = options
    rank, world = _check_size(axes, heap)
    strikes = faults.read(rank, world)
    _watch()
    meeting = Meeting(rank, world, timeout)
    jobs: list[native.Job] = []
    try:
        faults.at("init.start")
        meeting.arrive()
        faults.at("init.arrive")
        meeting.exchange("before group", None)  # Gloo cannot be asked to stop: nobody enters it whose peers are not all alive
        _made_group = meeting.during("group", partial(rendezvous.make_process_group, device, meeting.store))
        faults.at("init.group")
        _join(meeting, axes, heap, options, jobs)
        place = _use_gpu(jobs[0]) if device == "cuda" else torch.device("cpu")
        faults.at("init.join")
        meeting.exchange("before mesh", None)
        if device_mesh is None:
            device_mesh = meeting.during("mesh", partial(_device_mesh, place, torch.arange(world).view(*axes.sizes.values()), axes))
        made = Mesh(axes, rank, jobs, device_mesh, source, slices, link or (0.0, 0.0), place)
        faults.at("init.mesh")
        meeting.exchange("made", None)
    except BaseException as error:
        meeting.fail(error)
        for job in jobs:
            if not isinstance(error, PeerDied | PeerStalled):
                job.fail(rank, f"rank {rank} raised {type(error).__name__} in gingham.init: {error}")
        _leave_group()
        raise
    finally:
        meeting.close()
    jobs[0].inject(strikes)
    mesh.set_current(made)
    checks.install(made)
    return made


def _device_mesh(place: torch.device, ranks: torch.Tensor, axes: Axes) -> DeviceMesh:
    """torch's mesh; in a thread of its own, whose current GPU is another's."""
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return DeviceMesh(place.type, ranks, mesh_dim_names=tuple(axes.sizes))


def _wrong_size(size: int, world: int) -> str:
    if size == 1:
        return (
            f"gingham.init got no mesh, which is one of 1 rank, but the job has {world}: say which, for example"
            f" gingham.init(grid=(1, {world}, 1)), or mode= and size={world}; python -m gingham plan --ranks {world} lists them"
        )
    start = f"torchrun --nproc-per-node {size} {os.path.basename(sys.argv[0]) or 'train.py'}"
    return f"the mesh has {size} ranks but the job has {world}: start {size} processes ({start}), or choose a mesh of {world}"


def _configured(parallel: Mapping[str, Any], excluded: tuple[Any, ...], others: dict[str, Any]) -> Axes:
    if any(given is not None for given in excluded):
        raise MeshError("parallel= excludes mode, size, depth and grid: give one or the other")
    return axes_of(**{**others, "mode": None, **parse_parallel(parallel, rendezvous.world()[1])})


def _planned(size: int | None, others: dict[str, Any], model: Any, tokens: Any, machine: Mapping[str, float] | None) -> Axes:
    """The axes that the planner chooses; the same on every rank, since it computes the same."""
    from ..plan import choose
    from ..plan.workload import Workload
    from .describe import describe

    given = [name for name, value in others.items() if value]
    if given:
        raise MeshError(f"mode='auto' chooses {', '.join(given)} itself: leave it out, or name a mode")
    if not isinstance(model, Workload):
        if not isinstance(model, torch.nn.Module) or tokens is None:
            raise MeshError(
                f"mode='auto' got model={type(model).__name__}, tokens={tokens}: expected a torch.nn.Module and tokens=(batch, context),"
                " or a gingham.Workload"
            )
        model = describe(model, *tokens)
    return axes_of(**choose.choose(model, size or rendezvous.world()[1], choose.Machine(**machine or {})).arguments)


def _device_and_source(device: str | None, source: str | None, slices: int, link: tuple[float, float] | None) -> tuple[str, str]:
    device = device or os.environ.get("GINGHAM_DEVICE", "cpu")
    if device not in ("cpu", "cuda"):
        raise MeshError(f"device={device!r}: expected 'cpu' or 'cuda'")
    source = source or ("ring" if device == "cuda" else "window")
    if source not in ("window", "ring") or slices < 1:
        raise MeshError(f"source={source!r}, slices={slices}: expected 'window' or 'ring', and at least 1")
    if device == "cuda" and (source == "window" or link):
        raise MeshError(f"device='cuda' with source={source!r}, link={link}: GPUs move panels through rings; leave both out")
    return device, source


def _join(meeting: Meeting, axes: Axes, heap: int | None, options: tuple[Any, ...], jobs: list[native.Job]) -> None:
    """The jobs of shared memory, made by rank 0 and joined by the others once all agree on the mesh and the version: one
    for the main thread and, where weights are replicated over depth, one for the thread that sums their gradients."""
    rank, timeout = meeting.rank, options[0]
    count = 2 if axes.depth and options[-1] == "cpu" else 1
    if rank == 0:
        jobs += [native.Job(0, axes.size, "", timeout, heap or 0) for _ in range(count)]
    description = (
        f"{dict(axes.sizes)}, outer {axes.outer}, replicated over {axes.depth}, options {options}, heap {heap}, gingham {native.version()}"
    )
    told = meeting.exchange("described", (description, [job.path for job in jobs]))
    descriptions = [text for text, _ in told]
    odd, usual = odd_ranks(descriptions)
    if odd:
        raise seen_by_all(MeshError(f"ranks {odd} called init differently: {descriptions[odd[0]]}; the others: {usual}"))
    if rank != 0:
        jobs += [native.Job(rank, axes.size, path, timeout) for path in told[0][1]]

    def ready() -> None:
        for job in jobs:
            job.ready(meeting.pids)

    def stop(culprit: int, text: str) -> None:
        for job in jobs:
            job.fail(culprit, text)

    meeting.during("joined", ready, stop)
    if count == 2:
        jobs[0].pair_with(jobs[1])
    if not jobs[0].watches:
        warnings.warn(
            f"gingham.init on rank {rank}: the system forbids pidfd_open, or lacks it (a container's seccomp filter, Linux before 5.3);"
            " deaths of other ranks are seen by asking for their pids instead. Allow pidfd_open to be told by the kernel",
            stacklevel=3,
        )


def _use_gpu(job: native.Job) -> torch.device:
    """Gives the rank GPU number LOCAL_RANK; NCCL is torch's where torch has loaded it, else the wheel's."""
    ordinal = int(os.environ.get("LOCAL_RANK", job.rank))
    find_nccl()
    job.use_gpu(ordinal, torch.backends.cuda.matmul.allow_tf32)
    if job.on_host:  # a runtime that stands in for a device
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MeshError(
            f"rank {job.rank} was given GPU {ordinal}, but this torch ({torch.__version__}) sees none: install a build of torch for CUDA"
        )
    torch.cuda.set_device(ordinal)
    return torch.device("cuda", ordinal)


def _leave_group(device_mesh: DeviceMesh | None = None) -> None:
    global _made_group
    if _made_group:
        rendezvous.destroy_process_group()
        # DTensor and dynamo remember meshes for ever, and a mesh its groups, whose threads wake 100 times a second each
        getattr(device_mesh, "_pg_registry", {}).clear()
    _made_group = False


def destroy() -> None:
    """Ends the mesh, and the process group if init made it. Does nothing where there is no mesh; init may follow."""
    if mesh.has_mesh():
        ended = mesh.current()
        mesh.set_current(None)
        ended.ended = True
        if ended.job.orphaned:  # a forked process has the mesh of its rank and nothing to end
            return
        for job in _jobs(ended):
            job.close()
        if ended.depth_sums is not None:
            ended.depth_sums.stop()
        _leave_group(ended.device_mesh)
        # process groups, their threads and sockets hang in reference cycles: many lives must not pile them up
        gc.collect()


def report_failure(error: BaseException) -> None:
    """Tells the other ranks that this one failed, so that they raise PeerDied with the message at once."""
    if isinstance(error, PeerDied | PeerStalled | PeerOutOfMemory):
        return
    if mesh.has_mesh():
        rank = mesh.current().rank
        for job in _jobs(mesh.current()):
            job.fail(rank, f"rank {rank} raised {type(error).__name__}: {error}")
    else:
        rank = rendezvous.world()[0]
        path = os.environ.get("GINGHAM_STORE", "")
        rendezvous.tell_gone(path, rank, f"rank {rank} raised {type(error).__name__}: {error}")


def _jobs(of: Mesh) -> list[Any]:
    return [of.job, of.background] if of.has_background else [of.job]


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


def find_nccl() -> None:
    """Tells the C++ core where the nvidia-nccl wheel keeps its library, for processes whose torch has not loaded one."""
    try:
        wheel = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        native.set_nccl_path(str(Path(folder) / "lib" / "libnccl.so.2"))
