"""The ranks of one init, from the moment each comes: who has come, who has died, who has failed, who is missing.

Each rank writes its pid into the job's store, reads the others', and watches them while it waits for anything in init: for
a rank that has not come, for what another tells, for Gloo (in a thread, since it cannot be asked to stop).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import MeshError, PeerDied, PeerOutOfMemory, PeerStalled
from ..mesh.layout import list_of
from . import rendezvous
from .hosts import VARIABLE, Host, hosts_of, whereabouts

T = TypeVar("T")
_left_behind: list[threading.Thread] = []  # in Gloo, where they wait for a rank that is gone
FAILED = "failed"  # the store's key for the first rank that did not get through init
PAUSE = 0.02  # seconds between two looks at the peers
PARTING = 1.0  # seconds until all have read why an init failed
GRACE = 0.5  # seconds in which a step may still end that a rank has died in, or after it was through


def failure(rank: int, text: str) -> str:
    return json.dumps({"rank": rank, "text": text})


def about(kind: type[Any], rank: int, text: str) -> BaseException:
    """An error about another rank."""
    error: BaseException = kind(text)
    error.rank = rank  # type: ignore[attr-defined]
    return error


def seen_by_all(error: BaseException) -> BaseException:
    """An error that every rank finds for itself, in what all have told: nobody needs to be told of it, nor blamed for it."""
    error.seen_by_all = True  # type: ignore[attr-defined]
    return error


class Meeting:
    """Of rank `rank` with the others of `ranks`, in an init of at most `timeout` seconds for every step."""

    def __init__(self, rank: int, ranks: tuple[int, ...], timeout: float) -> None:
        self.rank, self.ranks, self.size, self.timeout = rank, ranks, len(ranks), timeout
        _wait_for_those_left_behind(rank)
        self.pids: list[int] = []
        self._watched: dict[int, int | None] = {}  # by rank: its pidfd, None where the system has none for us
        self._others: dict[int, int] = {}  # and its pid
        self.store: Any = None  # of this init; none for one rank
        self._watch: Any = None
        if self.size > 1:
            self.store = rendezvous.store(rank, ranks, timeout)
            # a connection of its own: the first one is busy while Gloo waits in it, and stays so where Gloo is left behind
            self._watch = _Asked(self.store.clone(), rank)

    def arrive(self) -> list[Host]:
        """Tells that this rank is here and waits for all others; the hosts on which they are. Raises PeerStalled naming those that do
        not come, PeerDied, MeshError where only some have a GINGHAM_HOST."""
        mine = whereabouts()
        told = self.exchange("arrived", mine, self._meet)
        named = [rank for rank, other in zip(self.ranks, told, strict=True) if other["named"]]
        if 0 < len(named) < self.size:
            others = [rank for rank in self.ranks if rank not in named]
            raise seen_by_all(
                MeshError(
                    f"{VARIABLE} is set on {list_of(named)} but not on {list_of(others)}: set it on every rank, to one name for each host,"
                    " or on none"
                )
            )
        self.pids = [other["pid"] if other["host"] == mine["host"] else 0 for other in told]
        return hosts_of(told)

    def exchange(self, name: str, value: Any, seen: Callable[[int, Any], None] = lambda rank, value: None) -> list[Any]:
        """Every rank's value (of JSON), in the order of `ranks`."""
        if self.size == 1:
            return [value]
        self._watch.set(f"{name}/{self.rank}", json.dumps(value))
        told: dict[int, Any] = {self.rank: value}
        begun, pause, patient = time.monotonic(), 0.001, name == "arrived"
        while True:
            for rank in self.ranks:
                if rank not in told and self._watch.check([f"{name}/{rank}"]):
                    told[rank] = json.loads(self._watch.get(f"{name}/{rank}"))
                    seen(rank, told[rank])
            if len(told) == self.size:
                return [told[rank] for rank in self.ranks]
            for rank in set(self.ranks) - set(told):
                if (text := rendezvous.gone(rank)) is not None:
                    raise about(PeerDied, rank, f"{text} (told to rank {self.rank}, which waits for it in gingham.init)")
            self._look(name)
            waited, missing = time.monotonic() - begun, [rank for rank in self.ranks if rank not in told]
            if waited > self.timeout:
                raise self._stalled(missing, name)
            if patient and waited > rendezvous.PATIENCE:
                patient = False
                self._warn_of_late(missing)
            time.sleep(pause)
            pause = min(2 * pause, PAUSE)

    def during(self, name: str, work: Callable[[], T], stop: Callable[[int, str], None] = lambda rank, text: None) -> T:
        """work(), which waits for the other ranks, while this thread watches them; `stop` ends work() where it can be ended."""
        if self.size == 1:
            return work()
        answers: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                answers.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name=f"gingham {name}", daemon=True)
        thread.start()
        deadline, patience = time.monotonic() + self.timeout, float("inf")
        try:
            while thread.is_alive():
                thread.join(PAUSE)
                if not thread.is_alive():
                    break
                self._look(name)
                if patience == float("inf") and self._ended():
                    patience = time.monotonic() + GRACE  # it was through, but others may have needed it still
                if time.monotonic() > patience:
                    self._look("")
                if time.monotonic() > deadline:
                    raise self._stalled(self._not_through(name), name)
        except (PeerDied, PeerStalled) as error:
            stop(error.rank, str(error))
            _left_behind.append(thread)
            raise
        if errors:
            self._explain(errors[0], name)
        self._watch.set(f"{name}/{self.rank}", "1")
        return answers[0]

    def _explain(self, error: BaseException, name: str) -> None:
        """Raises what the error comes from: where a peer is gone, Gloo's words hide it."""
        if not isinstance(error, MeshError | PeerDied | PeerStalled | PeerOutOfMemory | MemoryError):
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline:
                self._look("")  # also who was through the step: Gloo may still have needed it
                time.sleep(PAUSE)
        raise error

    def fail(self, error: BaseException) -> None:
        """This rank does not get through init: tells the others, unless they find it out alike. Of a death too, which those on other
        hosts do not see, nor those that Gloo still waits in."""
        if self.store is None:
            return
        if isinstance(error, PeerDied):
            text: str | None = failure(error.rank, str(error).partition(" (told to rank")[0])
        elif isinstance(error, PeerStalled) or hasattr(error, "seen_by_all"):
            text = None
        else:
            text = failure(self.rank, f"rank {self.rank} raised {type(error).__name__} in gingham.init: {error}")
        with contextlib.suppress(dist.DistError, PeerDied):
            if text is not None:
                self._watch.compare_set(FAILED, "", text)
            self._part()

    def _part(self) -> None:
        """Says that this rank has heard of the failure, and where the store ends with this process waits a second for the others to."""
        self._watch.set(f"parted/{self.rank}", "1")
        others = [f"parted/{rank}" for rank in self.ranks if rank != self.rank]
        deadline = time.monotonic() + PARTING
        while rendezvous.keeps_store() and time.monotonic() < deadline and not self._watch.check(others):
            time.sleep(PAUSE)

    def close(self) -> None:
        for handle in self._watched.values():
            if handle is not None:
                os.close(handle)
        self._watched = {}

    def _meet(self, rank: int, other: dict[str, Any]) -> None:
        if other["host"] != whereabouts()["host"]:
            return
        self._others[rank] = other["pid"]
        try:
            self._watched[rank] = os.pidfd_open(other["pid"])
        except ProcessLookupError:
            raise self._dead(rank, other["pid"]) from None
        except OSError:  # not allowed, or not there
            self._watched[rank] = None

    def _look(self, name: str) -> None:
        """Raises PeerDied for a rank that failed, or died before it was through step `name`."""
        if self._watch.check([FAILED]):
            told = json.loads(self._watch.get(FAILED))
            if told["rank"] != self.rank:
                raise about(PeerDied, told["rank"], f"{told['text']} (told to rank {self.rank})")
        for rank in self._ended():
            if not self._watch.check([f"{name}/{rank}"]):
                raise self._dead(rank, self._others[rank])

    def _ended(self) -> list[int]:
        """The ranks of this host whose processes are gone."""
        handles = {handle: rank for rank, handle in self._watched.items() if handle is not None}
        ended = [handles[handle] for handle in select.select(list(handles), [], [], 0)[0]] if handles else []
        return ended + [rank for rank, handle in self._watched.items() if handle is None and _state(self._others[rank]) in ("", "Z", "X")]

    def _dead(self, rank: int, pid: int) -> BaseException:
        told = json.loads(self._watch.get(FAILED)) if self._watch.check([FAILED]) else None
        if told is not None and told["rank"] != self.rank:
            rank, text = told["rank"], told["text"]
            return about(PeerDied, rank, f"{text} (told to rank {self.rank})")
        return about(PeerDied, rank, f"rank {rank} (pid {pid}) died in gingham.init (told to rank {self.rank})")

    def _warn_of_late(self, missing: Sequence[int]) -> None:
        """By the rank that keeps the job's store: who cannot reach that cannot tell so to anyone else."""
        if rendezvous.keeps_store() and not dist.is_initialized():
            where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
            warnings.warn(
                f"gingham.init: {list_of(missing)} did not come within {rendezvous.PATIENCE:g} s; rank {self.rank} waits"
                f" {self.timeout:g} s in all, init(timeout=). If they run, do they reach the job's store here, at {where}, as their"
                " MASTER_ADDR and MASTER_PORT should say?",
                stacklevel=7,
            )

    def _not_through(self, name: str) -> list[int]:
        """Those that hold the others up: stopped ones, else those that have not come through the step."""
        stopped = [rank for rank, pid in self._others.items() if _state(pid) in ("T", "t")]
        late = [rank for rank in self.ranks if rank != self.rank and not self._watch.check([f"{name}/{rank}"])]
        return stopped or late or [self.rank]

    def _stalled(self, ranks: Iterable[int], name: str) -> BaseException:
        missing = sorted(ranks)
        what = "did not come to" if name == "arrived" else "did not answer in"
        return about(
            PeerStalled,
            missing[0],
            f"{list_of(missing)} {what} gingham.init within {self.timeout:g} s (step {name!r}; told to rank {self.rank}); is every one of"
            f" the {self.size} ranks running? init(timeout=) sets the limit",
        )


