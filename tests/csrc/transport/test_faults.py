"""Ranks that die, stop or leave, and Ctrl-C: who is named, and how soon. Ranks that disagree: test_disagreement.py.

Times are CLOCK_MONOTONIC, which the processes of a host share. A victim strikes itself from a thread while its main
thread is in a step, which is where a signal from outside would find it.
"""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gingham
from grids import GRIDS, ranks_of
from pool import RankError

LIMIT = 2.0  # seconds in which a dead rank must be known
STEPS = 100_000  # more than anyone will take


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def step_of(mesh: gingham.Mesh, phase: str) -> Callable[[], Any]:
    """One step: forward alone, backward alone (of one graph, again and again), or both through layers; already run once."""
    if phase == "layers":
        model = torch.nn.Sequential(gingham.nn.LayerNorm(24), gingham.nn.MLP(24, 48), gingham.nn.Linear(24, 24))
        x = mesh.scatter(torch.ones(16, 24))

        def step() -> None:
            model.zero_grad()
            model(x).sum().backward()

    else:
        a, b = mesh.scatter(torch.ones(48, 48), "a").requires_grad_(), mesh.scatter(torch.ones(48, 48), "b").requires_grad_()
        c = gingham.matmul(a, b)

        def step() -> None:
            gingham.matmul(a.detach(), b.detach()) if phase == "forward" else c.sum().backward(retain_graph=True)

    step()
    mesh.gather(mesh.scatter(torch.ones(8, 8)))
    return step


def outlive(rank: int, options: dict[str, Any], victim: int, phase: str, strike: Callable[[], None], after: float) -> tuple[Any, ...]:
    """What a rank saw of the victim's end: error type, error.rank, message, when; the victim: nothing, or when it struck."""
    mesh = gingham.init(**options)
    step = step_of(mesh, phase)
    if rank == victim:
        thread = threading.Timer(after, strike)
        thread.daemon = True
        thread.start()
    try:
        for _ in range(STEPS):
            step()
    except Exception as error:
        return type(error).__name__, getattr(error, "rank", None), str(error), time.monotonic()
    return ("nothing", None, "", time.monotonic())


