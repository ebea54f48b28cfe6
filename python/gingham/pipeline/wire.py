"""Tensors between the ranks of neighbouring stages at the same place of their meshes, by torch.distributed's send and recv.

Each has a tag of its own, so that no order of posting matters. The first of a shape is preceded by a message that tells it (dims and
dtype); both sides remember it. A rank that waits looks at the job meanwhile: a death anywhere is told within a second, and a rank that
sends nothing for the mesh's timeout is PeerStalled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from ..errors import MeshError, PeerStalled
from ..launch import world
from ..launch.hosts import host_numbers
from ..mesh import Mesh

LOOK = 0.02  # seconds between two looks at the job while a message is waited for
NEWS = 2.0  # seconds in which the job says who died after a connection has failed
GRACE = 1.0  # seconds beyond the timeout in which the stage that is waited for may name who it waits for itself
DIMS = 8
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool, torch.uint8)


class Wire:
    """Of one rank; `stages`: the job's rank at this one's place in each pipeline rank."""

    def __init__(self, mesh: Mesh, ranks: list[int], parts: int) -> None:
        self.mesh, self.ranks, self.parts = mesh, ranks, parts
        job = world.current()
        assert job is not None
        host_of = host_numbers(job.hosts)
        self.elsewhere = [host_of[rank] != host_of[mesh.rank] for rank in ranks]
        if len(job.hosts) > 1:
            mesh.borders.setdefault("bytes_crossed", 0)
        self.known: dict[Hashable, tuple[tuple[int, ...], torch.dtype]] = {}
        self.told: set[Hashable] = set()  # keys whose header was sent
        self.asked: set[Hashable] = set()  # or asked for
        self.sent: dict[int, tuple[Any, torch.Tensor, int]] = {}  # by tag: what must live until it has gone
        self._queue: SimpleQueue[tuple[Any, threading.Event, list[BaseException]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, x: torch.Tensor, place: int, tag: int, key: Hashable) -> None:
        """To a pipeline rank. key: what the shape follows from, which both sides know."""
        x = x.detach().contiguous()
        if key not in self.told:
            self._post(dist.isend, _header(x, self.mesh), place, 2 * tag + 1)
            self.told.add(key)
        self._post(dist.isend, x, place, 2 * tag)
        self.count(place, sent=x)

    def receive(self, place: int, tag: int, key: Hashable) -> Any:
        """Begins to receive what a pipeline rank sends; `wait` of the result gives the tensor."""
        if key in self.known:
            return self._begin(place, tag, key)
        if key in self.asked:
            return place, tag, key, None, None  # the header of an earlier one is on its way
        self.asked.add(key)
        header = torch.empty(DIMS + 2, dtype=torch.int64, device=self.mesh.device)
        return place, tag, key, self._work(dist.irecv, header, place, 2 * tag + 1), header

    def wait(self, begun: Any) -> torch.Tensor:
        place, tag, key, work, x = begun
        if work is None:
            return self.wait(self._begin(place, tag, key))
        self._wait(work, place)
        if key not in self.known:
            count, kind, *dims = x.tolist()
            self.known[key] = tuple(dims[:count]), DTYPES[kind]
            return self.wait(self._begin(place, tag, key))
        self.count(place, received=x)
        return x  # type: ignore[no-any-return]

    def count(self, place: int, sent: torch.Tensor | None = None, received: torch.Tensor | None = None) -> None:
        """What went to a pipeline rank, or came from it."""
        borders = self.mesh.borders
        if sent is not None:
            borders["bytes_sent"] += sent.numel() * sent.element_size()
        if received is not None:
            size = received.numel() * received.element_size()
            borders["bytes_received"] += size
            borders["messages"] += 1
            if self.elsewhere[place]:
                borders["bytes_crossed"] += size

    def finish(self) -> None:
        """Waits until all that was sent has gone."""
        for tag in list(self.sent):
            self._release(tag)

    def answered(self, tag: int) -> None:
        """What was sent under a tag has come, as something that came back tells."""
        self._release(2 * tag)

    def _release(self, tag: int) -> None:
        if tag in self.sent:
            work, _, place = self.sent.pop(tag)
            self._wait(work, place)

    def _begin(self, place: int, tag: int, key: Hashable) -> Any:
        shape, dtype = self.known[key]
        x = self.mesh.empty(shape, dtype)
        return place, tag, key, self._work(dist.irecv, x, place, 2 * tag), x

    def _post(self, post: Any, x: torch.Tensor, place: int, tag: int) -> None:
        self.sent[tag] = self._work(post, x, place, tag), x, place

    def _work(self, post: Any, x: torch.Tensor, place: int, tag: int) -> Any:
        try:
            return post(x, self.ranks[place], tag=tag)
        except RuntimeError as error:
            self._failed(error, place)

    def _wait(self, work: Any, place: int) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gingham pipeline", daemon=True)
            self._thread.start()
        done, errors = threading.Event(), list[BaseException]()
        self._queue.put((work, done, errors))
        begun, noted = time.monotonic(), False
        while not done.wait(LOOK):
            self.mesh.program.hear()
            waited = time.monotonic() - begun
            if waited > self.mesh.timeout / 2 and not noted:
                _store().set(_waits(self.mesh.rank), str(self.ranks[place]))
                noted = True
            if waited > self.mesh.timeout + GRACE:
                self._stalled(place)
        if noted:
            _store().delete_key(_waits(self.mesh.rank))
        if errors:
            self._failed(errors[0], place)

    def _run(self) -> None:
        while True:
            work, done, errors = self._queue.get()
            try:
                work.wait()
            except BaseException as error:
                errors.append(error)
            done.set()

    def _failed(self, error: BaseException, place: int) -> Any:
        until = time.monotonic() + NEWS
        while time.monotonic() < until:
            self.mesh.program.hear()
            time.sleep(LOOK)
        raise MeshError(f"pipeline: rank {self.mesh.rank} lost its connection to rank {self.ranks[place]}: {error}") from error

    def _stalled(self, place: int) -> None:
        """Names the rank at the end of those that wait for each other."""
        chain = [self.mesh.rank, self.ranks[place]]
        while _store().check([_waits(chain[-1])]):
            chain.append(int(_store().get(_waits(chain[-1]))))
            if chain[-1] in chain[:-1]:
                break
        rank = chain[-1]
        error = PeerStalled(
            f"pipeline: rank {rank} has sent nothing for {self.mesh.timeout:g} s, the timeout of init: its stage, or what it waits for"
            f" (a data loader?), is slow or stuck; waiting: {' for '.join(f'rank {each}' for each in chain)}"
        )
        error.rank = rank
        raise error


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _waits(rank: int) -> str:
    return f"gingham pipeline waits {rank}"


def _header(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    if x.dim() > DIMS or x.dtype not in DTYPES:
        raise MeshError(f"pipeline: a tensor of {x.dim()} dims and {x.dtype} between stages; expected at most {DIMS} dims")
    return torch.tensor([x.dim(), DTYPES.index(x.dtype), *x.shape, *[0] * (DIMS - x.dim())], device=mesh.device)