class _Asked:
    """A store that is asked while others may end: where it is gone, PeerDied says so."""

    def __init__(self, store: Any, rank: int) -> None:
        self._store, self._rank = store, rank

    def check(self, keys: list[str]) -> bool:
        return bool(self._answer(self._store.check, keys))

    def get(self, key: str) -> Any:
        return self._answer(self._store.get, key)

    def set(self, key: str, value: str) -> None:
        self._answer(self._store.set, key, value)

    def compare_set(self, key: str, expected: str, value: str) -> None:
        self._answer(self._store.compare_set, key, expected, value)

    def _answer(self, ask: Callable[..., Any], *what: Any) -> Any:
        try:
            return ask(*what)
        except dist.DistNetworkError as error:
            where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
            text = f"rank 0, or the process that kept the job's store at {where}, has ended in gingham.init: {error}"
            raise about(PeerDied, 0, f"{text} (told to rank {self._rank})") from error


def _wait_for_those_left_behind(rank: int) -> None:
    for thread in list(_left_behind):
        thread.join(1.0)
        if thread.is_alive():
            raise MeshError(
                f"rank {rank}: an earlier init of this process was given up while torch.distributed waited for a rank that was gone"
                f" ({thread.name}), and it waits still: start a new process"
            )
        _left_behind.remove(thread)


def _state(pid: int) -> str:
    """The letter of a process's state; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
