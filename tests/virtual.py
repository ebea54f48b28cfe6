"""One machine as several hosts: which rank is on which, for tests. Imports nothing of gingham.

with on_host(rank, (0, 0, 0, 1), "gloo"):      ranks 0 to 2 on host a, rank 3 on host b, over torch's Gloo
    mesh = gingham.init(mode="2d", size=4)
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

ENGINES = ("ucx", "gloo")
VARIABLES = ("GINGHAM_HOST", "GINGHAM_ENGINE")


def split(*ranks: int) -> tuple[int, ...]:
    """The host of each rank, of hosts with so many ranks: split(3, 1) is (0, 0, 0, 1)."""
    return tuple(host for host, count in enumerate(ranks) for _ in range(count))


def ways(size: int) -> list[tuple[int, ...]]:
    """Of `size` ranks: two halves, hosts of two, uneven ones both ways, and ranks dealt out in turn; each way once."""
    even = split(size // 2, size - size // 2)
    uneven = [split(size - 1, 1), split(1, size - 1)] if size > 2 else []
    found = [even, tuple(rank // 2 for rank in range(size)), *uneven, tuple(rank % 2 for rank in range(size))]
    return [way for way in dict.fromkeys(found) if len(set(way)) > 1]


def name_of(hosts: Sequence[int]) -> str:
    return "".join("abcdefghijkl"[host] for host in hosts)


@contextlib.contextmanager
def on_host(rank: int, hosts: Sequence[int], engine: str = "ucx") -> Iterator[None]:
    """This rank is on host hosts[rank] while it calls init; no hosts: all ranks are on the machine's own."""
    kept = {name: os.environ.pop(name, None) for name in VARIABLES}
    if hosts:
        os.environ.update(GINGHAM_HOST=name_of(hosts)[rank], GINGHAM_ENGINE=engine)
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def in_network(host: str, program: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A Python program, its source first and then its arguments, in the network namespace `host`, with pipes to it."""
    command = ["ip", "netns", "exec", host, sys.executable, "-c", *program]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
