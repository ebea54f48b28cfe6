"""From this rank to the other hosts of its job: the engine that moves bytes, news, and the connections that tell whether a host lives."""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Sequence
from functools import partial
from ipaddress import ip_address
from typing import Any

import torch.distributed as dist

from .. import native
from ..errors import MeshError
from ..mesh.layout import list_of
from .engines import open_engine
from .hosts import Connections, Host, News, addresses_of, host_numbers, interface_to
from .meeting import Meeting, seen_by_all


class Links:
    """Collective over the ranks of the job, which has several hosts. Raises MeshError, with what to do, where they do not reach each
    other."""

    def __init__(self, meeting: Meeting, hosts: Sequence[Host], job: native.Job, engine: str) -> None:
        self._opened: list[Any] = []
        self.hosts = list(hosts)
        try:
            self._open(meeting, hosts, job, engine)
        except BaseException:
            self.close(0.5)
            raise

    def _open(self, meeting: Meeting, hosts: Sequence[Host], job: native.Job, engine: str) -> None:
        interface, address = own_address()
        numbers = host_numbers(hosts)
        own = hosts[numbers[job.rank]]
        # Gloo connects all ranks of a group; UCX those that are asked for
        ranks = meeting.ranks if engine == "gloo" else [rank for rank in meeting.ranks if rank == job.rank or rank not in own.ranks]
        store = dist.PrefixStore("engine", meeting.store.clone())
        meeting.exchange("before engine", None)  # neither can be asked to stop: nobody enters it whose peers have not all joined the job
        opened = meeting.during("engine", partial(open_engine, engine, job.rank, ranks, store, meeting.timeout, interface))
        self._opened.append(opened)
        news = News(meeting.store, job.rank, hosts, job)
        self._opened.append(news)
        opened.engine.span(
            job, [numbers[rank] for rank in meeting.ranks], [str(host) for host in hosts], news.publish, news.ask, news.share
        )
        if job.rank == own.ranks[0]:
            connections = Connections(hosts, numbers[job.rank], job, news)
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


def agree_on_network(meeting: Meeting) -> None:
    """Each rank's interface to the others is the one on which it reaches MASTER_ADDR, and torch's Gloo is told so: of itself it takes
    the one that the host's name leads to, often 127.0.0.1. Raises MeshError, on every rank, where only some are on a loopback address."""
    interface, address = own_address()
    told = dict(zip(meeting.ranks, meeting.exchange("network", [interface, address]), strict=True))
    local = [rank for rank, (_, found) in told.items() if ip_address(found).is_loopback]
    if 0 < len(local) < len(told):
        others = [rank for rank in told if rank not in local]
        raise seen_by_all(
            MeshError(
                f"{list_of(local)} cannot be reached by {list_of(others)}, on other hosts: there MASTER_ADDR leads to {told[local[0]][1]}"
                f" on {told[local[0]][0]}, and for the others to their {told[others[0]][1]} on {told[others[0]][0]}. Set MASTER_ADDR to the"
                " address of rank 0's host in the network that the hosts share, no name that /etc/hosts leads to 127.0.0.1, or"
                " GLOO_SOCKET_IFNAME to the interface of that network on each host"
            )
        )
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def own_address() -> tuple[str, str]:
    """The interface on which this host reaches the others, and its address there: GLOO_SOCKET_IFNAME, else that of the route to
    MASTER_ADDR. Raises MeshError where the host has no such interface, or no route."""
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if wanted:
        found = addresses_of(wanted.split(",")[0])
        if not found:
            there = ", ".join(name for _, name in socket.if_nameindex())
            raise MeshError(f"GLOO_SOCKET_IFNAME={wanted}: this host has no such interface, or none with an address; it has {there}")
        return wanted, found[0]
    master = os.environ.get("MASTER_ADDR", "") or "127.0.0.1"
    interface, address = interface_to(master)
    if not address:
        raise MeshError(f"MASTER_ADDR={master}: this host knows no such name, or has no route to it; set it to an address of rank 0's host")
    return interface, address
