"""gingham.spawn: run a function on n new processes of this host and return what they return.

The processes are forked from a server that has imported torch and gingham once, so that starting them costs
milliseconds after the first call. Functions travel by cloudpickle (lambdas and notebook cells work); the script that
calls spawn is not imported again, so it needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import copyreg
import ctypes
import multiprocessing
import os
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from .. import native
from ..errors import PeerDied, PeerOutOfMemory, PeerStalled
from . import init, rendezvous

# a function of the caller's script may name torch.ops, or an operation of it, which travels by its name
copyreg.pickle(torch._ops._Ops, lambda ops: (getattr, (torch, "ops")))
copyreg.pickle(torch._ops._OpNamespace, lambda namespace: (getattr, (torch.ops, namespace.name)))
copyreg.pickle(torch._ops.OpOverloadPacket, lambda packet: (getattr, (_namespace_of(packet), packet.__name__)))
copyreg.pickle(torch._ops.OpOverload, lambda op: (getattr, (op._overloadpacket, op._overloadname)))


def _namespace_of(packet: torch._ops.OpOverloadPacket) -> Any:
    return getattr(torch.ops, packet._qualified_op_name.partition("::")[0])


PR_SET_PDEATHSIG = 1
GRACE = 5.0  # seconds that the other ranks get to notice a failure and say what they saw


def spawn(fn: Callable[..., Any], n: int, *args: Any) -> list[Any]:
    """Runs fn(rank, *args) on n new processes; returns their values in rank order.

    Each process sees RANK, WORLD_SIZE and LOCAL_RANK and uses one thread. An exception of a rank is raised here again
    with `.rank` set and its traceback as a note; of several, that of the rank which the others name, not their news of it.
    A rank that dies without one is PeerDied(rank), also one that calls sys.exit with a status other than 0, or with 0 while
    others wait for it; where none does, sys.exit(0) is a return of None. No process and no file is left behind.
    """
    payload = cloudpickle.dumps((fn, args))
    context = start_server()
    processes, pipes = [], []
    with tempfile.TemporaryDirectory(prefix="gingham-") as folder:
        try:
            for rank in range(n):
                ours, theirs = context.Pipe(duplex=False)
                environment = {**os.environ, **rank_environment(rank, n, str(Path(folder) / "store"))}
                process = context.Process(
                    target=_serve,
                    args=(rank, os.getpid(), environment, payload, theirs, multiprocessing.get_start_method()),
                    daemon=True,
                    name=f"rank {rank}",
                )
                with _main_hidden():
                    process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            return _collect(processes, pipes, str(Path(folder) / "store"))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def rank_environment(rank: int, size: int, store: str) -> dict[str, str]:
    """What init() reads; `store` is the path of a file that need not exist."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GINGHAM_STORE": store,
        "OMP_NUM_THREADS": "1",
    }


def start_server() -> Any:
    """The multiprocessing context whose server forks ranks, with the server running: it and they ignore the signals that this process
    ignored when it was started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "torch._dynamo", "cloudpickle", "gingham"])
    forkserver.ensure_running()
    return context


@contextmanager
def _main_hidden() -> Any:
    """multiprocessing would import the caller's script again in the child; cloudpickle makes that needless."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _die_with(caller: int) -> None:
    """The server forks the ranks, so that PDEATHSIG watches the server; a thread watches the caller itself."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        handle = os.pidfd_open(caller)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
    except OSError:  # a container may forbid it
        handle = None

    def watch() -> None:
        if handle is not None:
            select.select([handle], [], [])
        while handle is None and Path(f"/proc/{caller}").exists():
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="gingham caller watch", daemon=True).start()


def _serve(rank: int, caller: int, environment: dict[str, str], payload: bytes, pipe: Connection, method: str) -> None:
    _die_with(caller)
    # a rank may have children, a data loader's workers; it is a daemon only so that its caller's end ends it
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    multiprocessing.set_start_method(method, force=True)  # as the caller's own children start, not as this one did
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    native.set_num_threads(1)
    try:
        fn, args = cloudpickle.loads(payload)
        answer = cloudpickle.dumps((fn(rank, *args), None, ""))
    except SystemExit as end:
        if end.code:
            init.report_failure(end)
        answer = cloudpickle.dumps((None, Exit(rank, end.code), ""))
    except BaseException as error:
        init.report_failure(error)
        text = "".join(traceback.format_exception(error))
        try:
            answer = cloudpickle.dumps((None, error, text))
            cloudpickle.loads(answer)
        except Exception:
            answer = cloudpickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), text))
    try:
        init.destroy()
    finally:
        pipe.send_bytes(answer)
        pipe.close()


@dataclass
class Exit:
    """A rank's sys.exit."""

    rank: int
    code: Any

    def error(self) -> BaseException:
        died = PeerDied(f"rank {self.rank} called sys.exit({self.code!r}) before its function returned")
        died.rank = self.rank
        return died


