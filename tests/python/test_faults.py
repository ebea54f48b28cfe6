"""Faults at chosen points (GINGHAM_FAULT): who is named by whom, how soon, and what can be used afterwards."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from gingham.launch import faults
from grids import GRIDS, ranks_of
from pool import RankError

LIMIT = 1.0  # seconds until all others know


def steps(rank: int, name: str, fault: str, folder: str, timeout: float = 60.0) -> tuple[Any, ...]:
    """Training steps and a save under a fault: what this rank saw, and when."""
    os.environ["GINGHAM_FAULT"] = fault
    try:
        mesh = gingham.init(**GRIDS[name], timeout=timeout)
        torch.manual_seed(0)
        model = torch.nn.Sequential(nn.LayerNorm(24), nn.MLP(24, 48), nn.Linear(24, 24))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        x = mesh.scatter(torch.ones(16, 24))
        for _ in range(3):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
        gingham.save(model, optimizer, folder)
        for _ in range(200):
            mesh.gather(x)
    except BaseException as error:
        from gingham.launch.init import report_failure

        report_failure(error)
        return type(error).__name__, getattr(error, "rank", None), str(error), time.monotonic()
    finally:
        del os.environ["GINGHAM_FAULT"]
    return "nothing", None, "", time.monotonic()


def struck(ranks: Any, name: str, op: str, call: int, kind: str, victim: int, folder: Path) -> list[float]:
    """Runs `steps` with the fault and checks that every other rank names the victim. Seconds between the first and the last to know."""
    fault = f"rank={victim},op={op},call={call},kind={kind}"
    outcomes = ranks(ranks_of(name))(steps, name, fault, str(folder / f"{op}{call}{kind}{victim}"), outcomes=True, timeout=30.0)
    ranks(ranks_of(name)).stop()  # after a failed init torch may wait in threads
    if kind in ("kill", "exit"):
        assert isinstance(outcomes[victim], RankError), (fault, outcomes[victim])
    else:
        expected = ("RuntimeError", "MemoryError") if op != "save" else ("CheckpointError",)
        assert outcomes[victim][0] in expected, (fault, outcomes[victim])
    seen = []
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            named = ("PeerDied", "PeerOutOfMemory", "CheckpointError")
            assert isinstance(outcome, tuple) and outcome[0] in named, (fault, rank, outcome)
            assert outcome[1] in (victim, None) and f"rank {victim}" in outcome[2], (fault, rank, outcome)
            seen.append(outcome[3])
    if isinstance(outcomes[victim], tuple):
        seen.append(outcomes[victim][3])
    return [at - min(seen) for at in seen]


QUICK = [
    ("linear.forward", 2, "kill", 2),
    ("linear.backward", 1, "raise", 0),
    ("all_gather", 3, "exit", 3),
    ("backward", 2, "oom", 1),
    ("save", 3, "kill", 1),
    ("init.group", 1, "kill", 2),
    ("init.join", 1, "raise", 0),
    ("init.mesh", 1, "exit", 1),
]


@pytest.mark.parametrize(("op", "call", "kind", "victim"), QUICK)
def test_f1_to_f4_the_right_rank_is_named_by_all(ranks, op: str, call: int, kind: str, victim: int, tmp_path: Path) -> None:
    assert max(struck(ranks, "2d", op, call, kind, victim, tmp_path)) <= LIMIT


def left_in_a_step(rank: int) -> tuple[str, float]:
    """Rank 2 dies after it was through a step in which rank 0 still waits for it, as Gloo does, without an end, and the store with it."""
    from gingham.launch.meeting import Meeting

    meeting = Meeting(rank, (0, 1, 2), 30.0)
    meeting.arrive()
    started = time.monotonic()
    if rank == 2:
        meeting.during("step", lambda: None)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        meeting.during("step", lambda: meeting.store.get("never") if rank == 0 else time.sleep(0.2))
        meeting.exchange("next", None)
    except gingham.PeerDied as error:
        meeting.fail(error)
        meeting.close()
        return str(error), time.monotonic() - started
    return "nothing", 0.0


def test_a_rank_that_died_after_its_part_of_a_step_is_named_by_those_still_in_it(ranks) -> None:
    outcomes = ranks(3)(left_in_a_step, outcomes=True, timeout=30.0)
    ranks(3).stop()  # rank 0 still has a thread in the store
    for told, seconds in outcomes[:2]:
        assert told.startswith("rank 2 ") and "died" in told, outcomes
        assert seconds < 2.0, outcomes


@pytest.mark.matrix
def test_f1_to_f4_two_hundred_faults(ranks, tmp_path: Path) -> None:
    points = [("linear.forward", 1), ("linear.backward", 3), ("backward", 2), ("all_gather", 4), ("save", 2), ("save", 3), ("*", 11)]
    cases = [(op, call, kind) for (op, call), kind in itertools.product(points, ("kill", "raise", "exit", "oom"))]
    cases = [cases[at % len(cases)] for at in range(150)]
    cases += [
        (f"init.{point}", 1, kind) for point in ("start", "arrive", "group", "join", "mesh") for kind in ("kill", "raise", "exit", "oom")
    ] * 3
    cases = cases[:200]
    late = []
    for number, (op, call, kind) in enumerate(cases):
        late += struck(ranks, "2d", op, call, kind, (number + number // 4) % 4, tmp_path / str(number))
    late.sort()
    print(f"{len(cases)} faults: all know within {late[int(0.99 * len(late))]:.3f} s (p99), {late[-1]:.3f} s (max)")
    assert late[int(0.99 * len(late))] <= LIMIT


def out_of_memory(rank: int, name: str) -> list[str]:
    """Allocations that fail on one rank after another, in forward and backward: what each step raised. The others are right."""
    os.environ["GINGHAM_FAULT"] = ";".join(f"rank={victim},op={op},call=1,kind=oom" for victim, op in enumerate(("forward", "backward")))
    mesh = gingham.init(**GRIDS[name], timeout=10.0)
    del os.environ["GINGHAM_FAULT"]
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8, bias=False), mesh.scatter(torch.ones(8, 8)).requires_grad_()
    said, first = [], None
    for _ in range(6):
        x.grad = layer.weight.grad = None
        try:
            y = layer(x)
            y.sum().backward()
        except MemoryError as error:
            said.append(f"{type(error).__name__} {error}")
            continue
        result = mesh.gather(y.detach()), mesh.gather(x.grad), layer.weight.grad.full_tensor()
        first = first or result
        assert all(torch.equal(one, other) for one, other in zip(result, first, strict=True))
        said.append("right")
    assert first is not None and torch.allclose(first[0], torch.ones(8, 8) @ layer.weight.full_tensor().T)
    return said


@pytest.mark.parametrize("name", ["2d", "2.5d", "1d"])
def test_b1_memory_that_runs_out_is_an_exception_on_all_and_the_mesh_goes_on(ranks, name: str) -> None:
    told = ranks(ranks_of(name))(out_of_memory, name, timeout=60.0)
    failed = [step for step in range(6) if told[0][step] != "right"]
    assert 1 <= len(failed) <= 2 and told[0][-2:] == ["right", "right"], told
    for rank, said in enumerate(told):
        assert [step for step in range(6) if said[step] != "right"] == failed, told
        for number, step in enumerate(failed):
            assert said[step].startswith("MemoryError" if rank == number else "PeerOutOfMemory"), said
            assert f"rank {number}: the shared heap has no memory for a block of" in said[step] and "bytes" in said[step]


def test_b1_memory_that_runs_out_between_calls_is_told_at_the_next(ranks) -> None:
    def allocate(rank: int) -> tuple[str, int, float]:
        mesh = gingham.init(**GRIDS["2d"], heap=64 << 20)
        x = mesh.scatter(torch.ones(8, 8))
        with pytest.raises(MemoryError, match="rank 3: .*1073741824 bytes.*heap=") as caught:
            if rank == 3:
                mesh.empty([1 << 28], torch.float32)
            mesh.gather(x)
        return type(caught.value).__name__, mesh.job.heap, float(mesh.gather(x).sum())

    told = ranks(4)(allocate, timeout=30.0)
    assert told == [("PeerOutOfMemory", 64 << 20, 64.0)] * 3 + [("MemoryError", 64 << 20, 64.0)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank=1,op=matmul,kind=explode", "kind=explode"),
        ("rank=9,op=matmul,kind=kill", "rank=9 of a job of 1"),
        ("rank=0,op=matmul,kind=kill,when=2", "unknown field 'when'"),
        ("op=matmul,kind=kill", "no rank"),
        ("rank=0,op=matmul,call=x,kind=kill", "call=x is no number"),
        ("rank=0,op=init.somewhere,kind=kill", "init.somewhere"),
        ("rank=0,op=matmull,kind=kill", "op=matmull is no call or point (did you mean 'matmul'?) in"),
        ("rank=0,op=save.plan,kind=kill", "op=save.plan is no call or point"),
        ("rank=0,op=optimizer,kind=kill", "all_gather, all_reduce"),
        ("nonsense", "unknown field 'nonsense'"),
        ("rank=0,op=matmul,call=99999999999999999999,kind=kill", "expected at most"),
    ],
)
def test_a_wrong_fault_is_refused_by_init(monkeypatch, text: str, words: str) -> None:
    monkeypatch.setenv("GINGHAM_FAULT", text)
    with pytest.raises(ValueError, match="GINGHAM_FAULT") as caught:
        gingham.init()
    assert words in str(caught.value) or "rank=1 of a job of 1" in str(caught.value)


def test_every_call_and_point_can_be_named() -> None:
    """As they stand in the sources: the names of steps, of collectives, and of points."""
    root = Path(gingham.errors.__file__).resolve().parent  # a package of links to them, too
    python = "\n".join(path.read_text() for path in root.rglob("*.py"))
    named = set(re.findall(r'(?:linear_plan|make_step)\((?:[^()]|\([^()]*\))*?"([a-z]\w*)"', python)) - {"auto"}
    steps = named | {"linear", "matmul", "matmul to float32", "attention"}
    assert {"qkv", "shared", "gated", "patches"} <= steps == set(faults.STEPS)
    core = Path(__file__).parents[2] / "csrc"
    assert set(re.findall(r'begin\("(\w+)"', (core / "binding_axis.h").read_text())) == set(faults.COLLECTIVES)
    assert set(re.findall(r'faults\.at\("([\w.]+)"', python)) == set(faults.INIT)
    products = {word for path in (core / "ops").glob("*.cc") for word in re.findall(r'config, "(\w+)"', path.read_text())}
    assert products == set(faults.PRODUCTS)


def test_faults_are_read_as_written() -> None:
    read = faults.parse("rank=2,op=matmul,call=3,kind=kill; rank=0, op=init, kind=oom;", 4)
    assert [(fault.rank, fault.op, fault.call, fault.kind, fault.is_point) for fault in read] == [
        (2, "matmul", 3, "kill", False),
        (0, "init", 1, "oom", True),
    ]


SCRIPT = """
import json, os, sys, time
import torch, gingham
try:
    mesh = gingham.init("2d", size=4)
    torch.manual_seed(0)
    layer = gingham.nn.Linear(8, 8)
    x = mesh.scatter(torch.ones(8, 8))
    for _ in range(50):
        layer(x).sum().backward()
