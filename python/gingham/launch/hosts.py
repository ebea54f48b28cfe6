"""Which ranks share a host, and what the hosts of a job tell each other beside their data.

    error     the first of the job wins, by compare_set in the job's store, and is news for every host
    question  who waits for whom, and what calls were made: asked only where a wait is long, or ranks disagree
    life      one TCP connection between each two hosts, which the kernels keep alive whatever the processes do: it breaks within
              4 s where a host is gone or a link is cut, and at once where the process at its other end dies
Virtual hosts: GINGHAM_HOST=name makes the ranks that say the same one host, whatever machine they run on.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .. import native
from ..mesh.layout import list_of

T = TypeVar("T")
VARIABLE = "GINGHAM_HOST"
SOON = 0.7  # seconds that the store has for what is told or asked while others wait
ANSWER = 0.5  # seconds that other hosts have to answer a question
BYE = b"x"
KEEPALIVE = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),) + tuple(
    (socket.IPPROTO_TCP, option, value)
    for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3), (socket.TCP_USER_TIMEOUT, 4000))
)


def whereabouts() -> dict[str, Any]:
    """What a rank tells of itself: its pid, its host for people, and what is the same on all ranks that may share memory with it."""
    named = os.environ.get(VARIABLE, "")
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    machine = boot.read_text().strip() if boot.exists() else os.uname().nodename
    inside = os.readlink(space) if os.path.lexists(space) else ""
    host = f"={named}" if named else f"{machine} {inside}"
    return {"pid": os.getpid(), "name": named or os.uname().nodename, "named": bool(named), "host": host}


@dataclass(frozen=True)
class Host:
    """ranks: of the job, ascending; the first one keeps the memory of all."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"host {self.name} ({list_of(self.ranks)})"


def hosts_of(told: Sequence[dict[str, Any]]) -> list[Host]:
    """The hosts of a job in the order of their first ranks, from every rank's whereabouts. Two of one name are told apart by a number."""
    found: dict[str, list[int]] = {}
    for rank, each in enumerate(told):
        found.setdefault(each["host"], []).append(rank)
    names = [str(told[ranks[0]]["name"]) for ranks in found.values()]
    again = [f"{name}#{names[:at].count(name) + 1}" if names.count(name) > 1 else name for at, name in enumerate(names)]
    return [Host(name, tuple(ranks)) for name, ranks in zip(again, found.values(), strict=True)]


def host_numbers(hosts: Sequence[Host]) -> dict[int, int]:
    """The number of each rank's host."""
    return {rank: number for number, host in enumerate(hosts) for rank in host.ranks}


