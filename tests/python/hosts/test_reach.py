"""Ports that are closed: the store's, those of the other hosts, one way or both; who waits says for what, and what to do."""

import os
import re
import socket
import time
import warnings
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

import gingham
from gingham.errors import MeshError, PeerStalled
from gingham.launch import reach, rendezvous
from networks import answers, setting, started, wall
from virtual import ENGINES, on_host, split

LIMIT = 5.0  # seconds until every rank has said what is wrong
STORE = "29500"
PORT = {"MASTER_PORT": STORE}
A, B = ("a", "10.77.0.1"), ("b", "10.77.0.2")


def closed_ways(two_hosts: tuple[str, str], count: int, engine: str, walls: str, refuses: bool) -> list[tuple[str, str]]:
    """(who, from) of each way that the error of every rank names, from host to host: of a job with `count` ranks a host."""
    for host in two_hosts:
        if host[-1] in walls:
            wall(host, STORE, refuses=refuses)
    hosts = [host for host in two_hosts for _ in range(count)]
    said = answers(started(hosts, 20.0, 1, *[{"GINGHAM_ENGINE": engine, **PORT}] * len(hosts)))
    texts = {each["text"] for each in said}
    assert {each["kind"] for each in said} == {"MeshError"} and len(texts) == 1, said
    assert max(each["took"] for each in said) < LIMIT, said
    text = texts.pop()
    ranks = {"a": "ranks 0, 1", "b": "ranks 2, 3"} if count == 2 else {"a": "rank 0", "b": "rank 1"}
    for word in ("Open TCP ports 32768 to 60999", "in both directions", f"beside MASTER_PORT {STORE}, which is open", "GLOO_SOCKET_IFNAME"):
        assert word in text, text
    found = []
    for (to, there), (name, own) in ((A, B), (B, A)):
        if f"host {to} ({ranks[to]}) at {there}, port " in text:
            assert f"cannot be reached by host {name} ({ranks[name]}) from {own} on eth0 (" in text, text
            found.append((name, to))
    assert text.count("no answer within 3 s" if not refuses else "No route to host") == len(found), text
    return found


@pytest.mark.parametrize(
    ("engine", "count", "refuses"),
    [
        ("ucx", 1, False),
        ("gloo", 1, True),
        *(pytest.param(engine, 2, refuses, marks=pytest.mark.matrix) for engine in ENGINES for refuses in (False, True)),
    ],
)
def test_where_only_the_stores_port_is_open_all_say_what_to_open(
    two_hosts: tuple[str, str], engine: str, count: int, refuses: bool
) -> None:
    """Before the engine or Gloo is entered, which would wait for ever."""
    assert closed_ways(two_hosts, count, engine, "ab", refuses) == [("b", "a"), ("a", "b")]


def one_way(rank: int) -> str:
    """What init says where rank 0, of host a, finds no way to host b, whose ranks find one to it."""
    closed = {2: "from 10.0.0.1 on eth0 (no answer within 3 s)"} if rank == 0 else {}
    patched = mock.patch.object(reach, "_unreached", lambda there, seconds: closed)
    with on_host(rank, split(2, 2)), patched, pytest.raises(MeshError) as caught:
        gingham.init(mode="2d", size=4, timeout=20.0)
    return str(caught.value)


def test_of_two_ways_only_the_closed_one_is_named(ranks) -> None:
    texts = set(ranks(4)(one_way))
    assert len(texts) == 1
    assert re.match(
        r"host b \(ranks 2, 3\) at 127.0.0.1, port \d+, cannot be reached by host a \(ranks 0, 1\) from 10.0.0.1 on eth0 \(no answer within"
        r" 3 s\). Open TCP ports \d+ to \d+ ",
        texts.pop(),
    )


