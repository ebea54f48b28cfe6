"""gingham.spawn: run a function on n new processes of this host and return what they return.

The processes are forked from a server that has imported torch and gingham once, so that starting them costs
milliseconds after the first call. Functions travel by cloudpickle (lambdas and notebook cells work); the script that
calls spawn is not imported again, so it needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

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
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from . import job, mesh
from .errors import PeerDied, PeerStalled

PR_SET_PDEATHSIG = 1
GRACE = 5.0  # seconds that the other ranks get to notice a failure and say what they saw


def spawn(fn: Callable[..., Any], n: int, *args: Any) -> list[Any]:
    """Runs fn(rank, *args) on n new processes; returns their values in rank order.

    Each process sees RANK, WORLD_SIZE and LOCAL_RANK and uses one thread. An exception of a rank is raised here again
    with `.rank` set and its traceback as a note; of several, the first that is not merely the news of another's death.
    A rank that dies without one is PeerDied(rank). No process and no file is left behind.
    """
    payload = cloudpickle.dumps((fn, args))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "torch._dynamo", "cloudpickle", "gingham"])
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
            return _collect(processes, pipes)
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
    handle = os.pidfd_open(caller)

    def watch() -> None:
        select.select([handle], [], [])
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
    mesh.set_num_threads(1)
    try:
        fn, args = cloudpickle.loads(payload)
        answer = cloudpickle.dumps((fn(rank, *args), None, ""))
    except BaseException as error:
        job.report_failure(error)
        text = "".join(traceback.format_exception(error))
        try:
            answer = cloudpickle.dumps((None, error, text))
            cloudpickle.loads(answer)
        except Exception:
            answer = cloudpickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), text))
    try:
        job.destroy()
    finally:
        pipe.send_bytes(answer)
        pipe.close()


def _collect(processes: list[Any], pipes: list[Connection]) -> list[Any]:
    values: list[Any] = [None] * len(pipes)
    errors: list[tuple[bool, BaseException]] = []  # (whether the rank failed by itself, its error)
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline: float | None = None
    while waiting:
        ready = wait(list(waiting), None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            values[rank], error, own = _receive(processes[rank], pipe, rank)
            if error is not None:
                errors.append((own, error))
                deadline = deadline or time.monotonic() + GRACE
    if errors:
        raise next((error for own, error in errors if own), errors[0][1])
    return values


def _receive(process: Any, pipe: Connection, rank: int) -> tuple[Any, BaseException | None, bool]:
    try:
        value, error, text = cloudpickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        process.join()
        died = PeerDied(f"rank {rank} died with exit code {process.exitcode}")
        died.rank = rank
        return None, died, True
    own = not isinstance(error, PeerDied | PeerStalled)
    if error is not None:
        if own:
            error.rank = rank
        error.add_note(f"raised on rank {rank}:\n{text}")
    return value, error, own
