"""How the ranks of a job find each other: torch.distributed's default process group (Gloo), made where there is none.

Ranks come from torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), from gingham.spawn (GINGHAM_STORE
names a file) or, without either, there is one rank. No collective of this group runs inside forward or backward.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

_stores: dict[tuple[str, int], dist.Store] = {}
_groups_made = 0


def world() -> tuple[int, int]:
    """(rank, size) of the job, without starting anything."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _store(size: int) -> dist.Store:
    """The store of the environment, kept: rank 0 of torchrun cannot open its port a second time."""
    path = os.environ.get("GINGHAM_STORE", "")
    address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    key = (path or address, size)
    if key not in _stores:
        if path:
            _stores[key] = dist.FileStore(path, size)
        elif address != ":":
            _stores[key] = next(iter(dist.rendezvous("env://")))[0]
        else:
            return dist.HashStore()
    return _stores[key]


def make_process_group(device: str = "cpu") -> bool:
    """Creates the default process group unless there is one (Gloo, and NCCL for CUDA tensors); returns whether it did."""
    global _groups_made
    if dist.is_initialized():
        return False
    rank, size = world()
    if "MASTER_ADDR" not in os.environ or os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _groups_made += 1
    store = dist.PrefixStore(f"gingham{_groups_made}", _store(size))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" and torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return True


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