class News:
    """Of this rank: tells and asks the other hosts, and on the first rank of each host hears and answers them."""

    def __init__(self, store: Any, rank: int, hosts: Sequence[Host], job: native.Job) -> None:
        self.hosts = list(hosts)
        self._job: native.Job | None = job  # until close(): the job holds this object's methods, which no collector sees
        self.own = host_numbers(hosts)[rank]
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=SOON))
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        if rank == self.hosts[self.own].ranks[0]:
            self._heard = store.clone()
            self._thread = threading.Thread(target=self._hear, name="gingham news", daemon=True)
            self._thread.start()

    def publish(self, words: tuple[str, int, str]) -> tuple[str, int, str]:
        """Tells all hosts of an error; returns the one that came first."""

        def told() -> tuple[str, int, str]:
            kind, rank, text = json.loads(self._store.compare_set("error", "", json.dumps(words)))
            self._tell({"error": [kind, rank, text]})
            return kind, rank, text

        return self._within(SOON, told)

    def ask(self, program: int) -> list[bytes]:
        """What the ranks of the other hosts say of themselves, of those that answer in time."""

        def answers() -> list[bytes]:
            number = self._tell({"ask": program, "host": self.own})
            keys = [f"answer/{number}/{host}" for host in range(len(self.hosts)) if host != self.own]
            with contextlib.suppress(Exception):
                self._store.wait(keys, timedelta(seconds=ANSWER))
            return [self._store.get(key) for key in keys if self._store.check([key])]

        return self._within(SOON + ANSWER, answers)

    def share(self, program: int, first: bool, told: bytes) -> bytes:
        """The bytes of a program's first rank, on all its ranks."""
        if first:
            self._store.set(f"shared/{program}", told)
        self._store.wait([f"shared/{program}"], timedelta(seconds=60))
        return bytes(self._store.get(f"shared/{program}"))

    def _within(self, seconds: float, work: Callable[[], T]) -> T:
        """work(), which asks the store, in a thread of its own: where the link to it is cut, torch waits for ever. Raises TimeoutError."""
        done: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def run() -> None:
            try:
                with self._lock:
                    done.put((True, work()))
            except Exception as error:
                done.put((False, error))

        threading.Thread(target=run, name="gingham store", daemon=True).start()
        try:
            good, answer = done.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"the job's store does not answer within {seconds:g} s") from None
        if not good:
            raise answer
        return answer  # type: ignore[no-any-return]

    def _tell(self, message: dict[str, Any]) -> int:
        number = int(self._store.add("news", 1))
        self._store.set(f"news/{number}", json.dumps(message))
        return number

    def _hear(self) -> None:
        number = 1
        while not self._stopping.is_set():
            try:
                self._heard.wait([f"news/{number}"], timedelta(days=1))  # torch prints a warning for each wait that ends without
                message = json.loads(self._heard.get(f"news/{number}"))
            except Exception:  # nothing new, or the store is gone, which the connections between hosts tell
                self._stopping.wait(0.01)
                continue
            job = self._job
            if job is None:
                return
            if "error" in message:
                job.hear(*message["error"])
            elif "ask" in message and message["host"] != self.own:
                with contextlib.suppress(Exception):
                    self._heard.set(f"answer/{number}/{self.own}", job.told(message["ask"]))
            number += 1

    def close(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            with contextlib.suppress(Exception):  # wakes the one that hears
                self._within(SOON, partial(self._tell, {"left": self.own}))
            self._thread.join(SOON)  # where the link to the store is cut it sleeps on
        self._job = None


class Connections:
    """Of the first rank of a host: one to that of each other host, over `address` of this one. A host that says goodbye is no failure."""

    def __init__(self, hosts: Sequence[Host], own: int, job: native.Job, news: News) -> None:
        self._hosts, self._own, self._job, self._news = list(hosts), own, job, news
        self._peers: dict[socket.socket, int] = {}
        self._woken, self._wake = socket.socketpair()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, store: Any, address: str, timeout: float) -> None:
        """Raises OSError or a store's error where a host cannot be reached."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as listening:
            listening.bind((address, 0))
            listening.listen(len(self._hosts))
            listening.settimeout(timeout)
            store.set(f"reached_at/{self._own}", json.dumps(listening.getsockname()[:2]))
            for number in range(self._own):
                where = json.loads(store.get(f"reached_at/{number}"))
                self._keep(socket.create_connection(tuple(where), timeout), number).sendall(struct.pack("!i", self._own))
            for _ in range(self._own + 1, len(self._hosts)):
                made, _ = listening.accept()
                made.settimeout(timeout)
                self._keep(made, struct.unpack("!i", made.recv(4, socket.MSG_WAITALL))[0])
        for each in self._peers:
            each.settimeout(None)
        self._thread = threading.Thread(target=self._watch, name="gingham hosts", daemon=True)
        self._thread.start()

    def _keep(self, made: socket.socket, host: int) -> socket.socket:
        for option in KEEPALIVE:
            made.setsockopt(*option)
        self._peers[made] = host
        return made

    def _watch(self) -> None:
        open_ones = dict(self._peers)
        while open_ones:
            ready, _, _ = select.select([self._woken, *open_ones], [], [])
            for each in ready:
                if each is self._woken:
                    return
                host = open_ones.pop(each)
                try:
                    said, why = each.recv(1), "its connection was closed"
                except OSError as error:
                    said, why = b"", str(error)
                if said != BYE:
                    self._gone(self._hosts[host], why)

    def _gone(self, host: Host, why: str) -> None:
        words = ("died", host.ranks[0], f"{host} is gone, or cannot be reached ({why}); rank {host.ranks[0]} is the first that lacks")
        self._done.wait(0.2)  # who lost one process of it knows which
        self._job.hear(*words)
        with contextlib.suppress(Exception):
            self._news.publish(words)

    def close(self) -> None:
        self._done.set()
        for each in self._peers:
            with contextlib.suppress(OSError):
                each.sendall(BYE)
        self._wake.send(b"x")
        if self._thread is not None:
            self._thread.join(5.0)
        for each in (*self._peers, self._woken, self._wake):
            each.close()


def interface_to(address: str) -> tuple[str, str]:
    """(name, own address) of the network interface that reaches `address`; ("", "") where none does."""
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)
            own = probe.getsockname()[0]
    except OSError:
        return "", ""
    for _, name in socket.if_nameindex():
        if own in addresses_of(name):
            return name, own
    return "", own


def addresses_of(interface: str) -> list[str]:
    """IPv4 addresses by the kernel's answer, IPv6 ones by /proc."""
    import fcntl

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, contextlib.suppress(OSError):
        request = struct.pack("256s", interface.encode()[:15])
        found.append(socket.inet_ntoa(fcntl.ioctl(asking.fileno(), 0x8915, request)[20:24]))  # SIOCGIFADDR
    listed = Path("/proc/net/if_inet6")
    for line in listed.read_text().splitlines() if listed.exists() else []:
        digits, *_, name = line.split()
        if name == interface:
            found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found
