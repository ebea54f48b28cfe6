"""UCX in a process: how it is found, that it leaves signals, streams and descriptors alone, and that a cut link is noticed."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gingham
from gingham import native
from gingham.launch import engines
from virtual import in_network

libucx = pytest.importorskip("libucx")
pytestmark = pytest.mark.skipif(not engines.find_ucx()["found"], reason="no UCX: pip install 'gingham[hosts]'")


def program(text: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", text, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(gingham.__file__).parents[1]), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


CHOOSE = """
import json, os, sys
from gingham.launch import engines
import gingham
for environment in json.loads(sys.argv[1]):  # each in a process of its own, since a library is looked for once
    if os.fork():
        os.wait()
        continue
    os.environ.update(environment)
    try:
        told = str(engines.choose_engine())
    except gingham.MeshError as error:
        told = f"MeshError: {error}"
    print(json.dumps([told, engines.engine_report()]), flush=True)
    os._exit(0)
"""


def choices(*environments: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    process = program(CHOOSE, json.dumps(environments))
    out, err = process.communicate(timeout=60)
    assert err == "" and process.returncode == 0, out + err
    return [tuple(json.loads(line)) for line in out.splitlines()]


def test_what_is_chosen_and_what_was_tried(tmp_path: Path) -> None:
    wrong, wheel = tmp_path / "none" / "libucp.so.0", Path(libucx.__path__[0]) / "lib"
    (tmp_path / "libucp.so.0").write_text("no library")
    missing, broken, word, gloo, folder, library = choices(
        {"GINGHAM_UCX": str(wrong)},
        {"GINGHAM_UCX": str(tmp_path / "libucp.so.0"), "GINGHAM_ENGINE": "ucx"},
        {"GINGHAM_ENGINE": "mpi"},
        {"GINGHAM_UCX": str(tmp_path), "GINGHAM_ENGINE": "gloo"},
        {"GINGHAM_UCX": str(wheel)},
        {"GINGHAM_UCX": str(wheel / "libucp.so.0")},
    )
    assert missing[0].startswith("MeshError: GINGHAM_UCX: UCX not found") and f"{wrong}: cannot open" in missing[0], missing
    assert missing[1]["engine"] == "" and str(wrong) in missing[1]["error"], missing
    assert "GINGHAM_ENGINE=ucx: UCX not found" in broken[0] and "libucp.so.0: file too short" in broken[0], broken
    assert "GINGHAM_ENGINE='mpi': expected 'ucx' or 'gloo'" in word[0], word
    assert gloo[1] == {"engine": "gloo", "why": "GINGHAM_ENGINE=gloo", "error": ""}, gloo
    for named, path in ((folder, wheel), (library, wheel / "libucp.so.0")):
        assert named[1]["engine"] == "ucx" and f"from GINGHAM_UCX={path}" in named[1]["why"], named


QUIET = """
import ctypes, os, re, threading
from gingham import native
from gingham.launch import engines

def caught():
    return re.search(r"SigCgt:\\s*(\\w+)", open("/proc/self/status").read()).group(1)

def environment():
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return [getenv(name) for name in (b"UCX_DEBUG_SIGNO", b"UCX_LOG_LEVEL", b"UCX_MODULES")]

thread = threading.Thread(target=print, args=("",), kwargs={"end": ""})  # glibc takes a signal of its own for threads
thread.start()
thread.join()
before = caught(), environment()
engines.find_ucx()
a, b = native.ucx_engine(0), native.ucx_engine(1)
thread = threading.Thread(target=b.connect, args=({0: a.address},))
thread.start()
a.connect({1: b.address})
thread.join()
assert (caught(), environment()) == before, (caught(), environment(), before)
thread = threading.Thread(target=a.close)
thread.start()
b.close()
thread.join()
"""


def test_signals_and_streams_are_left_alone() -> None:
    """libucs takes SIGHUP as it is loaded, unless told otherwise, and prints names of its settings that it does not know."""
    process = program(QUIET, UCX_OF_ANOTHER_PROGRAM="1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and (out, err) == ("", ""), (out, err)


def life(rank_0: Any, rank_1: Any) -> None:
    other = threading.Thread(target=rank_1.connect, args=({0: rank_0.address},))
    other.start()
    rank_0.connect({1: rank_1.address})
    other.join()
    got = torch.zeros(1000)
    tickets = rank_1.post_recv(0, 1, got), rank_0.post_send(1, 1, torch.ones(1000))
    assert rank_1.wait(tickets[0], 10) and rank_0.wait(tickets[1], 10) and bool(got.all())
    other = threading.Thread(target=rank_0.close)
    other.start()
    rank_1.close()
    other.join()


def held() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("lives", [50, pytest.param(1000, marks=pytest.mark.matrix)])
def test_many_lives_leak_nothing(lives: int) -> None:
    life(native.ucx_engine(0), native.ucx_engine(1))
    before = held()
    for _ in range(lives):
        life(native.ucx_engine(0), native.ucx_engine(1))
    end = time.monotonic() + 5  # threads that were joined stand in /proc a moment longer; one of an earlier test may have ended since
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < end, (held(), before)
        time.sleep(0.05)


def test_an_engine_that_is_dropped_frees_everything() -> None:
    """Without close(), with a peer and a receive under way."""
    life(native.ucx_engine(0), native.ucx_engine(1))
    before = held()
    for _ in range(5):
        a, b = native.ucx_engine(0), native.ucx_engine(1)
        other = threading.Thread(target=b.connect, args=({0: a.address},))
        other.start()
        a.connect({1: b.address})
        other.join()
        a.post_recv(1, 1, torch.zeros(1000))
        b.post_send(0, 2, torch.zeros(1_000_000))
        del a, b, other
    assert all(now <= then for now, then in zip(held(), before, strict=True)), (held(), before)


def test_a_forked_child_harms_nobody() -> None:
    """A data loader's worker has its parent's engine, and its sockets: it drops the one and leaves the others alone."""
    a, b = native.ucx_engine(0), native.ucx_engine(1)
    other = threading.Thread(target=b.connect, args=({0: a.address},))
    other.start()
    a.connect({1: b.address})
    other.join()
    child = os.fork()
    if child == 0:
        a.close()
        del a, b
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    got = torch.zeros(1_000_000)
    tickets = a.post_send(1, 1, torch.ones(1_000_000)), b.post_recv(0, 1, got)
    assert b.wait(tickets[1], 10) and a.wait(tickets[0], 10) and bool(got.all()) and not a.failure(1)
    other = threading.Thread(target=a.close)
    other.start()
    b.close()
    other.join()


def test_a_peer_that_does_not_answer_is_named() -> None:
    a, b = native.ucx_engine(0), native.ucx_engine(5)
    with pytest.raises(gingham.MeshError, match=r"(?s)rank 0 on .* cannot reach .*rank 5 on .*: no answer within 0.3 s.*UCX_NET_DEVICES"):
        a.connect({5: b.address}, 0.3)
    with pytest.raises(gingham.MeshError, match="all ranks must choose the same engine"):
        a.connect({3: b""}, 0.3)
    a.close(0)
    b.close(0)


ENDS = """
import sys, time
import torch
import torch.distributed as dist
from gingham.launch import engines

