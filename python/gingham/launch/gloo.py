"""The engine between hosts over torch's Gloo, which every user has: the core hands its messages to threads of Python.

A message is a frame of 4104 bytes, its size in 8 and its first 4096, then the rest of it in place. The size comes first
because Gloo itself delivers a shorter message in silence and ends the process for a longer one. Gloo's work is over only
through wait(), so each (peer, tag, direction) has a thread, made when it is first used, that sleeps there without the GIL;
one more for each peer waits for its goodbye, and so hears of its death while nothing is under way.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from .. import native
from ..errors import MeshError

_HEADER, _FIRST = 8, 4096
_GOODBYE = (1 << 31) - 1  # Gloo's tag of it; tags of messages are smaller
_FOR_EVER = timedelta(days=365)  # a slow peer is no error: who waits for the message has a limit of its own
_LONG = 3600.0  # seconds of a thread's sleep between two looks whether the engine is closing


def gloo_group(ranks: Sequence[int], timeout: float) -> dist.ProcessGroup:
    """A group of its own for GlooEngine, made by these ranks alone; timeout: seconds for them to connect.

    Raises MeshError where they do not, with what Gloo said and the interface that it used.
    """
    try:
        return dist.new_group(list(ranks), timeout=timedelta(seconds=timeout), backend="gloo", use_local_synchronization=True)
    except RuntimeError as error:
        interface = os.environ.get("GLOO_SOCKET_IFNAME") or "the one that this host's name resolves to"
        raise MeshError(
            f"rank {dist.get_rank()}: Gloo does not connect ranks {list(ranks)} (interface: {interface}): {_reason(error)}; set"
            " GLOO_SOCKET_IFNAME to the interface on which the hosts reach each other"
        ) from error


class GlooEngine:
    """`engine`, of the core, served over `group`, whose ranks are `ranks` of the job in the group's order."""

    def __init__(self, rank: int, ranks: Sequence[int], group: dist.ProcessGroup) -> None:
        self.engine = native.handed_engine(rank, "gloo")
        self._group = group
        self._place = {peer: at for at, peer in enumerate(ranks)}
        self._peers = [peer for peer in ranks if peer != rank]
        self._greeted: set[int] = set()  # who was told goodbye
        self._farewells: list[tuple[torch.Tensor, dist.Work]] = []  # Gloo forgets a message whose work is dropped
        self._lock = threading.Lock()
        self._lanes: list[threading.Thread] = []
        self.engine.connect(dict.fromkeys(self._peers, b""))
        self._goodbyes = {peer: self._start(f"goodbye-{peer}", self._await_goodbye, peer) for peer in self._peers}
        self._opener = self._start("lanes", self._open_lanes)
        atexit.register(self.close, 0.0)

    def close(self, seconds: float = 5.0) -> None:
        """Tells all peers, waits at most `seconds` for their answers and for messages under way, and ends the group."""
        if self.engine.closing:
            return
        end = time.monotonic() + seconds
        self.engine.close()
        self._opener.join()
        for lane in self._lanes:
            lane.join(max(0.0, end - time.monotonic()))
        for peer in self._peers:
            self._say_goodbye(peer)
        for thread in self._goodbyes.values():
            thread.join(max(0.0, end - time.monotonic()))
        atexit.unregister(self.close)
        if not any(thread.is_alive() for thread in [*self._lanes, *self._goodbyes.values()]):
            dist.destroy_process_group(self._group)

    def _start(self, name: str, work: object, *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, name=f"gingham-gloo-{name}", daemon=True)  # type: ignore[arg-type]
        thread.start()
        return thread

    def _move(self, data: torch.Tensor, peer: int, tag: int, receives: bool) -> None:
        """One message of Gloo, until it is over; RuntimeError where the connection breaks."""
        moved = (self._group.recv if receives else self._group.send)([data], self._place[peer], tag)
        if not moved.wait(_FOR_EVER):
            raise RuntimeError("Gloo gave the message up")

    def _say_goodbye(self, peer: int) -> None:
        with self._lock:
            if peer in self._greeted:
                return
            self._greeted.add(peer)
        word = torch.zeros(1, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):  # a peer that is gone hears nothing
            self._farewells.append((word, self._group.send([word], self._place[peer], _GOODBYE)))

    def _await_goodbye(self, peer: int) -> None:
        """The peer's goodbye is answered at once, so that it need not wait for this rank's own end."""
        try:
            self._move(torch.zeros(1, dtype=torch.uint8), peer, _GOODBYE, True)
            self.engine.set_left(peer)
            self._say_goodbye(peer)
        except RuntimeError as error:
            self.engine.set_failure(peer, _reason(error))

    def _open_lanes(self) -> None:
        while not self.engine.closing:
            lane = self.engine.take_lane(_LONG)
            if lane is not None:
                peer, tag, receives = lane
                self._lanes.append(self._start(f"{peer}-{tag}", self._receive if receives else self._send, peer, tag))

    def _send(self, peer: int, tag: int) -> None:
        frame = torch.zeros(_HEADER + _FIRST, dtype=torch.uint8)
        while (work := self.engine.take(peer, tag, False, _LONG)) is not None or not self.engine.closing:
            if work is None:
                continue
            ticket, data, size = work
            ctypes.c_uint64.from_address(frame.data_ptr()).value = size
            ctypes.memmove(frame.data_ptr() + _HEADER, data, min(size, _FIRST))
            try:
                if size <= _FIRST:  # the frame holds all of it
                    self.engine.ended(ticket, size)
                self._move(frame, peer, tag, False)
                if size > _FIRST:
                    self._move(_memory(data + _FIRST, size - _FIRST), peer, tag, False)
                    self.engine.ended(ticket, size)
            except RuntimeError as error:
                self._broke(peer, error)
                if size > _FIRST:
                    self.engine.ended(ticket, 0, _reason(error))

    def _receive(self, peer: int, tag: int) -> None:
        frame = torch.zeros(_HEADER + _FIRST, dtype=torch.uint8)
        while self.engine.await_work(peer, tag, True, _LONG) or not self.engine.closing:
            broken = ""
            try:
                self._move(frame, peer, tag, True)
            except RuntimeError as error:
                broken = _reason(error)
                self._broke(peer, error)
            work = self.engine.take(peer, tag, True, _LONG)  # another one where the first was withdrawn
            while work is None and not self.engine.closing:
                work = self.engine.take(peer, tag, True, _LONG)
            if work is None:
                return
            self._finish(peer, tag, work, frame, broken)

    def _finish(self, peer: int, tag: int, work: tuple[int, int, int], frame: torch.Tensor, broken: str) -> None:
        """The rest of a message whose frame is here; that of another size than expected is read, and dropped."""
        ticket, data, size = work
        got = ctypes.c_uint64.from_address(frame.data_ptr()).value
        try:
            if not broken and got == size:
                ctypes.memmove(data, frame.data_ptr() + _HEADER, min(size, _FIRST))
            if not broken and got > _FIRST:
                there = _memory(data + _FIRST, size - _FIRST) if got == size else torch.empty(got - _FIRST, dtype=torch.uint8)
                self._move(there, peer, tag, True)
        except RuntimeError as error:
            broken = _reason(error)
            self._broke(peer, error)
        self.engine.ended(ticket, got, broken)

    def _broke(self, peer: int, error: RuntimeError) -> None:
        self.engine.set_failure(peer, _reason(error))


def _memory(address: int, size: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)


def _reason(error: RuntimeError) -> str:
    """Gloo's words without the place in its sources and its advice."""
    text = re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", str(error))
    return re.split(r"\. This is typically|\n", text)[0].strip()
