"""Jobs of several hosts that are started wrongly: the same message on every rank within seconds, saying what to do."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import gingham
from gingham import native
from virtual import ENGINES, on_host, split

LIMIT = 5.0  # seconds until every rank has said what is wrong
PAIRS = split(2, 2)
Wrong = Callable[[int], Any]  # of a rank: a context in which it starts


@contextlib.contextmanager
def another_engine(rank: int) -> Iterator[None]:
    if rank == 3:
        os.environ["GINGHAM_ENGINE"] = "gloo" if os.environ["GINGHAM_ENGINE"] == "ucx" else "ucx"
    yield


@contextlib.contextmanager
def no_engine(rank: int) -> Iterator[None]:
    if rank == 3:
        os.environ["GINGHAM_ENGINE"] = "mpi"
    yield


@contextlib.contextmanager
def another_version(rank: int) -> Iterator[None]:
    with mock.patch.object(native, "version", lambda: "0.0.1") if rank == 3 else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def a_name_on_some(rank: int) -> Iterator[None]:
    if rank >= 2:
        del os.environ["GINGHAM_HOST"]
    yield


def memory_elsewhere(path_of: Callable[[str], str]) -> Wrong:
    """Rank 3 is told that it shares a host with rank 2, whose path leads to other memory on its own."""

    @contextlib.contextmanager
    def wrong(rank: int) -> Iterator[None]:
        joined = native.Job

        def job(rank: int, size: int, path: str, *rest: Any) -> Any:
            return joined(rank, size, path_of(path) if path else path, *rest)

        with mock.patch.object(native, "Job", job) if rank == 3 else contextlib.nullcontext():
            yield

    return wrong


def nothing(path: str) -> str:
    return "/proc/1/fd/987654"


def another_jobs(path: str) -> str:
    """The memory of a job of the same size that is not this one."""
    with contextlib.suppress(Exception):
        kept.append(native.Job(0, 4, "", 5.0, 0, [0, 1]))
    return str(kept[-1].path)


def a_pipe(path: str) -> str:
    kept.append(os.pipe())
    return f"/proc/{os.getpid()}/fd/{kept[-1][0]}"


def zeros(path: str) -> str:
    handle = os.memfd_create("other")
    os.ftruncate(handle, Path(path).stat().st_size)
    return f"/proc/{os.getpid()}/fd/{handle}"


def text(path: str) -> str:
    handle = os.memfd_create("other")
    os.write(handle, b"hello")
    return f"/proc/{os.getpid()}/fd/{handle}"


kept: list[Any] = []
WRONG: dict[str, tuple[Wrong, tuple[str, ...]]] = {
    "another engine": (another_engine, ("ranks [3] called init differently", "engine", "gloo", "ucx")),
    "an engine that is none": (no_engine, ("GINGHAM_ENGINE='mpi'", "'ucx' or 'gloo'")),
    "another version": (another_version, ("ranks [3] called init differently", "gingham 0.0.1")),
    "a name on some ranks": (a_name_on_some, ("GINGHAM_HOST", "ranks 0, 1", "ranks 2, 3")),
    "no memory at the path": (
        memory_elsewhere(nothing),
        ("GINGHAM_HOST", "rank 3 cannot share the memory of rank 2", "host b (ranks 2, 3)"),
    ),
    "another job's memory": (
        memory_elsewhere(another_jobs),
        ("GINGHAM_HOST", "rank 3 cannot share the memory of rank 2", "host b (ranks 2, 3)"),
    ),
    "zeros": (memory_elsewhere(zeros), ("GINGHAM_HOST", "rank 3 cannot share the memory of rank 2", "host b (ranks 2, 3)")),
    "a pipe": (memory_elsewhere(a_pipe), ("GINGHAM_HOST", "rank 3 cannot share the memory of rank 2", "host b (ranks 2, 3)")),
    "another file": (memory_elsewhere(text), ("GINGHAM_HOST", "rank 3 cannot share the memory of rank 2", "host b (ranks 2, 3)")),
}


def started(rank: int, case: str, engine: str) -> tuple[str, str, float, float]:
    """What the wrong start said, when it began and ended; a right one follows."""
    begun = time.monotonic()
    with on_host(rank, PAIRS, engine), WRONG[case][0](rank):
        try:
            gingham.init(mode="2d", size=4, timeout=20.0)
            return "nothing", "", begun, time.monotonic()
        except Exception as error:
            kind, text, ended = type(error).__name__, str(error), time.monotonic()
    with on_host(rank, PAIRS, engine):
        mesh = gingham.init(mode="2d", size=4, timeout=20.0)
    x = torch.arange(16.0).view(4, 4)
    assert torch.equal(mesh.gather(mesh.scatter(x)), x)
    return kind, text, begun, ended


@pytest.mark.parametrize(
    ("case", "engine"),
    [
        pytest.param(case, engine, marks=[] if (engine == "ucx") == (at % 2 == 0) else [pytest.mark.matrix])
        for at, case in enumerate(WRONG)
        for engine in ENGINES
    ],
)
def test_a_wrong_start_is_told_to_all(ranks, case: str, engine: str) -> None:
    answers = ranks(4)(started, case, engine)
    for rank, (kind, text, *_) in enumerate(answers):
        assert kind in ("MeshError", "PeerDied"), (rank, kind, text)
        for word in WRONG[case][1]:
            assert word in text, (rank, word, text)
    assert max(ended for *_, ended in answers) - max(begun for *_, begun, _ in answers) < LIMIT
