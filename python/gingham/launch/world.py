"""The job of all ranks, and the meshes in it: made by the first init, which every rank of the world calls, ended with the last mesh.

One job has the memory, knows who is alive and keeps the first error; each mesh is a program of its own in it (csrc/control/program.h), so
that meshes of other ranks, or several of the same, make their calls without knowing of each other.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import debug as dtensor_debug

from .. import native
from ..errors import MeshError, PeerDied, PeerStalled
from ..mesh import Axes, Mesh
from ..mesh.layout import coordinates_of, members, odd_ranks
from ..mesh.modes import GridShape
from ..plan.hosts import best_order
from . import faults, rendezvous
from .engines import Choice, choose_engine
from .gpu import backward_as_before, use_gpu
from .hosts import VARIABLE, Host, host_numbers
from .links import Links, agree_on_network
from .meeting import Meeting, seen_by_all
from .reach import try_all_ways

WORSE = 1.5  # how many times as much must cross from host to host as in another order of the ranks for a warning


@dataclass(frozen=True)
class Plan:
    """What one rank asks of init: its mesh, and the job's options, of which only a first init may name any."""

    axes: Axes
    ranks: tuple[int, ...]  # of the job, in mesh order
    device_mesh: DeviceMesh | None
    timeout: float
    heap: int | None
    source: str
    slices: int | None
    link: tuple[float, float] | None
    device: str
    operands: tuple[int, int, int] | None = None  # words of X, Y and W of a model: its ranks take the order in which least crosses hosts
    stage: str = ""  # of a mesh of all stages of a pipeline: how each stage's ranks are used

    def words(self) -> str:
        """All on which the ranks of the mesh must agree."""
        options = (self.timeout, self.source, self.slices, self.link, self.device)
        return f"{dict(self.axes.sizes)}, {self.cuts()}{self.stage}options {options}"

    def cuts(self) -> str:
        """How the mesh's axes are used."""
        axes = self.axes
        used = f"outer {axes.outer}, inner {axes.inner}, replicated over {axes.depth}, kept over {axes.kept}, "
        return used + ("" if axes.attention is None else f"attention {axes.attention}, ")

    def job_words(self) -> str:
        """And those of the job."""
        return f"heap {self.heap}, device {self.device}, gingham {native.version()}"


@dataclass
class World:
    """This process's part in the job."""

    job: native.Job
    device: torch.device
    made_group: bool  # whether init made torch.distributed's default group
    hosts: list[Host]
    links: Links | None  # to the other hosts, where there are any
    meshes: list[Mesh] = field(default_factory=list)
    groups: dict[str, list[Any]] = field(default_factory=dict)  # of torch.distributed, made for the mesh of that handle


_world: World | None = None


def current() -> World | None:
    return _world


def add_mesh(plan: Plan) -> Mesh:
    """The steps of init, with a fault's point after each; what one rank fails in is told to all. Collective over the ranks of the mesh,
    and where there is no job yet, over all ranks."""
    global _world
    rank, size = rendezvous.world()
    joined = _world
    strikes = faults.read(rank, size) if joined is None else []
    meeting = Meeting(rank, tuple(range(size)) if joined is None else plan.ranks, plan.timeout)
    jobs: list[native.Job] = [] if joined is None else [joined.job]
    made_group, links = False, None
    try:
        faults.at("init.start")
        hosts = meeting.arrive()
        plan = _ordered(plan, hosts if joined is None else joined.hosts, rank)
        faults.at("init.arrive")
        several = joined is None and len(hosts) > 1
        if several:
            agree_on_network(meeting)
            try_all_ways(meeting, hosts)
        if joined is None:
            meeting.exchange("before group", None)  # Gloo cannot be asked to stop: nobody enters it whose peers are not all alive
            made_group = meeting.during("group", partial(rendezvous.make_process_group, plan.device, meeting.store))
        faults.at("init.group")
        engine = choose_engine() if several else None
        id = _agree(meeting, plan, hosts, jobs, engine)
        if engine is not None:
            links = Links(meeting, hosts, jobs[0], engine.name)
        place = joined.device if joined is not None else use_gpu(jobs[0]) if plan.device == "cuda" else torch.device("cpu")
        faults.at("init.join")
        meeting.exchange("before mesh", None)
        device_mesh = plan.device_mesh
        groups: list[Any] = []
        if device_mesh is None:
            device_mesh, groups = meeting.during("mesh", partial(_device_mesh, place, plan, size))
        link = plan.link or (0.0, 0.0)
        made = Mesh(plan.axes, plan.ranks, jobs[0], id, device_mesh, place, plan.timeout, plan.source, plan.slices, link)
        faults.at("init.mesh")
        meeting.exchange("made", None)
    except BaseException as error:
        meeting.fail(error)
        if joined is None:
            backward_as_before()
        for job in jobs:
            # what all ranks of the mesh have seen alike leaves the job, and its other meshes, as they are
            if not isinstance(error, PeerDied | PeerStalled) and not hasattr(error, "seen_by_all"):
                job.fail(rank, f"rank {rank} raised {type(error).__name__} in gingham.init: {error}")
        if links is not None:
            links.close(0.5)
        if made_group:
            rendezvous.destroy_process_group()
        raise
    finally:
        meeting.close()
    if joined is None:
        jobs[0].inject(strikes)
        joined = _world = World(jobs[0], place, made_group, hosts, links)
    joined.meshes.append(made)
    joined.groups[made.handle] = groups
    return made


