"""Messages between stages on several hosts, by torch.distributed's send and recv, whose tags are the wire's.

The first of a shape is preceded by a message that tells it (dims and dtype); both sides remember it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Sequence
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from .. import native
from ..errors import MeshError
from ..mesh import Mesh

LOOK = 0.02  # seconds between two looks at the job
NEWS = 2.0  # seconds in which the job says who died after a connection has failed
DIMS = 8
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.bool, torch.uint8)
DOING = "a message between stages of a pipeline, from or to another host"


class ByMessages:
    """Of one rank; ranks: the job's, by place."""

    def __init__(self, mesh: Mesh, ranks: Sequence[int]) -> None:
        whole = mesh.whole
        assert whole is not None
        self.mesh, self.program, self.ranks = mesh, whole.program, ranks
        self.members = [whole.ranks.index(rank) for rank in ranks]
        self.known: dict[Hashable, tuple[tuple[int, ...], torch.dtype]] = {}
        self.told: dict[Hashable, tuple[tuple[int, ...], torch.dtype]] = {}  # by place and key, what a header said that was sent
        self.asked: set[Hashable] = set()  # places and keys whose header was asked for
        self._queue: SimpleQueue[tuple[Any, native.Flag, list[BaseException]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def tell(self, x: torch.Tensor, place: int, tag: int, key: Hashable) -> list[Any]:
        """The shape of a message, where it is not known yet. Returns what await_gone takes."""
        posted, now = [], (tuple(x.shape), x.dtype)
        said = self.told.get((place, key))
        if said is None:
            header = _header(x)
            posted.append((self._work(dist.isend, header, place, 2 * tag + 1), header, place))
            self.told[place, key] = now
        elif said != now:
            raise MeshError(
                f"pipeline: rank {self.mesh.rank} sends {now[0]} of {now[1]} to rank {self.ranks[place]}, on another host, where the same"
                f" inputs gave {said[0]} of {said[1]} before; after a change of a layer's outputs make the pipeline anew"
            )
        return posted

    def hear(self, place: int, tag: int, key: Hashable) -> tuple[tuple[int, ...], torch.dtype]:
        """What `tell` tells; both ends ask for the messages of a key in the same order."""
        if (place, key) not in self.known:
            header = torch.empty(DIMS + 2, dtype=torch.int64, device="cpu")
            self._wait(self._work(dist.irecv, header, place, 2 * tag + 1), place)
            self._learn(place, key, header)
        return self.known[place, key]

    def send(self, x: torch.Tensor, place: int, tag: int, key: Hashable) -> Any:
        return [*self.tell(x, place, tag, key), (self._work(dist.isend, x, place, 2 * tag), x, place)]

    def await_gone(self, sent: Any) -> None:
        for work, _, place in sent:
            self._wait(work, place)

    def receive(self, place: int, tag: int, key: Hashable) -> Any:
        if (place, key) in self.known:
            return self._begin(place, tag, key)
        if (place, key) in self.asked:
            return place, tag, key, None, None  # the header of an earlier one is on its way
        self.asked.add((place, key))
        header = torch.empty(DIMS + 2, dtype=torch.int64, device="cpu")
        return place, tag, key, self._work(dist.irecv, header, place, 2 * tag + 1), header

    def wait(self, begun: Any) -> torch.Tensor:
        place, tag, key, work, x = begun
        if work is None:
            return self.wait(self._begin(place, tag, key))
        self._wait(work, place)
        if (place, key) not in self.known:
            self._learn(place, key, x)
            return self.wait(self._begin(place, tag, key))
        return x  # type: ignore[no-any-return]

    def _learn(self, place: int, key: Hashable, header: torch.Tensor) -> None:
        count, kind, *dims = header.tolist()
        self.known[place, key] = tuple(dims[:count]), DTYPES[kind]

    def _begin(self, place: int, tag: int, key: Hashable) -> Any:
        shape, dtype = self.known[place, key]
        x = self.mesh.empty(shape, dtype)
        return place, tag, key, self._work(dist.irecv, x, place, 2 * tag), x

    def _work(self, post: Any, x: torch.Tensor, place: int, tag: int) -> Any:
        try:
            return post(x, self.ranks[place], tag=tag)
        except RuntimeError as error:
            self._failed(error, place)

    def _wait(self, work: Any, place: int) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gingham pipeline", daemon=True)
            self._thread.start()
        done, errors = native.Flag(), list[BaseException]()
        self._queue.put((work, done, errors))
        done.wait(self.program, self.members[place], DOING)
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
            self.program.hear()
            time.sleep(LOOK)
        raise MeshError(f"pipeline: rank {self.mesh.rank} lost its connection to rank {self.ranks[place]}: {error}") from error


def _header(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([x.dim(), DTYPES.index(x.dtype), *x.shape, *[0] * (DIMS - x.dim())], device="cpu")