def kill_now(stamp: str) -> None:
    Path(stamp).write_text(repr(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def delays_after_a_kill(ranks: Any, name: str, victim: int, phase: str, folder: Path, after: float) -> list[float]:
    """Seconds from the kill to each other rank's PeerDied."""
    stamp = folder / f"{victim}{phase}"
    pool = ranks(ranks_of(name))
    outcomes = pool(outlive, GRIDS[name], victim, phase, lambda: kill_now(str(stamp)), after, outcomes=True, timeout=30.0)
    assert isinstance(outcomes[victim], RankError) and "-9" in str(outcomes[victim])
    killed, delays = float(stamp.read_text()), []
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            assert isinstance(outcome, tuple) and outcome[:2] == ("PeerDied", victim), (rank, outcome)
            assert f"rank {victim}" in outcome[2]
            delays.append(outcome[3] - killed)
    return delays


def check_kills(ranks: Any, name: str, phases: list[str], folder: Path) -> None:
    before, delays = shared_memory(), []
    for victim, phase in zip(range(ranks_of(name)), itertools.cycle(phases), strict=False):
        delays += delays_after_a_kill(ranks, name, victim, phase, folder, 0.1 + 0.03 * victim)
        # the pool ends the survivors of a failed call; none of them and nothing of theirs is left
        assert ranks(ranks_of(name)).pids == []
    print(f"{name}: PeerDied after {statistics.median(delays):.3f} s (median), {max(delays):.3f} s (max), {len(delays)} survivors")
    assert max(delays) <= LIMIT
    assert shared_memory() == before


def test_a_kill_in_mid_step_is_named_by_all(ranks, tmp_path: Path) -> None:
    check_kills(ranks, "2d", ["forward", "backward"], tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("phases", [["forward"], ["backward"], ["layers"]], ids=lambda phases: phases[0])
@pytest.mark.parametrize("name", ["1d", "1d sequence", "2.5d", "3d"])
def test_a_kill_in_every_mode(ranks, name: str, phases: list[str], tmp_path: Path) -> None:
    check_kills(ranks, name, phases, tmp_path)


ENDS: dict[str, Callable[[], None]] = {
    "raise": lambda: (_ for _ in ()).throw(KeyError("lost")),  # type: ignore[dict-item,return-value]
    "sys.exit": lambda: sys.exit(3),
    "os._exit": lambda: os._exit(3),
}


@pytest.mark.parametrize("kind", ENDS)
def test_a_rank_that_leaves_is_named(ranks, kind: str, tmp_path: Path) -> None:
    def leave(rank: int) -> tuple[Any, ...]:
        if rank != 1:
            return outlive(rank, GRIDS["2d"], -1, "backward", lambda: None, 0.0)
        step_of(gingham.init(**GRIDS["2d"]), "backward")
        (tmp_path / "left").write_text(repr(time.monotonic()))
        ENDS[kind]()
        return ()

    outcomes = ranks(4)(leave, outcomes=True, timeout=30.0)
    left = float((tmp_path / "left").read_text())
    assert isinstance(outcomes[1], RankError)
    for rank in (0, 2, 3):
        assert isinstance(outcomes[rank], tuple) and outcomes[rank][:2] == ("PeerDied", 1), outcomes[rank]
        assert outcomes[rank][3] - left <= LIMIT
        # what it raised travels with the news
        assert {"raise": "KeyError: 'lost'", "sys.exit": "SystemExit: 3", "os._exit": "died"}[kind] in outcomes[rank][2]


SCRIPT = """
import json, os, sys, time
import torch, gingham
mesh = gingham.init("1d", size=3)
torch.manual_seed(0)
layer = gingham.nn.Linear(12, 12)
try:
    for step in range(100000):
        if step == 3 and mesh.rank == 2:
            print(json.dumps(["left", time.monotonic()]), flush=True)
            {end}
        layer(torch.ones(4, 12)).sum().backward()
except gingham.PeerDied as error:
    print(json.dumps([error.rank, time.monotonic(), str(error)]), flush=True)
    raise
"""


@pytest.mark.matrix
@pytest.mark.parametrize("end", ["raise KeyError('lost')", "sys.exit(3)"])
def test_plain_processes_end_non_zero_and_name_the_rank(end: str, tmp_path: Path) -> None:
    before = shared_memory()
    environment = {**os.environ, "WORLD_SIZE": "3", "GINGHAM_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT.format(end=end)]
    started = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    try:
        printed = [process.communicate(timeout=100) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode != 0 for process in started), printed
    left = json.loads(printed[2][0])[1]
    for out, _ in printed[:2]:
        rank, when, message = json.loads(out)
        assert rank == 2 and when - left <= LIMIT
        assert "raise" not in end or "lost" in message
    assert shared_memory() == before


def stop_for(seconds: float, stamp: str) -> None:
    """SIGSTOP to itself; a process started beforehand wakes it."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    Path(stamp).write_text(repr(time.monotonic()))
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_stopped_rank_is_named_after_the_timeout(ranks, tmp_path: Path) -> None:
    timeout, stamp = 2.0, str(tmp_path / "stopped")
    options = GRIDS["2d"] | dict(timeout=timeout)
    outcomes = ranks(4)(outlive, options, 2, "forward", lambda: stop_for(timeout + 2.5, stamp), 0.2, outcomes=True, timeout=30.0)
    stopped = float(Path(stamp).read_text())
    for rank, outcome in enumerate(outcomes):
        assert outcome[:2] == ("PeerStalled", 2), (rank, outcome)
        if rank != 2:
            assert timeout - 0.2 <= outcome[3] - stopped <= timeout + 1.0, outcome
            assert "init(timeout=)" in outcome[2]


def test_a_rank_that_goes_on_in_time_is_waited_for(ranks, tmp_path: Path) -> None:
    def pause(rank: int) -> tuple[bool, float]:
        mesh = gingham.init(**GRIDS["2d"], timeout=10.0)
        generator = torch.Generator().manual_seed(0)
        A = torch.randint(-8, 9, (32, 32), generator=generator).float()
        a, b, right, longest = mesh.scatter(A, "a"), mesh.scatter(A, "b"), True, 0.0
        for step in range(40):
            if step == 20 and rank == 1:
                threading.Timer(0.0, stop_for, (1.5, str(tmp_path / "paused"))).start()
            start = time.monotonic()
            right &= torch.equal(mesh.gather(gingham.matmul(a, b), "c"), A @ A)
            longest = max(longest, time.monotonic() - start)
        return right, longest

    answers = ranks(4)(pause, timeout=30.0)
    assert all(right for right, _ in answers) and max(longest for _, longest in answers) >= 1.0, answers


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_ctrl_c_returns_from_a_wait(ranks, phase: str) -> None:
    def wait(rank: int) -> tuple[Any, ...]:
        mesh = gingham.init(**GRIDS["2d"])
        a, b = (mesh.scatter(torch.ones(8, 8), operand).requires_grad_() for operand in "ab")
        c = gingham.matmul(a, b)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sent: list[float] = []
        if rank == 0:
            threading.Timer(0.5, lambda: (sent.append(time.monotonic()), os.kill(os.getpid(), signal.SIGINT))).start()
        elif rank == 3:
            time.sleep(1.5)
        try:
            gingham.matmul(a, b) if phase == "forward" else c.sum().backward()
        except KeyboardInterrupt as error:
            took = time.monotonic() - sent[0]
            from gingham.launch.init import report_failure

            report_failure(error)
            return "KeyboardInterrupt", took
        except gingham.PeerDied as error:
            return "PeerDied", error.rank, str(error)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return ("nothing",)

    answers = ranks(4)(wait, timeout=30.0)
    assert answers[0][0] == "KeyboardInterrupt" and answers[0][1] <= 1.0, answers
    assert all(answer[:2] == ("PeerDied", 0) and "KeyboardInterrupt" in answer[2] for answer in answers[1:]), answers


def test_many_lives_leave_nothing(ranks) -> None:
    def live(rank: int) -> list[tuple[int, int, list[str]]]:
        seen = []
        for life in range(21):
            mesh = gingham.init(**GRIDS["2.5d"])
            width = 8 + 8 * life  # DTensor remembers operations by shape
            layer = gingham.nn.Linear(width, width)
            y = layer(mesh.scatter(torch.ones(8, width)))
            y.sum().backward()
            torch.optim.AdamW(layer.parameters()).step()
            gingham.destroy()
            with pytest.raises(gingham.MeshError, match="destroy"):
                layer(y.detach())
            del mesh, layer, y
            if life in (5, 20):
                seen.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), sorted(os.listdir("/dev/shm"))))
        return seen

    for early, late in ranks(8)(live):
        assert late[0] <= early[0] and late[1] <= early[1] and late[2] == early[2], (early, late)