except BaseException as error:
    said = json.dumps([type(error).__name__, getattr(error, "rank", None), str(error)])
    open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").write(said)
    raise
"""


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["kill", "raise", "exit", "oom"])
@pytest.mark.parametrize("op", ["linear.backward", "init.group", "init.mesh"])
def test_f1_to_f4_under_torchrun(op: str, kind: str, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"GINGHAM_FAULT": f"rank=1,op={op},kind={kind}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "--monitor-interval=3", str(script)]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    for rank in (0, 2, 3):
        name, culprit, words = json.loads((tmp_path / str(rank)).read_text())
        assert name in ("PeerDied", "PeerOutOfMemory") and culprit == 1 and "rank 1" in words, (rank, name, culprit, words)


def test_f2_a_rank_stopped_in_init_is_named(ranks) -> None:
    def stop(rank: int) -> tuple[str, int, float]:
        os.environ["GINGHAM_FAULT"] = "rank=2,op=init.group,kind=stop"
        if rank == 2:
            subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
        start = time.monotonic()
        try:
            gingham.init(**GRIDS["2d"], timeout=1.0)
        except (gingham.PeerStalled, gingham.PeerDied) as error:
            return type(error).__name__, error.rank, time.monotonic() - start
        finally:
            del os.environ["GINGHAM_FAULT"]
        return "nothing", -1, 0.0

    outcomes = ranks(4)(stop, outcomes=True, timeout=30.0)
    for rank in (0, 1, 3):
        assert outcomes[rank][:2] == ("PeerStalled", 2) and outcomes[rank][2] <= 2.5, outcomes
