"""gingham.spawn: values in rank order, errors with their rank, nothing left behind."""

import os
import signal
import tempfile
import time

import pytest
import torch

import gingham
from gingham import spawn


def leftovers() -> list[str]:
    return sorted(name for name in os.listdir(tempfile.gettempdir()) if name.startswith("gingham-") and "ranks" not in name)


def test_values_in_rank_order() -> None:
    before = leftovers()

    def work(rank: int, factor: int) -> tuple[int, float, str]:
        mesh = gingham.init("2d", size=4)
        return rank * factor, float(mesh.gather(mesh.scatter(torch.ones(4, 4))).sum()), os.environ["WORLD_SIZE"]

    assert spawn(work, 4, 10) == [(rank * 10, 16.0, "4") for rank in range(4)]
    assert leftovers() == before


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
