"""From this rank to the other hosts of its job: the engine that moves bytes, news, and the connections that tell whether a host lives."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from .. import native
from ..errors import MeshError
from .engines import choose_engine, open_engine
from .hosts import Connections, Host, News, interface_to
from .meeting import Meeting


class Links:
    """Collective over the ranks of the job, which has several hosts. Raises MeshError, with what to do, where they do not reach each
    other."""

    def __init__(self, meeting: Meeting, hosts: Sequence[Host], job: native.Job) -> None:
        self._opened: list[Any] = []
        self.hosts = list(hosts)
        interface, address = _own_address()
        own = next(host for host in hosts if job.rank in host.ranks)
        name = choose_engine().name
        # Gloo connects all ranks of a group; UCX those that are asked for
        ranks = meeting.ranks if name == "gloo" else [rank for rank in meeting.ranks if rank == job.rank or rank not in own.ranks]
        store = dist.PrefixStore("engine", meeting.store.clone())
        opened = meeting.during("engine", partial(open_engine, name, job.rank, ranks, store, meeting.timeout, interface))
        self._opened.append(opened)
        news = News(meeting.store, job.rank, hosts, job)
        self._opened.append(news)
        number_of = {rank: number for number, host in enumerate(hosts) for rank in host.ranks}
        opened.engine.span(
            job, [number_of[rank] for rank in meeting.ranks], [str(host) for host in hosts], news.publish, news.ask, news.share
        )
        if job.rank == own.ranks[0]:
            connections = Connections(hosts, hosts.index(own), job, news)
            self._opened.append(connections)
            meeting.during("life", partial(_connect, connections, meeting, address))
        meeting.exchange("linked", None)
        # a thread that is in the core while the interpreter ends would end the process by a signal
        atexit.register(self._close_at_exit, os.getpid())

    def _close_at_exit(self, pid: int) -> None:
        if os.getpid() == pid:
            self.close(1.0)

    def close(self, seconds: float = 5.0) -> None:
        """Says goodbye to the other hosts."""
        atexit.unregister(self._close_at_exit)
        for each in reversed(self._opened):
            each.close(*([seconds] if hasattr(each, "engine") else []))
        self._opened = []


def _connect(connections: Connections, meeting: Meeting, address: str) -> None:
    try:
        connections.open(meeting.store.clone(), address, meeting.timeout)
    except OSError as error:
        raise MeshError(
            f"rank {meeting.rank}: the hosts of the job do not reach each other over TCP ({error}; this one is {address}): open all ports"
            " between them, or set MASTER_ADDR to an address of the network that they share"
        ) from error


def _own_address() -> tuple[str, str]:
    """The interface on which this host reaches the others, and its address there: those of the route to MASTER_ADDR."""
    master = os.environ.get("MASTER_ADDR", "") or "127.0.0.1"
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
    interface, address = interface_to(master)
    return wanted or interface, address or "127.0.0.1"