def _agree(meeting: Meeting, plan: Plan, hosts: list[Host], jobs: list[native.Job], engine: Choice | None) -> int:
    """The number of the mesh's program. Joins the job, where there is none yet: memory made by the first rank of each host and mapped by
    the others on it, once all agree on the meshes and the version."""
    rank, first = meeting.rank, not jobs
    host = next((host for host in hosts if rank in host.ranks), hosts[0])
    if first and rank == host.ranks[0]:
        jobs.append(native.Job(rank, meeting.size, "", plan.timeout, plan.heap or 0, host.ranks))
    memory = (jobs[0].path, jobs[0].nonce) if jobs else ("", 0)
    number = rendezvous.next_number(meeting.store) if rank == plan.ranks[0] else 0
    mine = (plan.job_words() + ("" if engine is None else engine.words()), plan.words(), list(plan.ranks), memory, number)
    told = dict(zip(meeting.ranks, meeting.exchange("described", mine), strict=True))
    _compare(rank, plan, {each: (words, mesh, tuple(ranks)) for each, (words, mesh, ranks, *_) in told.items()})
    if first and not jobs:
        jobs.append(_joined(rank, meeting.size, host, told[host.ranks[0]][3], plan.timeout))
    if first:
        meeting.during("joined", partial(jobs[0].ready, meeting.pids), jobs[0].fail)
        _warn_unwatched(jobs[0])
    return int(told[plan.ranks[0]][4])


def _ordered(plan: Plan, hosts: list[Host], rank: int) -> Plan:
    """The plan with its ranks in the best order for the hosts where any will do; else a warning where another one would cross less."""
    if len(hosts) == 1:
        return plan
    number_of = host_numbers(hosts)
    grid = GridShape(plan.axes)
    places, least, now = best_order(grid, [number_of[each] for each in plan.ranks], plan.operands or (1, 1, 1))
    better = tuple(plan.ranks[place] for place in places)
    if plan.operands is not None:
        return replace(plan, ranks=better)
    if now > 0 and now >= WORSE * least and rank == plan.ranks[0]:
        words, size, shape = 1 << 20, grid.size, " x ".join(f"{name}={size}" for name, size in grid.sizes.items())
        warnings.warn(
            f"gingham.init: {shape} on {', '.join(map(str, hosts))}: with ranks={better} another axis lies inside the hosts, and"
            f" {least * words * 4 // size:,} bytes a rank cross from host to host where {now * words * 4 // size:,} do now (two products of"
            " operands of 4 MB a rank, forward and backward); see docs/hosts.md",
            stacklevel=5,
        )
    return plan


def _joined(rank: int, size: int, host: Host, memory: tuple[str, int], timeout: float) -> native.Job:
    """The job in the memory that the first rank of the host has made: its path and nonce."""
    path, nonce = memory
    try:
        return native.Job(rank, size, path, timeout, 0, host.ranks, nonce)
    except MeshError as error:
        raise MeshError(
            f"rank {rank}: by what they say, {host} is one host, but rank {rank} cannot share the memory of rank {host.ranks[0]}: {error}."
            f" Ranks of one host run as one user in one PID namespace; to others, as on two machines or in two containers, give another"
            f" name each with {VARIABLE}"
        ) from error


