"""reshard moves exactly what must move; a classifier tied to an embedding has the gradient of both uses."""

import itertools
from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from gingham.autograd.relayout import reshard
from gingham.mesh.layout import block, coordinates_of
from grids import GRIDS, grids, ranks_of, relative, whole

SHAPE = (13, 10)


def cuts_of(mesh: Any) -> list[Any]:
    """Every cut of a matrix whose axes stand in the mesh's order."""
    names = [name for name, size in mesh.sizes.items() if size > 1]
    found = []
    for places in itertools.product((None, 0, 1), repeat=len(names)):
        found.append(tuple(tuple(name for name, place in zip(names, places, strict=True) if place == dim) for dim in (0, 1)))
    return found


def held(mesh: Any, cuts: Any, rank: int) -> set[tuple[int, int]]:
    (a, m), (b, n) = block(SHAPE, cuts, mesh.sizes, coordinates_of(rank, mesh.sizes))
    return set(itertools.product(range(a, a + m), range(b, b + n)))


def moved(rank: int, options: dict[str, Any]) -> list[bool]:
    mesh = gingham.init(**options)
    full = torch.arange(130.0, dtype=torch.float64).view(SHAPE)
    found = []
    pairs = list(itertools.product(cuts_of(mesh), repeat=2))
    for source, target in pairs[:: 1 if len(pairs) <= 81 else 7]:
        weight = mesh.parameter(full, source)
        mesh.traffic(reset=True)
        got = reshard(weight, mesh, source, target)
        received = sum(axis["bytes_received"] for axis in mesh.traffic(reset=True).values())
        (a, m), (b, n) = block(SHAPE, target, mesh.sizes, mesh.coordinates)
        mine = full[a : a + m, b : b + n]
        (got * mine).sum().backward()
        lacking = len(held(mesh, target, rank) - held(mesh, source, rank))
        found.append(torch.equal(got, mine) and torch.equal(whole(weight.grad), full) and received == 8 * lacking)
    return found


@grids("2d")
def test_reshard_between_all_cuts(ranks, name: str) -> None:
    assert all(all(found) for found in ranks(ranks_of(name))(moved, GRIDS[name]))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(29, 20)
        self.head = nn.Classifier(20, 29, tied=self.embedding)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(ids)))


def tied(rank: int, options: dict[str, Any]) -> tuple[bool, bool, float, torch.Tensor]:
    """One Parameter; whether it is resharded; worst error over two accumulated passes; this rank's gradient."""
    mesh = gingham.init(**options)
    torch.manual_seed(6)
    model = Model()
    torch.manual_seed(6)
    table = torch.nn.Embedding(29, 20).double()
    ids, worst = torch.randint(29, (7, 5)), 0.0
    one = model.head.weight is model.embedding.weight and len(list(model.parameters())) == 1
    for _ in range(2):
        logits = mesh.gather(model(mesh.scatter(ids)), "inner")
        logits.pow(2).sum().backward()
        expected = torch.tanh(table(ids)) @ table.weight.T
        expected.pow(2).sum().backward()
        worst = max(worst, relative(logits, expected), relative(whole(model.embedding.weight.grad), table.weight.grad))
    placed = model.embedding.weight.grad.placements == model.embedding.weight.placements
    return one and placed, model.head.tied_cuts is not None, worst, model.embedding.weight.grad.to_local()


@grids("2.5d", "1x3x2")
def test_tied_gradient_is_the_sum_of_both_uses(ranks, name: str) -> None:
    answers = ranks(ranks_of(name))(tied, GRIDS[name])
    assert all(one and worst <= 2e-6 for one, _, worst, _ in answers), [worst for _, _, worst, _ in answers]
    assert all(moves == (name in ("3d", "3x2x2", "1x3x2")) for _, moves, _, _ in answers), [moves for _, moves, _, _ in answers]
    if name == "2.5d":
        for rank in range(4):
            assert torch.equal(answers[rank][3], answers[rank + 4][3]), "replicas over depth have the same bits"


def test_what_it_refuses() -> None:
    gingham.init()
    try:
        table = nn.Embedding(8, 4)
        with pytest.raises(gingham.ShapeError, match="8 x 4"):
            nn.Classifier(5, 8, tied=table)
        with pytest.raises(gingham.ShapeError, match="global shape"):
            reshard(torch.ones(2, 2), table.mesh, ((), ()), ((), ()))
    finally:
        gingham.destroy()
