"""Embedding in every mode: exact rows forward, gradients against float64, also for ids that several rows share."""

from typing import Any

import pytest
import torch

import gingham
from grids import GRIDS, every_grid, ranks_of, relative, whole


def tables(rank: int, options: dict[str, Any]) -> tuple[bool, float]:
    mesh = gingham.init(**options)
    exact, worst = True, 0.0
    for batch, count, width in ((7, 29, 19), (8, 16, 24), (2, 3, 5)):
        torch.manual_seed(batch)
        layer = gingham.nn.Embedding(count, width)
        torch.manual_seed(batch)
        twin = torch.nn.Embedding(count, width)
        ids = torch.randint(count, (batch, 5))
        places = torch.arange(5) % count
        cotangent = torch.randn(batch, 5, width)
        y = mesh.gather(layer(mesh.scatter(ids)) + layer(places))
        exact &= torch.equal(y, twin(ids) + twin(places))
        (y * cotangent).sum().backward()
        twin.double()
        ((twin(ids) + twin(places)) * cotangent).sum().backward()
        worst = max(worst, relative(whole(layer.weight.grad), twin.weight.grad))
    return exact, worst


@every_grid
def test_embedding(ranks, name: str) -> None:
    for exact, worst in ranks(ranks_of(name))(tables, GRIDS[name]):
        assert exact and worst <= 2e-6


def test_ids_out_of_range() -> None:
    gingham.init()
    try:
        layer = gingham.nn.Embedding(4, 4)
        with pytest.raises(gingham.ShapeError, match="0..3"):
            layer(torch.tensor([4]))
        with pytest.raises(TypeError, match="integer"):
            layer(torch.ones(2))
    finally:
        gingham.destroy()
