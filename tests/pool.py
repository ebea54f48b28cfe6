"""A pool of n rank processes that lives as long as the test run: starting ranks costs seconds, a call only milliseconds.

Functions and results travel as cloudpickle over one pipe a rank. A call that fails leaves ranks in states nobody can
know, so the pool is replaced after it; the ranks are forked from a server that has imported torch but started no thread.
"""

import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle

import on_gpu
from gingham.launch import rendezvous
from gingham.launch.spawn import rank_environment

# seconds in every rank, once in their server; those not installed are left out
MODELS = [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "bert", "vit")]
GRACE = 10.0  # seconds in which the other ranks may notice that one has failed


class RankError(RuntimeError):
    """A rank raised: carries its number, its traceback and, where it could be pickled, the exception as `error`."""

    def __init__(self, rank: int, text: str, error: BaseException | None = None) -> None:
        super().__init__(f"rank {rank}:\n{text}")
        self.rank, self.error = rank, error
        self.kind = text if error is None else f"raised {type(error).__name__}: {error}"


def _answer(rank: int, message: bytes) -> bytes:
    import torch

    from gingham import checks
    from gingham.launch.init import report_failure

    try:
        fn, args, environment = on_gpu.loads(message)
        os.environ.update(environment)
        torch.manual_seed(0)  # a test may have left the ranks' generators apart
        checks._compiled = False  # a test may have compiled something, which ends the first step's check
        result = on_gpu.dumps((True, fn(rank, *args), None))
    except BaseException as error:
        report_failure(error)
        text = traceback.format_exc()
        try:
            result = cloudpickle.dumps((False, text, error))
        except Exception:
            result = cloudpickle.dumps((False, text, None))
    return result


def serve(rank: int, pipe: Connection) -> None:
    """The loop of one rank; a call's mesh is destroyed before the next call."""
    import torch

    from gingham import native
    from gingham.launch import init

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.current_process()._config["daemon"] = False  # ranks have data loaders with workers
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    native.set_num_threads(1)
    on_gpu.begin(rank)
    gc.freeze()  # what the server imported is never garbage: destroy() need not look through it after every call
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_answer(rank, message))
        init.destroy()


class Pool:
    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="gingham-ranks-")
        self._calls = 0
        self._store = ""
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.tensor", "cloudpickle", "gingham", *MODELS])
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs), daemon=True, name=f"rank {rank}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def close(self) -> None:
        self.stop()
        self._folder.cleanup()

    def __call__(self, fn: Any, *args: Any, timeout: float = 120.0, outcomes: bool = False) -> list[Any]:
        """fn(rank, *args) on every rank, results in rank order. The first failure is raised as RankError, or with
        `outcomes` every rank's result or RankError is returned (a rank that died is a RankError too)."""
        module = sys.modules.get(getattr(fn, "__module__", ""))
        if module is not None and not module.__name__.startswith(("gingham", "torch")):
            cloudpickle.register_pickle_by_value(module)
        if not self._processes:
            self._start()
        self._calls += 1
        self._store = str(Path(self._folder.name) / f"store{self._calls}")
        for rank, pipe in enumerate(self._pipes):
            pipe.send_bytes(cloudpickle.dumps((fn, args, rank_environment(rank, self.size, self._store))))
        results, failures = self._collect(timeout)
        if failures:
            self.stop()
        if outcomes:
            return results
        if failures:
            raise failures[0]
        return results

    def _collect(self, timeout: float) -> tuple[list[Any], list[RankError]]:
        results: list[Any] = [None] * self.size
        failures: list[RankError] = []
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for pipe in ready or list(waiting):
                rank = waiting.pop(pipe)  # type: ignore[index,arg-type]
                results[rank] = self._receive(pipe, rank) if ready else RankError(rank, f"no answer within {timeout:.0f} s")
                if isinstance(results[rank], RankError):
                    rendezvous.tell_gone(self._store, rank, f"rank {rank} {results[rank].kind}")  # as gingham.spawn does
                    failures.append(results[rank])
                    deadline = min(deadline, time.monotonic() + GRACE)
        return results, failures

    def _receive(self, pipe: Any, rank: int) -> Any:
        try:
            good, value, error = cloudpickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            return RankError(rank, f"died with exit code {self._processes[rank].exitcode}")
        return value if good else RankError(rank, value, error)
