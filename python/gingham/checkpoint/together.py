"""What the ranks of a job do together while they save or load: every rank's error is every rank's error, and a peer that
dies is named within a second, however long the others' disks take."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..errors import MeshError, PeerDied, PeerStalled
from ..launch import faults
from ..mesh import Mesh, mesh_among, mesh_of
from ..mesh.carried import on_host

BEAT = 1.0  # seconds between signs of life while a rank works; far below the timeout after which a peer counts as stalled


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: says which rank, which key, what it got and what it expected."""


class Ranks:
    """The ranks of the mesh on which tensors of `of` stand, else of gingham.init's, or this process alone where there is none; where
    torch's FSDP2 cuts them over further ranks, those too (`wide`, its DeviceMesh), which torch.distributed joins. Raises MeshError for a
    rank of several that only believes to be alone, whose part would pass for the whole: `what` is about to be done, `writes`: it leaves
    files."""

    def __init__(self, what: str, writes: bool = False, of: Iterable[Any] = ()) -> None:
        of = list(of)
        self.what, self._point = what, "save" if writes else "load"
        self.mesh = mesh_among(what, of)
        if self.mesh is not None and self.mesh.whole is not None:  # all stages of a pipeline save and load together
            self.mesh = self.mesh.whole
        self.rank, self.size = (self.mesh.index, self.mesh.size) if self.mesh is not None else (0, 1)
        self.named: Sequence[int] = (0,) if self.mesh is None else self.mesh.ranks
        self.wide = wider(of, self.mesh)
        if self.wide is not None:
            self.size, self.named = self.wide.size(), self.wide.mesh.flatten().tolist()
            self.rank = self.named.index(dist.get_rank())
        if self.mesh is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise MeshError(f"{what}: {dist.get_world_size()} ranks without a mesh: call gingham.init(...) before saving or loading")
        world = os.environ.get("WORLD_SIZE", "1")
        if writes and world.isdecimal() and int(world) > self.size and (self.mesh is None or self.mesh.job.size < int(world)):
            raise MeshError(
                f"{what}: rank {os.environ.get('RANK', '?')} of {world} (WORLD_SIZE) would write alone, as each of the others: expected a"
                f" mesh of {world} ranks, got {'none' if self.mesh is None else f'one of {self.size}'}; call it between gingham.init(...)"
                " and gingham.destroy(), or unset WORLD_SIZE where this process is alone"
            )

    def tell(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; pickled, so it may be anything. Not counted as traffic."""
        if self.mesh is None or self.size == 1:
            return [value]
        if self.wide is not None:
            return self._told_widely(value)
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self.mesh.device)
        return [pickle.loads(on_host(self.mesh, part).numpy().tobytes()) for part in self._gather(mine)]

    def _told_widely(self, value: Any) -> list[Any]:
        """`tell`, dim by dim of the DeviceMesh, the last first."""
        assert self.wide is not None
        found = [value]
        for dim in reversed(range(self.wide.ndim)):
            parts: list[Any] = [None] * self.wide.size(dim)
            try:
                dist.all_gather_object(parts, found, group=self.wide.get_group(dim))
            except RuntimeError as error:
                raise CheckpointError(
                    f"{self.what}: rank {dist.get_rank()} heard nothing from a rank of {self.wide} ({error}); every rank of it must call it"
                ) from error
            found = [each for part in parts for each in part]
        return found

    def _gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's bytes. An error that a rank elsewhere causes says that all must be here."""
        assert self.mesh is not None
        try:
            return self.mesh.world.all_gather(mine, counted=False)
        except (MeshError, PeerDied, PeerStalled) as error:
            error.args = (f"{error} ({self.what}: every rank of the mesh must call it, also those that hold or write nothing)",)
            raise

    def together(self, what: str, work: Callable[[], Any]) -> list[Any]:
        """work() on every rank, their results in rank order. Where any raises, all raise CheckpointError naming it."""
        outcome: list[Any] = [None, None]
        failed: list[Exception] = []

        def run() -> None:
            try:
                faults.at(self._point)
                outcome[0] = work()
            except Exception as error:
                failed.append(error)
                outcome[1] = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"

        if self.size == 1:
            run()
        else:
            self._beside(run)
        outcomes = self.tell(outcome)
        errors = {rank: error for rank, (_, error) in enumerate(outcomes) if error is not None}
        if errors:
            said = "; ".join(f"rank {self.named[rank]}: {error}" for rank, error in errors.items() if error != errors.get(rank - 1))
            raise CheckpointError(f"{what}: {said}") from (failed[0] if failed else None)
        return [value for value, _ in outcomes]

    def first(self, what: str, work: Callable[[], Any]) -> Any:
        """work() on rank 0 alone; its result on every rank."""
        return self.together(what, work if self.rank == 0 else lambda: None)[0]

    def _beside(self, run: Callable[[], None]) -> None:
        """run() on a thread, while this one exchanges a sign of life with the other ranks until all are done."""
        done = threading.Event()

        def run_and_say() -> None:
            run()
            done.set()

        threading.Thread(target=run_and_say, name="gingham checkpoint", daemon=True).start()
        while True:
            done.wait(BEAT)
            if all(self.tell(done.is_set())):
                return


def wider(of: Iterable[Any], mesh: Mesh | None) -> DeviceMesh | None:
    """The DeviceMesh on which FSDP2 cuts tensors of a model of the mesh over more ranks than the mesh has."""
    found = {id(each.device_mesh): each.device_mesh for each in of if isinstance(each, DTensor) and mesh_of(each) is None}
    wide = [each for each in found.values() if mesh is not None and each.size() > mesh.size and _has_groups(each)]
    wide = [each for each in wide if mesh is not None and set(mesh.ranks) <= set(each.mesh.flatten().tolist())]
    if any(each.mesh.tolist() != wide[0].mesh.tolist() for each in wide):
        raise MeshError(f"parameters of one model lie on several meshes of torch's, {wide[0]} and others: wrap all with one mesh")
    return wide[0] if wide else None


def _has_groups(mesh: DeviceMesh) -> bool:
    """Whether its ranks can still talk: those of a mesh of gingham's that has ended cannot."""
    try:
        return all(mesh.get_group(dim) is not None for dim in range(mesh.ndim))
    except (RuntimeError, ValueError):
        return False