rank, path, name = int(sys.argv[1]), *sys.argv[2:]
e = engines.open_engine(name, rank, (0, 1), dist.FileStore(path, 2), 20, "lo").engine
got = torch.zeros(10)
tickets = e.post_recv(1 - rank, 1, got), e.post_send(1 - rank, 1, torch.ones(10))
assert all(e.wait(ticket, 20) for ticket in tickets)
e.post_recv(1 - rank, 2, torch.zeros(1 << 20))
time.sleep(0.3 * rank)
print(repr(e.failure(1 - rank)))
"""


@pytest.mark.parametrize("name", ["ucx", "gloo"])
def test_a_process_may_end_without_close(tmp_path: Path, name: str) -> None:
    """With a receive under way that nobody serves: both leave in order, say nothing, and neither aborts."""
    ranks = [program(ENDS, str(rank), str(tmp_path / "store"), name) for rank in (0, 1)]
    for rank in ranks:
        out, err = rank.communicate(timeout=60)
        assert (rank.returncode, out, err) == (0, "''\n", ""), (rank.returncode, out, err)


RANK = """
import sys, time
import torch
import torch.distributed as dist
from gingham.launch import engines

rank, path, name, mode = int(sys.argv[1]), *sys.argv[2:]
opened = engines.open_engine(name, rank, (0, 1), dist.FileStore(path, 2), 20, "eth0")
e = opened.engine
got = torch.zeros(1 << 20)
tickets = e.post_recv(1 - rank, 1, got), e.post_send(1 - rank, 1, torch.ones(1 << 20))
assert all(e.wait(ticket, 20) for ticket in tickets)
assert got.all()
if mode == "send":  # more than the sockets hold, so that the sender waits
    e.post_send(1 - rank, 2, torch.ones(16 << 20))
else:
    e.post_recv(1 - rank, 2, torch.zeros(4))
print("ready", flush=True)
sys.stdin.readline()
started = time.monotonic()
while not e.failure(1 - rank) and time.monotonic() < started + 15:
    if mode == "idle":
        time.sleep(0.05)
    else:
        e.rest(0.5, e.changes)
print(f"{time.monotonic() - started:.2f} {e.failure(1 - rank)}", flush=True)
opened.close(0.1)
"""


@pytest.mark.parametrize("name", ["ucx", "gloo"])
@pytest.mark.matrix  # test_network cuts the link of a whole job
@pytest.mark.parametrize("mode", ["recv", "send", "idle"])
def test_a_cut_link_is_noticed(two_hosts: tuple[str, str], tmp_path: Path, name: str, mode: str) -> None:
    path = str(tmp_path / "store")
    ranks = []
    for rank, host in enumerate(two_hosts):
        environment = {**os.environ, "PYTHONPATH": str(Path(gingham.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        ranks.append(in_network(host, [RANK, str(rank), path, name, mode], environment))
    for process in ranks:
        assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate(timeout=10)
    subprocess.run(["ip", "-n", two_hosts[0], "link", "set", "eth0", "down"], check=True)
    for peer, process in zip((1, 0), ranks, strict=True):
        out, err = process.communicate("go\n", timeout=40)
        took = re.match(r"([\d.]+) rank (\d), whose connection .*broke: ", out)
        assert took and float(took.group(1)) < 6 and took.group(2) == str(peer) and err == "", out + err
