"""Attention over a cut sequence in which a rank dies, or makes another call than the rest: all others are told who, and what."""

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from gingham.autograd.ring import CutSequence, Way
from gingham.nn.sequence import attend_sequence
from pool import RankError

LIMIT = 1.0  # seconds until all others know


def dying(rank: int, source: str, way: Any, op: str, victim: int) -> Any:
    """Attention under a fault, until it is known; op "amid": the victim dies inside of attention, which a slow link draws out."""
    amid = op == "amid"
    if not amid:
        os.environ["GINGHAM_FAULT"] = f"rank={victim},op={op},call=2,kind=kill"
    try:
        mesh = gingham.init(grid=(4, 1, 1), source=source, timeout=30.0, link=(0.2, 0.0) if amid else None)
        if amid and rank == victim:
            threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        if amid:
            name = "ring" if way is True else way
            call = Way(CutSequence(mesh, ("m",), (16,) * 4, rank), True, 0.5)
            q, k, v = (torch.randn(16, 2, 8, 4).requires_grad_() for _ in range(3))
            for _ in range(20):
                attend_sequence(name, q, k, v, None, call).sum().backward()
        layer = nn.SelfAttention(32, 8, dim=1, ring=way)
        x = mesh.scatter(torch.randn(2, 64, 32), "x", 1)
        for _ in range(20):
            layer(x).sum().backward()
    except gingham.PeerDied as error:
        return error.rank, time.monotonic()
    finally:
        os.environ.pop("GINGHAM_FAULT", None)
    return None


CASES = [
    (source, way, op, victim)
    for source in ("window", "ring")
    for way, ops in ((True, ("attention.forward", "attention.backward", "amid")), ("heads", ("exchange", "amid")))
    for op in ops
    for victim in (0, 2)
]
QUICK = {("window", True, "attention.forward", 2), ("ring", True, "attention.backward", 0), ("window", True, "amid", 2)}


@pytest.mark.parametrize(
    ("source", "way", "op", "victim"), [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.matrix]) for case in CASES]
)
def test_a_death_in_the_ring_is_named_by_all_within_a_second(ranks, source: str, way: Any, op: str, victim: int) -> None:
    outcomes = ranks(4)(dying, source, way, op, victim, outcomes=True, timeout=60.0)
    others = [outcome for rank, outcome in enumerate(outcomes) if rank != victim]
    assert isinstance(outcomes[victim], RankError), outcomes[victim]
    assert [outcome[0] for outcome in others] == [victim] * 3, outcomes
    assert max(at for _, at in others) - min(at for _, at in others) <= LIMIT


# what rank 1 does otherwise, and a word of it in the error that all get
OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "samples": (dict(batch=3), "K=96"),
    "causal": (dict(causal=False), "causal=False"),
    "scale": (dict(scale=0.3), "scale=0.3"),
    "dropout": (dict(dropout=0.25), "p=0.25"),
    "dtype": (dict(dtype=torch.float64), "float64"),
    "heads of keys": (dict(kv_heads=2), "kv_heads=2"),
    "order": (dict(order="zigzag"), "order='zigzag'"),
    "mask": (dict(mask=True), "attention causal with a mask"),
    "way": (dict(ring="heads"), "ring='heads'"),
}


def differing(rank: int, change: dict[str, Any]) -> str:
    mesh = gingham.init(grid=(3, 1, 1), timeout=20.0)
    changed = change if rank == 1 else {}
    options = {"batch": 2, "dtype": torch.float32, "mask": False, "ring": True} | changed
    batch, dtype, masked = (options.pop(name) for name in ("batch", "dtype", "mask"))
    full = torch.ones(batch, 12, 32, dtype=dtype)
    layer = nn.SelfAttention(32, 8, dim=1, dtype=dtype, **options)
    x = mesh.scatter(full, "x", 1) if batch == 2 and dtype == torch.float32 else full[:, 4:8].contiguous()
    mask = torch.ones(1, 1, 1, 12, dtype=torch.bool) if masked else None
    try:
        layer(x, mask)
    except (gingham.MeshError, gingham.ShapeError, gingham.PeerDied) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", ["scale", *(pytest.param(name, marks=pytest.mark.matrix) for name in OTHERWISE if name != "scale")])
def test_other_calls_are_told_by_name(ranks, name: str) -> None:
    change, words = OTHERWISE[name]
    for told in ranks(3)(differing, change):
        assert "rank 1" in told and any(word in told for word in words.split("|")), told
