"""How the ranks of a job find each other: a store, and torch.distributed's default process group (Gloo), made where there is none.

Ranks come from torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), from gingham.spawn (GINGHAM_STORE
names a file) or, without either, there is one rank. No collective of this group runs inside forward or backward.
"""

from __future__ import annotations

import os
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import PeerStalled

_stores: dict[tuple[str, int], dist.Store] = {}
_meetings: Counter[tuple[str, int, tuple[int, ...]]] = Counter()


def world() -> tuple[int, int]:
    """(rank, size) of the job, without starting anything."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _tcp_store(rank: int, size: int, timeout: float) -> dist.Store:
    """The store of torchrun's environment. Does not wait for the other ranks: who lacks is to be named."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            host, int(port), size, rank == 0 and not agent, timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=not agent
        )
    except dist.DistError as error:
        where = "torchrun's agent" if agent else "rank 0"
        stalled = PeerStalled(
            f"rank {rank}: no answer within {timeout:g} s at {host}:{port} (MASTER_ADDR, MASTER_PORT), where {where} should keep the"
            f" job's store; is it running, and is the port free? ({error})"
        )
        stalled.rank = 0
        raise stalled from error


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
    """Creates the default process group unless there is one (Gloo, and NCCL for CUDA tensors); returns whether it did.
    `made`: a store that all ranks have; without it one of the environment."""
    if dist.is_initialized():
        return False
    rank, size = world()
    if "MASTER_ADDR" not in os.environ or os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" and torch.cuda.is_available() else "gloo"
    made = dist.HashStore() if size == 1 else made or store(rank, tuple(range(size)), 60.0)
    dist.init_process_group(backend, store=dist.PrefixStore("group", made), rank=rank, world_size=size)
    return True


def destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
