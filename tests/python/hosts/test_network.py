"""Jobs whose hosts have networks of their own (namespaces), right and wrong, and under two torchruns."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from networks import ENVIRONMENT, answers, port, slow_link, started
from virtual import ENGINES

LIMIT = 5.0  # seconds until every rank has said what is wrong
CUT = 6.0  # and until a link that is cut is noticed
STILL = 4.5  # seconds for which a host may stand still


@pytest.mark.parametrize("engine", ["gloo", pytest.param("ucx", marks=pytest.mark.matrix)])
def test_a_job_over_two_networks_needs_no_settings(two_hosts: tuple[str, str], engine: str) -> None:
    """torch's Gloo alone would take the interface that the host's name leads to, which is often 127.0.0.1."""
    said = answers(started(two_hosts, 20.0, 3, *[{"GINGHAM_ENGINE": engine}] * 2))
    assert [each["kind"] for each in said] == ["", ""], said
    assert said[0]["y"] == said[1]["y"] and min(each["crossed"] for each in said) > 0


WRONG: dict[str, tuple[dict[str, str], dict[str, str], tuple[str, ...]]] = {
    "loopback on one": ({"MASTER_ADDR": "127.0.0.1"}, {}, ("rank 0", "rank 1", "127.0.0.1", "10.77.0.2", "Set MASTER_ADDR")),
    "no such interface": ({}, {"GLOO_SOCKET_IFNAME": "eth9"}, ("GLOO_SOCKET_IFNAME=eth9", "no such interface", "eth0")),
    "no answer": ({}, {"MASTER_ADDR": "10.77.0.9"}, ()),
    "no route": ({}, {"MASTER_ADDR": "10.99.0.1"}, ()),
    "no such name": ({}, {"MASTER_ADDR": "nowhere.invalid"}, ()),
}


@pytest.mark.parametrize("case", ["loopback on one", *(pytest.param(case, marks=pytest.mark.matrix) for case in list(WRONG)[1:])])
def test_a_wrong_network_is_told_to_all(two_hosts: tuple[str, str], case: str) -> None:
    first, second, words = WRONG[case]
    said = answers(started(two_hosts, 1.5, 1, first, second))
    for each in said:
        assert each["took"] < LIMIT and each["kind"], said
        assert all(word in each["text"] for word in words), said
    if not words:  # no store in common: each says what it lacks
        assert "rank 1 did not come to gingham.init within 1.5 s" in said[0]["text"], said
        assert f"no answer within 1.5 s at {second['MASTER_ADDR']}" in said[1]["text"] and "MASTER_ADDR" in said[1]["text"], said


# seconds that the four ranks compute between two steps: all in the middle of products, three waiting for the last, all computing
STATES = {"products": (0.0, 0.0, 0.0, 0.0), "wait": (0.0, 0.0, 0.0, 60.0), "compute": (0.3, 0.3, 0.3, 0.3)}


@pytest.mark.parametrize(
    ("engine", "state"),
    [
        pytest.param(engine, state, marks=[] if (engine, state) == ("gloo", "wait") else [pytest.mark.matrix])
        for engine in ENGINES
        for state in STATES
    ],
)
def test_a_link_that_is_cut_is_named_by_both_hosts(two_hosts: tuple[str, str], engine: str, state: str) -> None:
    """With its ranks, by every rank that does not sleep; the host that is cut off from the job's store too."""
    each = [{"GINGHAM_ENGINE": engine, "BETWEEN": str(between)} for between in STATES[state]]
    ranks = started([host for host in two_hosts for _ in range(2)], 30.0, 10_000_000, *each)
    for process in ranks:
        assert process.stdout.readline() == "running\n", process.communicate(timeout=10)
    subprocess.run(["ip", "-n", two_hosts[0], "link", "set", "eth0", "down"], check=True)
    try:
        for rank, said in enumerate(answers(ranks[:3] if state == "wait" else ranks)):
            name, others = (("b", (2, 3)), ("a", (0, 1)))[rank // 2]
            assert said["kind"] == "PeerDied" and said["rank"] in others, (rank, said)
            assert f"host {name} (ranks {others[0]}, {others[1]})" in said["text"], (rank, said)
            assert said["took"] < CUT, (rank, said)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("engine", "stopped"),
    [("ucx", 1), *(pytest.param(engine, stopped, marks=pytest.mark.matrix) for engine, stopped in (("ucx", 0), ("gloo", 0), ("gloo", 1)))],
)
def test_a_host_that_stands_still_for_a_while_is_not_dead(two_hosts: tuple[str, str], engine: str, stopped: int) -> None:
    """Its processes are stopped for longer than a link may be silent, its kernel lives: then the run goes on, and is right."""
    ranks = started(two_hosts, 30.0, 4000, *[{"GINGHAM_ENGINE": engine}] * 2)
    for process in ranks:
        assert process.stdout.readline() == "running\n", process.communicate(timeout=10)
    os.kill(ranks[stopped].pid, signal.SIGSTOP)
    time.sleep(STILL)
    os.kill(ranks[stopped].pid, signal.SIGCONT)
    said = answers(ranks)
    assert [each["kind"] for each in said] == ["", ""] and said[0]["y"] == said[1]["y"], said
    assert min(each["took"] for each in said) > STILL, said


@pytest.mark.matrix
@pytest.mark.parametrize("engine", ENGINES)
def test_a_slow_link_is_not_dead(two_hosts: tuple[str, str], engine: str) -> None:
    """200 ms there and back, and one frame in a hundred lost."""
    if not os.access("/dev/net/tun", os.W_OK):
        pytest.skip("no /dev/net/tun here")
    with slow_link(two_hosts, 0.1, 0.01):
        said = answers(started(two_hosts, 60.0, 25, *[{"GINGHAM_ENGINE": engine}] * 2), 120.0)
    assert [each["kind"] for each in said] == ["", ""] and said[0]["y"] == said[1]["y"], said
    assert min(each["took"] for each in said) > 14 * 0.2, said


# a child that ends as any program does must leave the rank's connections alone; what ranks print while they wait is seen too
SCRIPT = """
import os, sys, time
import torch, gingham
os.environ["GINGHAM_HOST"] = "h" + os.environ["GROUP_RANK"]
mesh = gingham.init(mode="2d", size=4)
torch.manual_seed(0)
layer = gingham.nn.Linear(8, 8)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    layer(mesh.scatter(torch.ones(4, 8))).sum().backward()
    optimizer.step()
    child = os.fork()
    if child == 0:
        sys.exit(0)
    os.waitpid(child, 0)
    time.sleep(0.6)
open(f"{sys.argv[1]}/{mesh.rank}", "w").write(repr(layer.weight.full_tensor().sum().item()))
gingham.destroy()
"""


@pytest.mark.parametrize("engine", ["gloo", pytest.param("ucx", marks=pytest.mark.matrix)])
def test_two_torchruns_are_one_job(tmp_path: Path, engine: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    where = str(port())
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2"),
                *("--master-addr=127.0.0.1", f"--master-port={where}", str(script), str(tmp_path)),
            ],
            env={**os.environ, **ENVIRONMENT, "GINGHAM_ENGINE": engine},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [agent.communicate(timeout=100)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert not any(word in text for text in said for word in ("Traceback", "Error", "Warning", "[W")), said
    assert len({(tmp_path / str(rank)).read_text() for rank in range(4)}) == 1
