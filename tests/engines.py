"""Ranks that have an engine between them, each as if alone on its host: all on this machine, over its loopback."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gingham.launch import engines, rendezvous


@contextmanager
def engine(name: str, rank: int, size: int) -> Iterator[Any]:
    """The core's engine of this rank, connected to all others; left in order at the end."""
    opened = engines.open_engine(name, rank, range(size), rendezvous.store(rank, tuple(range(size)), 30.0), 30.0, "lo")
    try:
        yield opened.engine
    finally:
        opened.close()


def message(sender: int, receiver: int, tag: int, number: int, size: int) -> torch.Tensor:
    """Bytes that no other message of these has."""
    seed = int.from_bytes(hashlib.sha256(repr((sender, receiver, tag, number)).encode()).digest()[:4], "little")
    return (torch.arange(size) * 31 + seed).to(torch.uint8)


def wait(engine: Any, *tickets: int, seconds: float = 20.0) -> None:
    for ticket in tickets:
        assert engine.wait(ticket, seconds), f"ticket {ticket} has not ended within {seconds} s"
