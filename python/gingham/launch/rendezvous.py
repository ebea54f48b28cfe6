"""How the ranks of a job find each other: a store, and torch.distributed's default process group (Gloo), made where there is none.

Ranks come from torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), from gingham.spawn (GINGHAM_STORE
names a file) or, without either, there is one rank. No collective of this group runs inside forward or backward.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import warnings
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import MeshError, PeerStalled
from .gpu import ranks_share_gpus

PATIENCE = 3.0  # seconds until who waits for ranks that may still be starting says so
TRY, PAUSE = 2.0, 0.2  # seconds of one connection to the store that is tried, and until the next
_stores: dict[tuple[str, int], dist.Store] = {}
_meetings: Counter[tuple[str, int, tuple[int, ...]]] = Counter()


def world() -> tuple[int, int]:
    """(rank, size) of the job, without starting anything."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _tcp_store(rank: int, size: int, timeout: float) -> dist.Store:
    """The store of torchrun's environment. Does not wait for the other ranks: who lacks is to be named. Where nobody answers, the job may
    still be starting: that is an error at `timeout`, but after PATIENCE a warning says what is waited for."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise MeshError(f"rank {rank}: MASTER_ADDR={host!r}, MASTER_PORT={port!r}: expected an address of rank 0's host, 1 to 65535")
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeper = "torchrun's agent" if agent else "rank 0"
    knock = _Knock(host, int(port), size, rank == 0 and not agent, timeout)
    if not knock.ended.wait(min(PATIENCE, timeout)) and timeout > PATIENCE:
        warnings.warn(
            f"gingham.init: rank {rank} has waited {PATIENCE:g} s, of {timeout:g} s in all, for the job's store, which {keeper} should keep"
            f" at {host}:{port} (MASTER_ADDR, MASTER_PORT): {knock.why}",
            stacklevel=7,
        )
    knock.ended.wait(max(0.0, knock.deadline - time.monotonic()))
    if isinstance(knock.found, dist.Store):
        return knock.found
    if "EADDRINUSE" in str(knock.found):
        raise MeshError(
            f"rank 0 cannot keep the job's store at {host}:{port}: another program, perhaps an earlier job, has that port; set another"
            " MASTER_PORT on all ranks"
        ) from knock.found
    stalled = PeerStalled(
        f"rank {rank}: no answer within {timeout:g} s at {host}:{port} (MASTER_ADDR, MASTER_PORT), where {keeper} should keep the job's"
        f" store: {knock.why}"
    )
    stalled.rank = 0
    raise stalled from knock.found


class _Knock:
    """Reaches for the job's store in a thread of its own, since a name server, or a silent program at the port, cannot be hurried.

    found: the store, or the last error, once `ended` is set. why: what is in the way as far as is known, and what to do."""

    def __init__(self, host: str, port: int, size: int, serves: bool, timeout: float) -> None:
        self.deadline = time.monotonic() + timeout
        self.ended = threading.Event()
        self.found: dist.Store | Exception | None = None
        self.why = f"no name server has resolved {host} yet; set MASTER_ADDR to an address in numbers"
        self._host, self._port, self._timeout = host, port, timeout
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._make = partial(dist.TCPStore, port=port, world_size=size, wait_for_workers=False, multi_tenant=not agent)
        threading.Thread(target=self._run, args=(serves,), name="gingham knock", daemon=True).start()

    def _run(self, serves: bool) -> None:
        try:
            made = self._make("127.0.0.1", is_master=True, timeout=timedelta(seconds=self._timeout)) if serves else None
            # torch tries twice as long as it is told to where it is refused, and prints its stack each time
            self._await_door()
            if made is None:
                self.why = (
                    f"what listens there does not answer as a job's store; has another program port {self._port}, or is MASTER_ADDR not"
                    " rank 0's host? set another MASTER_PORT on all ranks"
                )
                left = max(1.0, self.deadline - time.monotonic() - PAUSE)
                made = self._make(self._host, is_master=False, timeout=timedelta(seconds=left))
                made.set_timeout(timedelta(seconds=self._timeout))
            self.found = made
        except Exception as error:
            self.found = error
        self.ended.set()

    def _await_door(self) -> None:
        """Returns once somebody listens at the port; raises the last OSError at the deadline."""
        while True:
            left = self.deadline - time.monotonic()
            try:
                socket.create_connection((self._host, self._port), max(PAUSE, min(TRY, left))).close()
                return
            except OSError as error:
                self.why = _advice(error, self._port)
                if left < PAUSE:
                    raise
            time.sleep(PAUSE)


def _advice(error: OSError, port: int) -> str:
    """What to do where a connection to the store's port fails so."""
    if isinstance(error, socket.gaierror):
        return f"this host knows no such name ({error.strerror}); set MASTER_ADDR to an address of rank 0's host"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused; does rank 0 run, on the host that MASTER_ADDR names, with the same MASTER_PORT?"
    if isinstance(error, TimeoutError):
        return f"no answer; is MASTER_ADDR rank 0's host, is that up, and does a firewall drop TCP to port {port}? open it"
    return f"{error.strerror or error}; set MASTER_ADDR to an address of rank 0's host in a network that this host reaches"