@pytest.mark.parametrize("engine", ["ucx", pytest.param("gloo", marks=pytest.mark.matrix)])
def test_the_ports_that_the_page_says_are_enough(two_hosts: tuple[str, str], engine: str) -> None:
    """MASTER_PORT and those of ip_local_port_range."""
    for host in two_hosts:
        setting(host, "ip_local_port_range", "'40000 40999'")
        wall(host, STORE, "40000-40999")
    said = answers(started(two_hosts, 20.0, 3, *[{"GINGHAM_ENGINE": engine, **PORT}] * 2))
    assert [(each["kind"], each["warned"]) for each in said] == [("", [])] * 2 and said[0]["y"] == said[1]["y"], said


@pytest.mark.parametrize("refused", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_a_store_that_nobody_reaches_is_told_before_the_time_is_over(two_hosts: tuple[str, str], refused: bool) -> None:
    """On the rank that keeps it too, who sees only that others are late; the error comes at the limit, not at twice it."""
    if not refused:
        wall(two_hosts[0])
    said = answers(started(two_hosts, 4.5, 1, PORT, {"MASTER_PORT": "29501"} if refused else PORT))
    (keeper, first), (late, second) = [each["warned"][0] for each in said]
    assert keeper < LIMIT and "rank 1 did not come within 3 s" in first and f"10.77.0.1:{STORE}" in first, said
    assert late < LIMIT and "rank 1 has waited 3 s, of 4.5 s in all" in second and "which rank 0 should keep at 10.77.0.1:2950" in second, (
        said
    )
    for text in (second, said[1]["text"]):
        assert ("connection refused; does rank 0 run" if refused else f"does a firewall drop TCP to port {STORE}? open it") in text, said
    assert said[1]["kind"] == "PeerStalled" and "no answer within 4.5 s at 10.77.0.1:2950" in said[1]["text"], said
    assert "rank 1 did not come to gingham.init within 4.5 s" in said[0]["text"], said
    assert 4.4 < said[1]["took"] < LIMIT and said[0]["took"] < 4.5 + 1.5, said


def late(rank: int, port: int) -> tuple[float, list[str]]:
    """Of a job whose rank 0, which keeps the store, comes after the others."""
    del os.environ["GINGHAM_STORE"]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if rank == 0:
        time.sleep(1.5)
    with warnings.catch_warnings(record=True) as warned, on_host(rank, split(1, 1), "gloo"):
        mesh = gingham.init(mode="1d", size=2, timeout=20.0)
    return float(mesh.gather(mesh.scatter(torch.ones(4, 4))).sum()), [str(each.message) for each in warned]


@pytest.fixture
def port() -> Iterator[int]:
    """One that another program listens at, who says nothing."""
    with socket.socket() as silent:
        silent.bind(("", 0))
        silent.listen()
        yield silent.getsockname()[1]


def test_a_store_that_comes_late_is_waited_for(ranks, port: int) -> None:
    try:
        assert ranks(2)(late, port - 1 if port > 32768 else port + 1) == [(16.0, [])] * 2
    finally:
        ranks(2).stop()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("127.0.0.1", "what listens there does not answer as a job's store; has another program port"),
        ("nowhere.invalid", "this host knows no such name"),
    ],
)
def test_what_is_no_store_is_told_at_the_limit(port: int, where: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch alone would wait for a silent program for ever, and for a name twice as long as it is told to."""
    monkeypatch.setenv("MASTER_ADDR", where)
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.6)
    begun = time.monotonic()
    with pytest.warns(UserWarning, match="rank 1 has waited 0.6 s") as warned, pytest.raises(PeerStalled, match=words) as caught:
        rendezvous._tcp_store(1, 2, 1.5)
    assert 1.2 < time.monotonic() - begun < 2.5 and caught.value.rank == 0 and words in str(warned[0].message)


def test_a_port_that_another_program_has_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(MeshError, match=f"rank 0 cannot keep the job's store at 127.0.0.1:{port}: another program"):
        rendezvous._tcp_store(0, 2, 5.0)


@pytest.mark.parametrize("given", ["", "x", "70000"])
def test_no_port_is_no_address(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", given)
    with pytest.raises(MeshError, match=f"MASTER_PORT='{given}'"):
        rendezvous._tcp_store(1, 2, 5.0)