def _compare(rank: int, plan: Plan, told: dict[int, tuple[str, str, tuple[int, ...]]]) -> None:
    """Raises MeshError, on every rank alike, where ranks differ in what they ask of init."""
    odd, usual = odd_ranks([words for words, *_ in told.values()], list(told))
    if odd:
        raise seen_by_all(MeshError(f"ranks {odd} called init differently: {told[odd[0]][0]}; the others: {usual}"))
    for first, (_, _, ranks) in told.items():
        strange = [other for other in ranks if other not in told or told[other][2] != ranks]
        if strange:
            theirs = f"{list(told[strange[0]][2])}" if strange[0] in told else "none"
            raise seen_by_all(
                MeshError(
                    f"gingham.init: rank {first} makes a mesh of ranks {list(ranks)}, but rank {strange[0]}, one of them, makes one of"
                    f" {theirs}; the ranks of a mesh must name the same ones in the same order"
                )
            )
        odd, usual = odd_ranks([told[other][1] for other in ranks], ranks)
        if odd:
            raise seen_by_all(MeshError(f"ranks {odd} called init differently: {told[odd[0]][1]}; the others: {usual}"))


def _warn_unwatched(job: native.Job) -> None:
    if not job.watches:
        warnings.warn(
            f"gingham.init on rank {job.rank}: the system forbids pidfd_open, or lacks it (a container's seccomp filter, Linux before 5.3);"
            " deaths of other ranks are seen by asking for their pids instead. Allow pidfd_open to be told by the kernel",
            stacklevel=5,
        )


def _device_mesh(place: torch.device, plan: Plan, world: int) -> tuple[DeviceMesh, list[Any]]:
    """torch's mesh, and the groups made for it; in a thread of its own, whose current GPU is another's."""
    if place.type == "cuda":
        torch.cuda.set_device(place)
    sizes, names = plan.axes.sizes, tuple(plan.axes.sizes)
    shape = torch.tensor(plan.ranks, device="cpu").view(*sizes.values())
    if plan.ranks == tuple(range(world)):
        return DeviceMesh(place.type, shape, mesh_dim_names=names), []
    # torch makes groups with all ranks of the world, of which the others may make another mesh now, or none
    coordinates = coordinates_of(plan.ranks.index(dist.get_rank()), sizes)
    lines = [[plan.ranks[each] for each in members((name,), sizes, coordinates)] for name in names]
    groups = [dist.new_group(line, use_local_synchronization=True) for line in lines]
    return DeviceMesh.from_group(groups, place.type, mesh=shape, mesh_dim_names=names), groups


def end(ended: Sequence[Mesh]) -> None:
    """Ends meshes, and with the last one the job, and the process group if init made it."""
    global _world
    for each in ended:
        each.ended = True
    if _world is None or not ended:
        return
    _world.meshes = [each for each in _world.meshes if not each.ended]
    if _world.job.orphaned:  # a forked process has the meshes of its rank and nothing to end
        return
    for each in ended:
        each.close()
    if not _world.meshes:
        _world.job.close()
    for each in ended:
        if each.sums is not None:
            each.sums.stop()
        groups = _world.groups.pop(each.handle, [])
        # DTensor takes equal meshes for one: tensors of the other may hold this one's groups
        heir = next((other for other in _world.meshes if other.device_mesh == each.device_mesh), None)
        if heir is not None:
            _world.groups[heir.handle] += groups
            continue
        for group in groups:
            dist.destroy_process_group(group)
    if not _world.meshes:
        if _world.links is not None:
            _world.links.close()
        if _world.made_group:
            rendezvous.destroy_process_group()
            for each in ended:
                # DTensor and dynamo remember meshes for ever, and a mesh its groups, whose threads wake 100 times a second each
                getattr(each.device_mesh, "_pg_registry", {}).clear()
        backward_as_before()
        _world = None
    # DTensor keeps what it has planned for a mesh with that mesh, and gives it to any equal one: that of a later life has other groups, by
    # names that nothing has any more, or another group
    dtensor_debug._clear_sharding_prop_cache()
    # process groups, their threads and sockets hang in reference cycles: many lives must not pile them up
    gc.collect()


def report_failure(text: str) -> None:
    """Tells the other ranks what became of this one."""
    if _world is not None:
        _world.job.fail(_world.job.rank, text)
    else:
        rendezvous.tell_gone(os.environ.get("GINGHAM_STORE", ""), rendezvous.world()[0], text)
