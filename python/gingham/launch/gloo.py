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
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .. import native
from ..errors import MeshError

_HEADER, _FIRST = 8, 4096
_GOODBYE = (1 << 31) - 1  # Gloo's tag of it; tags of messages are smaller
_FOR_EVER = timedelta(days=365)  # a slow peer is no error: who waits for the message has a limit of its own
_copy = ctypes.PyDLL(None).memmove  # keeps the GIL, which a thread that runs bytecode would else hold for 5 ms
_copy.argtypes, _copy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
_PATIENCE, _LOOK = 1.0, 0.5  # seconds
_LONG = 3600.0  # seconds of a thread's sleep between two looks whether the engine is closing


def gloo_backend(rank: int, ranks: Sequence[int], store: dist.Store, timeout: float, interface: str = "") -> tuple[Any, list[int]]:
    """Gloo's connections of these ranks alone, outside of torch.distributed's groups, whose names and keys come again in a later life;
    and the epoll descriptors that it has made for them.

    store: nothing else uses its keys; timeout: seconds for all to connect. interface: such as "eth0"; "" is
    GLOO_SOCKET_IFNAME's, or the one that the host's name resolves to. Raises MeshError where they do not connect.
    """
    interface = interface or os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=timeout)
    options._threads = 1
    before = _epolls()
    try:
        options._devices = [gloo.create_device(interface=interface) if interface else gloo.create_default_device()]
        made = gloo(store, list(ranks).index(rank), len(ranks), options)
    except RuntimeError as error:
        raise MeshError(
            f"rank {rank}: Gloo does not connect ranks {list(ranks)} over {interface or 'the interface of this host name'}:"
            f" {_reason(error)}; set GLOO_SOCKET_IFNAME to the interface on which the hosts reach each other"
        ) from error
    loops = sorted(_epolls() - before)
    if not loops:
        raise MeshError(f"rank {rank}: Gloo has made no epoll descriptor, so a cut link would not be noticed; choose UCX")
    return made, loops