@dataclass
class Outcome:
    """What became of a rank: its value, or its error, and whether that is its own or the news of another's."""

    value: Any = None
    error: BaseException | None = None
    own: bool = False
    exited: bool = False  # by sys.exit(0), which is an error only where others waited

    def words(self, rank: int) -> str:
        """For those who wait for the rank in init."""
        if isinstance(self.error, PeerDied):
            return str(self.error)
        return f"rank {rank} {'returned' if self.error is None else f'raised {type(self.error).__name__}: {self.error}'}"


# What a rank says whose peer is gone, where it waited in torch.distributed and not in gingham.
_NEWS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "recvValue failed", "sendBytes failed")


def _collect(processes: list[Any], pipes: list[Connection], store: str) -> list[Any]:
    outcomes: dict[int, Outcome] = {}  # in the order in which they came
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline: float | None = None
    while waiting:
        ready = wait(list(waiting), None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            outcomes[rank] = _receive(processes[rank], pipe, rank)
            rendezvous.tell_gone(store, rank, outcomes[rank].words(rank))
            if outcomes[rank].error is not None and not outcomes[rank].exited:
                deadline = deadline or time.monotonic() + GRACE
    if any(outcome.error is not None and not outcome.exited for outcome in outcomes.values()):
        raise _culprit(outcomes)
    return [outcomes[rank].value for rank in range(len(pipes))]


def _culprit(outcomes: dict[int, Outcome]) -> BaseException:
    """The error that the others come from: of a rank that another names, else the first of a rank's own."""
    failed = {rank: outcome for rank, outcome in outcomes.items() if outcome.error is not None}
    named = [outcome.error.rank for outcome in failed.values() if isinstance(outcome.error, PeerDied | PeerStalled | PeerOutOfMemory)]
    ranked = [outcome for rank, outcome in failed.items() if outcome.own and not outcome.exited]
    for outcome in [failed[rank] for rank in named if rank in failed and failed[rank].own] + ranked:
        if not _is_news(outcome.error):
            return outcome.error  # type: ignore[return-value]
    exited = [outcome for outcome in failed.values() if outcome.exited]
    first = (exited or ranked or list(failed.values()))[0]
    assert first.error is not None
    return first.error


def _is_news(error: BaseException | None) -> bool:
    return type(error).__name__.startswith("Dist") or (isinstance(error, RuntimeError) and any(word in str(error) for word in _NEWS))


def _receive(process: Any, pipe: Connection, rank: int) -> Outcome:
    try:
        value, error, text = cloudpickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        process.join()
        died = PeerDied(f"rank {rank} {_end(process.exitcode)}")
        died.rank = rank
        return Outcome(error=died, own=True)
    if isinstance(error, Exit):
        return Outcome(error=error.error(), own=True, exited=not error.code)
    own = not isinstance(error, PeerDied | PeerStalled | PeerOutOfMemory)
    if error is not None:
        if own:
            error.rank = rank
        error.add_note(f"raised on rank {rank}:\n{text}")
    return Outcome(value, error, own)


def _end(code: int | None) -> str:
    """How a process ended that said nothing: its status in words."""
    if code is None or code >= 0:
        return f"died with exit code {code}"
    name = signal.Signals(-code).name if -code in {each.value for each in signal.Signals} else "?"
    hint = ", perhaps out of memory (see dmesg, or the memory.events of its cgroup)" if -code == signal.SIGKILL else ""
    return f"died with exit code {code}: killed (signal {-code}, {name}){hint}"
