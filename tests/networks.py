"""Jobs of one rank a network namespace (as the fixture two_hosts makes them), started at one moment; and firewalls between them.

ranks = started(("a1", "b1"), 20.0, 3, {}, {})      # 3 steps on a mesh of both, init(timeout=20.0), no variables of their own
said = answers(ranks)                               # of each: kind, rank and text of an error, seconds it took, what it warned of
"""

import json
import os
import socket
import subprocess
from collections.abc import Sequence
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
