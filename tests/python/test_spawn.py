"""gingham.spawn: values in rank order, errors with their rank, nothing left behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import gingham
from gingham import spawn


def test_values_in_rank_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # one of its own: other jobs of this machine come and go in the usual one

    def work(rank: int, factor: int) -> tuple[int, float, str]:
        mesh = gingham.init("2d", size=4)
        return rank * factor, float(mesh.gather(mesh.scatter(torch.ones(4, 4))).sum()), os.environ["WORLD_SIZE"]

    assert spawn(work, 4, 10) == [(rank * 10, 16.0, "4") for rank in range(4)]
    assert os.listdir(tmp_path) == []


def test_an_error_keeps_its_type_and_names_its_rank() -> None:
    def fail(rank: int) -> None:
        mesh = gingham.init("2d", size=4)
        if rank == 2:
            raise KeyError("lost")
        mesh.gather(mesh.scatter(torch.ones(4, 4)))

    start = time.monotonic()
    with pytest.raises(KeyError, match="lost") as caught:
        spawn(fail, 4)
    assert caught.value.rank == 2 and "raised on rank 2" in caught.value.__notes__[0]
    assert time.monotonic() - start < 5


def test_a_killed_rank_is_named() -> None:

    def die(rank: int) -> None:
        mesh = gingham.init("1d", size=3)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        mesh.gather(mesh.scatter(torch.ones(6, 6)), "rows")

    with pytest.raises(gingham.PeerDied) as caught:
        spawn(die, 3)
    assert caught.value.rank == 1


def test_ranks_that_hang_are_killed_when_one_fails() -> None:
    def hang(rank: int, folder: str) -> None:
        with open(f"{folder}/{rank}", "w") as file:
            file.write(str(os.getpid()))
        if rank == 0:
            raise ValueError("gone")
        time.sleep(600)

    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(ValueError, match="gone"):
            spawn(hang, 2, folder)
        with open(f"{folder}/1") as file:
            assert not os.path.exists(f"/proc/{file.read()}")


def test_b5_sys_exit_of_one_rank_is_no_success() -> None:
    def leave(rank: int, code: int) -> None:
        mesh = gingham.init("2d", size=4)
        if rank == 1:
            sys.exit(code)
        mesh.gather(mesh.scatter(torch.ones(4, 4)))

    for code in (0, 3):
        with pytest.raises(gingham.PeerDied, match=rf"rank 1 called sys.exit\({code}\)") as caught:
            spawn(leave, 4, code)
        assert caught.value.rank == 1


def test_b5_sys_exit_0_where_nobody_waits_is_a_return() -> None:
    assert spawn(lambda rank: sys.exit(0) if rank else 5, 2) == [5, None]


def test_b5_words_of_gloo_do_not_hide_the_culprit() -> None:
    def wait(rank: int) -> None:
        gingham.init("2d", size=4)
        if rank == 2:
            time.sleep(0.3)
            raise KeyError("lost")
        torch.distributed.barrier()

    with pytest.raises(KeyError, match="lost") as caught:
        spawn(wait, 4)
    assert caught.value.rank == 2


def test_b5_news_begins_with_the_culprit() -> None:
    def told(rank: int, folder: str) -> None:
        mesh = gingham.init("2d", size=4)
        try:
            if rank == 2:
                raise ZeroDivisionError("by zero")
            mesh.gather(mesh.scatter(torch.ones(4, 4)))
        except gingham.PeerDied as error:
            with open(f"{folder}/{rank}", "w") as file:
                file.write(str(error))

    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(ZeroDivisionError):
            spawn(told, 4, folder)
        for rank in (0, 1, 3):
            with open(f"{folder}/{rank}") as file:
                assert file.read() == f"rank 2 raised ZeroDivisionError: by zero (told to rank {rank})"


def test_b5_many_inits_print_an_uncaught_exception_once() -> None:
    script = """
import sys, gingham
def other(kind, error, trace):
    before(kind, error, trace)
for _ in range(3):
    gingham.init()
    gingham.destroy()
    if sys.excepthook is not other:
        before, sys.excepthook = sys.excepthook, other
raise KeyError("lost")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("KeyError: 'lost'") == 1 and len(done.stderr.splitlines()) < 12, done.stderr[-2000:]


def test_b2_a_kill_says_what_it_may_have_been() -> None:
    with pytest.raises(gingham.PeerDied, match=r"killed \(signal 9, SIGKILL\), perhaps out of memory"):
        spawn(lambda rank: os.kill(os.getpid(), signal.SIGKILL), 1)


@pytest.mark.parametrize("end", ["raises", "dies", "returns"])
def test_b6_a_rank_that_ends_before_init_is_named_at_once(end: str) -> None:
    def never(rank: int) -> None:
        if rank == 2 and end == "raises":
            raise KeyError("lost")
        if rank == 2 and end == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank != 2:
            gingham.init("2d", size=4)

    start = time.monotonic()
    with pytest.raises((KeyError, gingham.PeerDied)) as caught:
        spawn(never, 4)
    assert caught.value.rank == 2 and time.monotonic() - start < 3


def test_b6_ranks_that_do_not_come_are_named() -> None:
    def late(rank: int) -> str:
        if rank in (1, 2):
            time.sleep(3)
            return ""
        start = time.monotonic()
        with pytest.raises(gingham.PeerStalled, match="ranks 1, 2 did not come to gingham.init within 1 s") as caught:
            gingham.init("2d", size=4, timeout=1.0)
        assert caught.value.rank == 1 and time.monotonic() - start < 2
        return str(caught.value)

    assert all(spawn(late, 4)[rank] for rank in (0, 3))


def test_b6_a_store_that_is_not_there_is_named() -> None:
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    script = "import gingham; gingham.init('1d', size=2, timeout=2.0)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "PeerStalled: rank 1: no answer within 2 s at 127.0.0.1:1 (MASTER_ADDR, MASTER_PORT)" in done.stderr


def test_c15_functions_may_name_torchs_operations() -> None:
    aten, neg, add = torch.ops.aten, torch.ops.aten.neg, torch.ops.aten.add.Tensor
    values = gingham.spawn(lambda rank: float(aten.exp(neg(add(torch.zeros(1), torch.zeros(1))))), 2)
    assert values == [1.0, 1.0]