def store(rank: int, ranks: tuple[int, ...], timeout: float) -> dist.Store:
    """A store of one init, the same on all its ranks; that of the environment is kept, since rank 0 cannot open its port a second time."""
    size = world()[1]
    path = os.environ.get("GINGHAM_STORE", "")
    address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    if dist.is_initialized():
        key, made = ("torch.distributed", size), dist.distributed_c10d._get_default_store()
    elif path or address != ":":
        key = (path or address, size)
        if key not in _stores:
            _stores[key] = dist.FileStore(path, size) if path else _tcp_store(rank, size, timeout)
        made = _stores[key]
    else:
        return dist.HashStore()
    _meetings[*key, ranks] += 1
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    whose = "" if len(ranks) == size else f".{'-'.join(map(str, ranks))}"
    return dist.PrefixStore(f"gingham{attempt}.{_meetings[*key, ranks]}{whose}", made)


def keeps_store() -> bool:
    """Whether the job's store ends with this process: rank 0's, unless torchrun's agent or a file has it."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return world()[0] == 0 and not agent and not os.environ.get("GINGHAM_STORE") and bool(os.environ.get("MASTER_ADDR"))


def next_number(made: dist.Store | None) -> int:
    """A number of a program that no other of the job has: an even one, the next odd one is free too. made: a store of any init."""
    while isinstance(made, dist.PrefixStore):
        made = made.underlying_store
    return 2 * (1 if made is None else int(made.add("gingham.programs", 1)))


def tell_gone(path: str, rank: int, text: str) -> None:
    """Beside the store of gingham.spawn (`path`): this rank will not come to an init any more."""
    if path and Path(path).parent.is_dir():
        whole = Path(f"{path}.gone{rank}.{os.getpid()}")
        whole.write_text(text)
        whole.rename(f"{path}.gone{rank}")


def gone(rank: int) -> str | None:
    """What tell_gone told of the rank."""
    path = os.environ.get("GINGHAM_STORE", "")
    try:
        return Path(f"{path}.gone{rank}").read_text() if path else None
    except OSError:
        return None


def make_process_group(device: str = "cpu", made: dist.Store | None = None) -> bool:
    """Creates the default process group unless there is one (Gloo, and for CUDA tensors NCCL where it runs); returns whether it did.
    `made`: a store that all ranks have; without it one of the environment."""
    if dist.is_initialized():
        return False
    rank, size = world()
    if "MASTER_ADDR" not in os.environ or os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" and torch.cuda.is_available() and not ranks_share_gpus() else "gloo"
    made = dist.HashStore() if size == 1 else made or store(rank, tuple(range(size)), 60.0)
    dist.init_process_group(backend, store=dist.PrefixStore("group", made), rank=rank, world_size=size)
    return True


def destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