def _epolls() -> set[int]:
    """This process's epoll descriptors."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                found.add(int(name))
    return found


class GlooEngine:
    """`engine`, of the core, served over `group`, in which `ranks` of the job have their places."""

    def __init__(self, rank: int, ranks: Sequence[int], group: Any, loops: Sequence[int]) -> None:
        self.engine = native.handed_engine(rank, "gloo")
        self._group: Any = group
        self._loops = loops
        self._silenced = float("-inf")  # when a link was last found silent, on the monotonic clock
        self._pid = os.getpid()
        self._place = {peer: at for at, peer in enumerate(ranks)}
        self._peers = [peer for peer in ranks if peer != rank]
        self._greeted: set[int] = set()  # who was told goodbye
        self._farewells: list[tuple[torch.Tensor, dist.Work]] = []  # Gloo forgets a message whose work is dropped
        self._lock = threading.Condition()
        self._under_way: Counter[int] = Counter()  # messages of each peer that Gloo has
        self._lanes: list[threading.Thread] = []
        self.engine.connect(dict.fromkeys(self._peers, b""))
        self._goodbyes = {peer: self._start(f"goodbye-{peer}", self._await_goodbye, peer) for peer in self._peers}
        self._opener = self._start("lanes", self._open_lanes)
        atexit.register(self.close, 0.0)

    def close(self, seconds: float = 5.0) -> None:
        """Tells all peers, waits at most `seconds` for their answers and for messages under way, and breaks off the rest."""
        if os.getpid() != self._pid or self.engine.closing:  # a forked child has none of the threads
            return
        end = time.monotonic() + seconds
        self.engine.close()
        self._opener.join()
        for lane in self._lanes:
            lane.join(max(0.0, end - time.monotonic()))
        for peer in self._peers:
            self._say_goodbye(peer)
        threads = [*self._lanes, *self._goodbyes.values()]
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in threads):  # a thread that wakes while Python ends would take the process along
            for loop in self._loops:
                native.shut_links(loop)
            for thread in threads:
                thread.join(_PATIENCE)
        atexit.unregister(self.close)
        if not any(thread.is_alive() for thread in threads):
            self._farewells.clear()
            self._group = None  # closes its connections

    def _start(self, name: str, work: object, *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, name=f"gingham-gloo-{name}", daemon=True)  # type: ignore[arg-type]
        thread.start()
        return thread

    def _move(self, data: torch.Tensor, peer: int, tag: int, receives: bool) -> None:
        """One message of Gloo, until it is over; RuntimeError where the connection breaks."""
        group = self._open_group()
        with self._lock:
            self._under_way[peer] += 1
        try:
            moved = (group.recv if receives else group.send)([data], self._place[peer], tag)
            if not moved.wait(_FOR_EVER):
                raise RuntimeError("Gloo gave the message up")
        finally:
            with self._lock:
                self._under_way[peer] -= 1
                self._lock.notify_all()

    def _open_group(self) -> Any:
        if self._group is None:
            raise RuntimeError("the engine is closed")
        return self._group

    def _say_goodbye(self, peer: int) -> None:
        with self._lock:
            if peer in self._greeted:
                return
            self._greeted.add(peer)
        word = torch.zeros(1, dtype=torch.uint8, device="cpu")
        with contextlib.suppress(RuntimeError):  # a peer that is gone hears nothing
            self._farewells.append((word, self._open_group().send([word], self._place[peer], _GOODBYE)))

    def _await_goodbye(self, peer: int) -> None:
        """The peer's goodbye is answered before this rank's own end, but after what the peer has taken of it has ended here:
        once the connection is closed, Gloo calls also a message failed that was moved, but not yet waited for."""
        try:
            self._move(torch.zeros(1, dtype=torch.uint8, device="cpu"), peer, _GOODBYE, True)
            self.engine.set_left(peer)
            with self._lock:  # a receive of what the peer never sends does not end
                self._lock.wait_for(lambda: not self._under_way[peer], _PATIENCE)
            self._say_goodbye(peer)
        except RuntimeError as error:
            self.engine.set_failure(peer, self._why(error))

    def _open_lanes(self) -> None:
        """And looks for links that are silent while messages are under way; on idle ones the kernel does."""
        for loop in self._loops:
            native.keep_links_alive(loop)
        while not self.engine.closing:
            lane = self.engine.take_lane(_LOOK)
            for loop in self._loops:
                if native.shut_silent_links(loop):
                    self._silenced = time.monotonic()
            if lane is not None:
                peer, tag, receives = lane
                self._lanes.append(self._start(f"{peer}-{tag}", self._receive if receives else self._send, peer, tag))

    def _send(self, peer: int, tag: int) -> None:
        frame = torch.zeros(_HEADER + _FIRST, dtype=torch.uint8, device="cpu")
        while (work := self.engine.take(peer, tag, False, _LONG)) is not None or not self.engine.closing:
            if work is None:
                continue
            ticket, data, size = work
            ctypes.c_uint64.from_address(frame.data_ptr()).value = size
            _copy(frame.data_ptr() + _HEADER, data, min(size, _FIRST))
            try:
                if size <= _FIRST:  # the frame holds all of it
                    self.engine.ended(ticket, size)
                self._move(frame, peer, tag, False)
                if size > _FIRST:
                    self._move(_memory(self.engine.begin(ticket) + _FIRST, size - _FIRST), peer, tag, False)
                    self.engine.ended(ticket, size)
            except RuntimeError as error:
                self._broke(peer, error)
                if size > _FIRST:
                    self.engine.ended(ticket, 0, self._why(error))

    def _receive(self, peer: int, tag: int) -> None:
        frame = torch.zeros(_HEADER + _FIRST, dtype=torch.uint8, device="cpu")
        while self.engine.await_work(peer, tag, True, _LONG) or not self.engine.closing:
            broken = self._try_to_move(frame, peer, tag)
            size = 0 if broken else ctypes.c_uint64.from_address(frame.data_ptr()).value
            rest = torch.empty(0, dtype=torch.uint8, device="cpu")
            work = self.engine.take(peer, tag, True, 0.0)
            if work is None and size > _FIRST:  # the receive was withdrawn; the sender goes on, and the next receive gets the message
                rest = torch.empty(size - _FIRST, dtype=torch.uint8, device="cpu")
                broken = self._try_to_move(rest, peer, tag)
            while work is None and not self.engine.closing:
                work = self.engine.take(peer, tag, True, _LONG)
            if work is not None:
                self._finish(peer, tag, work, frame, rest, size, broken)

    def _finish(
        self, peer: int, tag: int, work: tuple[int, int, int], frame: torch.Tensor, rest: torch.Tensor, size: int, broken: str
    ) -> None:
        """Puts a message whose frame, and perhaps rest, is here where it belongs; one of another size than expected is dropped."""
        ticket, data, expected = work
        if not broken and size > _FIRST and not len(rest):
            there = (
                _memory(data + _FIRST, size - _FIRST) if size == expected else torch.empty(size - _FIRST, dtype=torch.uint8, device="cpu")
            )
            broken = self._try_to_move(there, peer, tag)
        elif not broken and size == expected and len(rest):
            _copy(data + _FIRST, rest.data_ptr(), len(rest))
        if not broken and size == expected:
            _copy(data, frame.data_ptr() + _HEADER, min(size, _FIRST))
        self.engine.ended(ticket, size, broken)

    def _try_to_move(self, data: torch.Tensor, peer: int, tag: int) -> str:
        """Receives; "" or why the connection broke."""
        try:
            self._move(data, peer, tag, True)
        except RuntimeError as error:
            self._broke(peer, error)
            return self._why(error)
        return ""

    def _broke(self, peer: int, error: RuntimeError) -> None:
        self.engine.set_failure(peer, self._why(error))

    def _why(self, error: RuntimeError) -> str:
        cut = time.monotonic() < self._silenced + 1
        return _reason(error) + ("; the link, or the host behind it, did not answer for 3 s" if cut else "")


def _memory(address: int, size: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)


def _reason(error: RuntimeError) -> str:
    """Gloo's words without the place in its sources and its advice."""
    text = re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", str(error))
    return re.split(r"\. This is typically|\n", text)[0].strip()
