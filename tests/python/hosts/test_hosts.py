"""A job of several hosts computes what one host computes, to the bit, and counts the same bytes; what crossed hosts is theory's."""

import functools
import itertools
from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from grids import GRIDS, ranks_of
from virtual import ENGINES, name_of, on_host, split, ways

Hosts = tuple[int, ...]
Answer = tuple[list[Any], dict[str, dict[str, int]]]  # values, and counts by axis
WIDTH, BATCH, TIME, WORDS, CLASSES = 48, 5, 4, 29, 19


class Stack(torch.nn.Module):
    """One of each layer, at sizes that nothing divides."""

    def __init__(self, dropout: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.SelfAttention(WIDTH, 12)
        self.dropout = nn.Dropout(0.2 if dropout else 0.0)
        self.first = nn.Linear(WIDTH, 53, layout="outer->inner", epilogue="gelu")
        self.second = nn.Linear(53, WIDTH, bias=False, layout="inner->outer")
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = x + self.dropout(self.attention(self.norm(x)))
        return self.head(x + self.second(self.first(x)))


def trained(mesh: gingham.Mesh, steps: int = 1) -> list[Any]:
    torch.manual_seed(2)
    model = Stack(dropout=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found: list[Any] = []
    for _ in range(steps):
        ids, target = torch.randint(WORDS, (BATCH, TIME)), torch.randint(CLASSES, (BATCH, TIME))
        logits = model(mesh.scatter(ids))
        loss = gingham.cross_entropy(logits, mesh.scatter(target))
        optimizer.zero_grad()
        loss.backward()
        found += [mesh.gather(logits), loss, *(weight.grad.to_local().clone() for weight in model.parameters())]
        found.append(gingham.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
    return found + [weight.to_local() for weight in model.parameters()]


def paired(mesh: gingham.Mesh, rows: int, wide: int, narrow: int, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(4)
    first = nn.Linear(wide, narrow, layout="outer->inner", dtype=dtype)
    second = nn.Linear(narrow, wide, layout="inner->outer", epilogue="gelu", dtype=dtype)
    x = mesh.scatter(torch.randn(rows, wide).to(dtype)).requires_grad_()
    y = second(first(x))
    y.backward(mesh.scatter(torch.randn(rows, wide).to(dtype)))
    return [mesh.gather(y), x.grad, *(weight.grad.to_local() for each in (first, second) for weight in each.parameters())]


def multiplied(mesh: gingham.Mesh, m: int, k: int, n: int) -> list[Any]:
    torch.manual_seed(5)
    a, b = mesh.scatter(torch.randn(m, k), "a").requires_grad_(), mesh.scatter(torch.randn(k, n), "b").requires_grad_()
    c = gingham.matmul(a, b, shape=(m, k, n))
    c.square().sum().backward()
    return [mesh.gather(c, "c"), a.grad, b.grad]


def everything(rank: int, grid: dict[str, Any], hosts: Hosts, engine: str) -> Answer:
    with on_host(rank, hosts, engine):
        mesh = gingham.init(**grid, timeout=30.0)
    found = trained(mesh)
    found += paired(mesh, 8, 24, 48, torch.float32) + paired(mesh, 7, 37, 19, torch.float32) + paired(mesh, 7, 37, 19, torch.bfloat16)
    found += multiplied(mesh, 24, 48, 12) + multiplied(mesh, 7, 37, 19)
    return [x.detach() for x in found], mesh.traffic()


_alone: dict[tuple[str, str], list[Answer]] = {}


def on_one_host(ranks: Any, name: str, source: str) -> list[Answer]:
    if (name, source) not in _alone:
        _alone[name, source] = ranks(ranks_of(name))(everything, GRIDS[name] | {"source": source}, (), "")
    return _alone[name, source]


@functools.cache
def blas_keeps_bits() -> bool:
    """Whether the BLAS gives a product's bits wherever its operands stand: panels are read in place on one host and from a buffer of their
    own on several, with other leading dimensions. MKL on an AMD EPYC does not; it is torch's own library, whose choice is not ours."""
    generator = torch.Generator().manual_seed(0)
    for m, k, n in itertools.product(range(1, 9), range(1, 40), (1, 5, 9, 10, 12, 19, 24, 37)):
        a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
        right = a @ b
        for more in (1, 5, 18):
            wide_a, wide_b = torch.zeros(m, k + more), torch.zeros(k, n + more)
            wide_a[:, :k], wide_b[:, :n] = a, b
            if not (torch.equal(wide_a[:, :k] @ b, right) and torch.equal(a @ wide_b[:, :n], right)):
                return False
    return True


def same(there: torch.Tensor, here: torch.Tensor) -> bool:
    """Equal in every bit, or where the BLAS does not keep bits within rounding."""
    if torch.equal(there, here) or blas_keeps_bits() or there.shape != here.shape:
        return torch.equal(there, here)
    return torch.allclose(there, here, rtol=1e-5 if there.dtype == torch.float32 else 1e-2, atol=1e-6 * float(here.abs().max()))


def differences(apart: list[Answer], one: list[Answer]) -> list[str]:
    """Between the ranks' answers, by bits and by counts: each rank's on an axis that stays inside the hosts; where it leaves them some
    ranks hand on what others then need not send, so that what all ranks together receive and send is the same."""
    found = []
    for rank, (there, here) in enumerate(zip(apart, one, strict=True)):
        found += [f"rank {rank}, value {at}" for at, pair in enumerate(zip(there[0], here[0], strict=True)) if not same(*pair)]
    for axis in apart[0][1]:
        for what in ("bytes_received", "messages", "bytes_sent"):
            got, right = ([counts[axis][what] for _, counts in each] for each in (apart, one))
            if any(counts[axis]["bytes_crossed"] for _, counts in apart):
                got, right = [sum(got)], [sum(right)]
            found += [f"{axis} {what}: {got}, expected {right}"] if got != right else []
    return found


QUICK = {("2.5d", split(4, 4), "ucx"), ("1d sequence", split(3, 1), "gloo")}


def case(name: str, hosts: Hosts, engine: str) -> Any:
    marks = [] if (name, hosts, engine) in QUICK else [pytest.mark.matrix]
    return pytest.param(name, hosts, engine, marks=marks, id=f"{name} {name_of(hosts)} {engine}")


CASES = [case(name, hosts, engine) for name in sorted(GRIDS, key=ranks_of) for hosts in ways(ranks_of(name)) for engine in ENGINES]


@pytest.mark.parametrize(("name", "hosts", "engine"), CASES)
def test_bits_and_counts_are_those_of_one_host(ranks, name: str, hosts: Hosts, engine: str) -> None:
    window, ring = (on_one_host(ranks, name, source) for source in ("window", "ring"))
    apart = ranks(ranks_of(name))(everything, GRIDS[name], hosts, engine)
    wrong = differences(apart, window)
    assert not wrong, wrong
    assert all(same(*pair) for there, here in zip(ring, window, strict=True) for pair in zip(there[0], here[0], strict=True))
    assert sum(counts.get("bytes_crossed", 0) for _, all_counts in apart for counts in all_counts.values()) > 0
