"""Jobs of one rank a network namespace (as the fixture two_hosts makes them), started at one moment; and firewalls between them.

ranks = started(("a1", "b1"), 20.0, 3, {}, {})      # 3 steps on a mesh of both, init(timeout=20.0), no variables of their own
said = answers(ranks)                               # of each: kind, rank and text of an error, seconds it took, what it warned of
"""

import contextlib
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gingham
from virtual import in_network

ENVIRONMENT = {"PYTHONPATH": str(Path(gingham.__file__).parents[1]), "OMP_NUM_THREADS": "1"}

# started when told, since torch takes unequal times to load; says {kind, rank, text, took, warned} of init, or of the steps after it
JOB = """
import json, os, sys, time, warnings
import torch, gingham
print("ready", flush=True)
patience, steps = float(sys.argv[1]), int(sys.argv[2])
sys.stdin.readline()
begun = time.monotonic()
said = {"kind": "", "rank": None, "text": "", "warned": []}
warnings.showwarning = lambda message, *where: said["warned"].append([time.monotonic() - begun, str(message)])
try:
    mesh = gingham.init(mode="1d", size=int(os.environ["WORLD_SIZE"]), timeout=patience)
    torch.manual_seed(0)
    layer = gingham.nn.Linear(8, 8)
    x = mesh.scatter(torch.ones(4, 8))
    for step in range(steps):
        y = layer(x)
        y.sum().backward()
        if step == 10:
            print("running", flush=True)
            begun = time.monotonic()
        end = time.monotonic() + (float(os.environ.get("BETWEEN", "0")) if step >= 10 else 0)
        while time.monotonic() < end:
            torch.ones(64, 64) @ torch.ones(64, 64)
    said["y"] = mesh.gather(y).sum().item()
    said["crossed"] = mesh.traffic()["tp"]["bytes_crossed"]
    gingham.destroy()
except Exception as error:
    said.update(kind=type(error).__name__, rank=getattr(error, "rank", None), text=str(error))
print(json.dumps(said | {"took": time.monotonic() - begun}), flush=True)
"""


def port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def started(hosts: Sequence[str], patience: float, steps: int, *environments: dict[str, str]) -> list[Any]:
    """One rank on each host, that all have begun. Two ranks of one network namespace are on one host."""
    ranks = []
    where = str(port())
    for rank, (host, environment) in enumerate(zip(hosts, environments, strict=True)):
        given = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(hosts)),
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": where,
            "GINGHAM_HOST": host[-1],
        }
        ranks.append(in_network(host, [JOB, str(patience), str(steps)], {**os.environ, **ENVIRONMENT, **given, **environment}))
    for process in ranks:
        assert process.stdout.readline() == "ready\n", process.communicate(timeout=10)
    for process in ranks:
        process.stdin.write("go\n")
        process.stdin.flush()
    return ranks


def answers(ranks: Sequence[Any], timeout: float = 40.0) -> list[dict[str, Any]]:
    found = []
    for process in ranks:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for each in ranks:
                each.kill()
            raise
        assert out.strip(), err
        found.append(json.loads(out.strip().splitlines()[-1]))
    return found


def contained(name: str, command: Sequence[str], proc: str = "") -> list[str]:
    """The command in namespaces of its own, as in a container that shares the network: PID, UTS (it is called `name`), IPC, and mounts with
    an empty /dev/shm of 64 MB and a /proc of these options. Needs root."""
    inside = f'hostname {name}; mount -t tmpfs -o size=64m tmpfs /dev/shm; mount -t proc {proc} proc /proc; exec "$@"'
    return ["unshare", "--pid", "--uts", "--ipc", "--mount", "--fork", "--mount-proc", "--kill-child", "sh", "-c", inside, "sh", *command]


def wall(host: str, *opened: str, refuses: bool = False) -> None:
    """From here on `host` takes TCP only at these ports, such as "29500" or "40000-40999", and answers of those of others; the rest is
    dropped, or refused. By rules of routing: packet filters are not in every kernel."""
    rules = [["pref", "100", "lookup", "local"]]
    for at, ports in enumerate(opened):
        rules += [["pref", str(10 + at), "iif", "eth0", "ipproto", "tcp", way, ports, "lookup", "local"] for way in ("dport", "sport")]
    rules.append(["pref", "50", "iif", "eth0", "ipproto", "tcp", "prohibit" if refuses else "blackhole"])
    for rule in rules:
        subprocess.run(["ip", "-n", host, "rule", "add", *rule], check=True)
    subprocess.run(["ip", "-n", host, "rule", "del", "pref", "0"], check=True)
    setting(host, "ip_forward", str(int(refuses)))  # only who forwards tells the sender


def setting(host: str, name: str, value: str) -> None:
    """Of the namespace's IPv4."""
    subprocess.run(["ip", "netns", "exec", host, "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{name}"], check=True)


@contextlib.contextmanager
def slow_link(hosts: Sequence[str], delay: float, loss: float) -> Iterator[None]:
    """Two namespaces with another eth0, at the same addresses, whose frames are late by `delay` seconds each way, and lost, drawn with that
    chance: carried by this process, since a kernel may have no netem."""
    ends = []
    for at, host in enumerate(hosts, 1):
        name = f"tap{os.getpid()}{host[-1]}"
        ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
        fcntl.ioctl(ends[-1], 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))  # TUNSETIFF: frames, without a header
        for command in (
            ["link", "set", name, "netns", host],
            ["-n", host, "link", "set", "eth0", "down"],
            ["-n", host, "link", "set", "eth0", "name", "cable"],
            ["-n", host, "addr", "flush", "dev", "cable"],
            ["-n", host, "link", "set", name, "name", "eth0"],
            ["-n", host, "addr", "add", f"10.77.0.{at}/24", "dev", "eth0"],
            ["-n", host, "link", "set", "eth0", "up"],
        ):
            subprocess.run(["ip", *command], check=True)
    done = threading.Event()
    carrier = threading.Thread(target=_carry, args=(ends, delay, loss, done))
    carrier.start()
    try:
        yield
    finally:
        done.set()
        carrier.join()
        for end in ends:
            os.close(end)


def _carry(ends: Sequence[int], delay: float, loss: float, done: threading.Event) -> None:
    drawn, late, count = random.Random(0), [], itertools.count()
    while not done.is_set():
        for end in select.select(ends, [], [], max(0.0, min(0.1, late[0][0] - time.monotonic())) if late else 0.1)[0]:
            with contextlib.suppress(BlockingIOError):
                while frame := os.read(end, 1 << 16):
                    if drawn.random() >= loss:
                        heapq.heappush(late, (time.monotonic() + delay, next(count), sum(ends) - end, frame))
        while late and late[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(late)
            with contextlib.suppress(BlockingIOError):
                os.write(end, frame)
