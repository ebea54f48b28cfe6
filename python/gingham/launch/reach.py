"""Whether the hosts of a job reach each other, asked by plain TCP connections: an engine or Gloo, once entered, cannot be asked to stop.

The first rank of each host listens on a port that the system chooses, as the engines' are, and connects to those of the others. Where a
firewall lets only the store's port through, this is where it shows.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import MeshError
from .hosts import Host, host_numbers, interface_to
from .links import own_address
from .meeting import Meeting, seen_by_all

LIMIT = 3.0  # seconds for a connection: the kernel asks at 0, 1 and 3 s
SHOWN = 4  # pairs of hosts in an error
Place = tuple[str, int]  # address and port


def try_all_ways(meeting: Meeting, hosts: Sequence[Host]) -> None:
    """Collective over the ranks of the job. Raises MeshError, on every rank alike and within LIMIT, naming who cannot reach whom, from and
    to which address, and what to open."""
    _, address = own_address()
    own = hosts[host_numbers(hosts)[meeting.rank]]
    first = meeting.rank == own.ranks[0]
    with socket.socket(family_of(address)) as listening:
        place, ports = None, _system_ports()
        if first:
            listening.bind((address, 0))
            listening.listen(len(hosts))
            place = listening.getsockname()[:2]
        told = dict(zip(meeting.ranks, meeting.exchange("listens", [place, ports]), strict=True))
        there = {host.ranks[0]: tuple(told[host.ranks[0]][0]) for host in hosts if host is not own}
        failed = _unreached(there, min(LIMIT, meeting.timeout)) if first else {}
        reports = dict(zip(meeting.ranks, meeting.exchange("reached", failed), strict=True))
    by_first = {host.ranks[0]: host for host in hosts}
    lacking = [
        f"{by_first[int(to)]} at {told[int(to)][0][0]}, port {told[int(to)][0][1]}, cannot be reached by {host} {why}"
        for rank, host in by_first.items()
        for to, why in reports[rank].items()
    ]
    if lacking:
        more = f"; and {len(lacking) - SHOWN} ways more" if len(lacking) > SHOWN else ""
        closed = sorted({told[int(to)][1] for rank in by_first for to in reports[rank]})
        store = f" beside MASTER_PORT {os.environ['MASTER_PORT']}, which is open" if os.environ.get("MASTER_PORT") else ""
        raise seen_by_all(
            MeshError(
                f"{'; '.join(lacking[:SHOWN])}{more}. Open TCP ports {' and '.join(closed)} (net.ipv4.ip_local_port_range, of which the"
                f" system chooses){store}, between all hosts of the job, in both directions; or set GLOO_SOCKET_IFNAME on each host to the"
                " interface of a network in which they are open"
            )
        )


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _unreached(there: dict[int, Place], seconds: float) -> dict[int, str]:
    """Those of `there` that no connection is made to within `seconds`: from where, and why."""
    deadline = time.monotonic() + seconds
    failed: dict[int, str] = {}
    with selectors.DefaultSelector() as waiting:
        for rank, place in there.items():
            each = socket.socket(family_of(place[0]))
            each.setblocking(False)
            code = each.connect_ex(place)
            if code == errno.EINPROGRESS:
                waiting.register(each, selectors.EVENT_WRITE, rank)
                continue
            each.close()
            if code:
                failed[rank] = _why(place, os.strerror(code))
        while waiting.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                made: socket.socket = key.fileobj  # type: ignore[assignment]
                if code := made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    failed[key.data] = _why(there[key.data], os.strerror(code))
                waiting.unregister(made)
                made.close()
        for key in list(waiting.get_map().values()):
            failed[key.data] = _why(there[key.data], f"no answer within {seconds:g} s")
            key.fileobj.close()  # type: ignore[union-attr]
    return failed


def _why(place: Place, reason: str) -> str:
    """In words, with the interface that the way to `place` begins at."""
    interface, own = interface_to(place[0])
    same = "; that is the address of this host too" if own == place[0] else ""
    return f"from {own or 'no address'} on {interface or 'no interface'} ({reason}{same})"


def _system_ports() -> str:
    told = Path("/proc/sys/net/ipv4/ip_local_port_range")
    return " to ".join(told.read_text().split()) if told.exists() else "1024 to 65535"
