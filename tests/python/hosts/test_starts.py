"""The ways of docs/hosts.md to start a job, with Slurm's variables and a container's namespaces but neither of the two."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import gingham
from networks import ENVIRONMENT, contained, port

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "hosts.md").read_text()
BIN = Path(sys.executable).parent  # torchrun is beside python

TRAIN = """
import json, os
import torch, gingham
from gingham.launch import world
mesh = gingham.init(mode="1d", size=4, timeout=20.0)
torch.manual_seed(0)
y = gingham.nn.Linear(8, 8)(mesh.scatter(torch.ones(4, 8)))
y.sum().backward()
said = {"y": mesh.gather(y).sum().item(), "hosts": [str(host) for host in world.current().hosts], "shm": os.listdir("/dev/shm")}
said["crossed"] = mesh.traffic()["tp"]["bytes_crossed"]
open(f"said{mesh.rank}", "w").write(json.dumps(said))
gingham.destroy()
"""


def page_line(start: str) -> str:
    """What the page has bash run under the srun that starts so, with two ranks a host."""
    found = re.search(re.escape(start) + r" bash -c '(.*?)'`", PAGE, re.DOTALL)
    assert found, start
    return " ".join(found[1].split()).replace("--nproc-per-node 4", "--nproc-per-node 2")


def run(folder: Path, commands: Sequence[tuple[list[str], dict[str, str]]]) -> list[dict[str, Any]]:
    """What the four ranks said, of programs that all end well."""
    (folder / "train.py").write_text(TRAIN)
    variables = {**os.environ, **ENVIRONMENT, "PATH": f"{folder}:{BIN}:{os.environ['PATH']}"}
    started = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**variables, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        for command, own in commands
    ]
    try:
        words = [process.communicate(timeout=100)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), words
    said = [json.loads((folder / f"said{rank}").read_text()) for rank in range(4)]
    assert len({each["y"] for each in said}) == 1 and all(each["crossed"] > 0 and each["shm"] == [] for each in said), said
    return said


def slurm(folder: Path, names: Sequence[str], node: int, tasks: int) -> dict[str, str]:
    """Slurm's variables on a node of two, and a scontrol that lists both."""
    scontrol = folder / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames n[1-2]" ] && printf "10.77.0.1\\n10.77.0.2\\n"\n')
    scontrol.chmod(0o755)
    given = {"NODEID": node, "NNODES": 2, "NTASKS": 2 * tasks, "NTASKS_PER_NODE": tasks, "JOB_NODELIST": "n[1-2]", "NODENAME": names[node]}
    return {f"SLURM_{name}": str(value) for name, value in given.items()}


def test_tasks_of_slurm_alone_are_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    with pytest.raises(gingham.MeshError, match=r"Slurm's 8 tasks are not read; .*set RANK=\$SLURM_PROCID"):
        gingham.init("1d", size=8)


# the line for each task of a node, as srun starts them: $0 is the line, $@ the tasks
SRUN = """
for task in "$@"; do SLURM_LOCALID=$task SLURM_PROCID=$(($# * SLURM_NODEID + task)) bash -c "$0" & all="$all $!"; done
for each in $all; do wait $each || exit 1; done
"""


@pytest.mark.parametrize("task_a_rank", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_slurms_lines(two_hosts: tuple[str, str], tmp_path: Path, task_a_rank: bool) -> None:
    """On two hosts that share nothing but a network; srun's part, a task's variables on each node, is done by hand."""
    line = page_line(f"srun --nodes 2 --ntasks-per-node {4 if task_a_rank else 1}")
    tasks = 2 if task_a_rank else 1
    commands = [
        (
            ["ip", "netns", "exec", host, *contained(f"n{node + 1}", ["bash", "-c", SRUN, line, *map(str, range(tasks))])],
            slurm(tmp_path, ("n1", "n2"), node, tasks),
        )
        for node, host in enumerate(two_hosts)
    ]
    for each in run(tmp_path, commands):
        assert each["hosts"] == ["host n1 (ranks 0, 1)", "host n2 (ranks 2, 3)"], each


HIDDEN = ["setpriv", "--regid", "65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]  # root sees what hidepid hides


@pytest.mark.parametrize(
    ("engine", "proc", "as_whom"),
    [("gloo", "", []), *(pytest.param("ucx", f"-o hidepid={hides}", HIDDEN, marks=pytest.mark.matrix) for hides in (2, 4))],
    ids=["plain", "hidepid=2", "hidepid=4"],
)
def test_a_container_a_host(tmp_path: Path, engine: str, proc: str, as_whom: list[str]) -> None:
    """Two containers of one machine that share its network are two hosts, whose names are theirs."""
    if (
        os.geteuid() != 0
        or shutil.which("unshare") is None
        or subprocess.run(contained("n", ["true"], proc), capture_output=True).returncode
    ):
        pytest.skip("no namespaces here: they need root and unshare")
    start = f"torchrun --nnodes 2 --nproc-per-node 2 --master-addr 127.0.0.1 --master-port {port()} --node-rank"
    assert "torchrun --nnodes 2 --nproc-per-node 4 --node-rank r --master-addr 10.0.0.1 --master-port 29500 train.py" in PAGE
    commands = [
        (contained(f"c{node}", [*as_whom, *start.split(), str(node), "train.py"], proc), {"GINGHAM_ENGINE": engine}) for node in range(2)
    ]
    for each in run(tmp_path, commands):
        assert each["hosts"] == ["host c0 (ranks 0, 1)", "host c1 (ranks 2, 3)"], each
