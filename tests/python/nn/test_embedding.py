"""Embedding in every mode: exact rows forward, gradients against float64, also for ids that several rows share."""

from typing import Any

import pytest
import torch

import gingham
from grids import GRIDS, every_grid, grids, ranks_of, relative, whole
from on_gpu import told_in_time


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


def narrow(rank: int, options: dict[str, Any]) -> list[tuple[torch.dtype, float]]:
    """Tables of every dtype, ids of every integer one, of which one comes often and one is padding: rows as torch's, sums in the wide
    dtype, whatever the order."""
    mesh, found = gingham.init(**options), []
    given = torch.randint(11, (8, 25), generator=torch.Generator().manual_seed(1))
    given[:, ::2] = 3
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        full = torch.randn(11, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
        layer = gingham.nn.Embedding(11, 12, dtype=dtype, padding_idx=5, given={"weight": full})
        by = torch.randn(8, 25, 12, generator=torch.Generator().manual_seed(3)).to(dtype)
        exact = torch.zeros(11, 12, dtype=torch.float64, device=by.device)
        exact.index_add_(0, given.view(-1), by.double().view(-1, 12))
        exact[5] = 0
        for ids in (given, given.int(), given.short(), given.to(torch.uint8), given.t().contiguous().t()):
            layer.zero_grad()
            y = mesh.gather(layer(mesh.scatter(ids)))
            assert torch.equal(y, full[given]), (dtype, ids.dtype)
            (y * by).sum().backward()
            found.append((dtype, relative(whole(layer.weight.grad), exact)))
        nothing = layer(ids[:, :0]) if mesh.size == 1 else None
        assert nothing is None or nothing.shape == (8, 0, 12)
    return found


@grids("2d", "1d", "1d sequence")
def test_tables_of_every_dtype_and_ids_of_every_integer(ranks, name: str) -> None:
    limit = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    for options, size in ((GRIDS[name], ranks_of(name)), ({}, 1)):
        for found in ranks(size)(narrow, options):
            assert all(error <= limit[dtype] for dtype, error in found), found


def again(rank: int) -> list[torch.Tensor]:
    """The gradient of a table of which one id comes in nearly all positions, twice."""
    gingham.init()
    layer, found = gingham.nn.Embedding(50, 24, dtype=torch.bfloat16), []
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (7, 700), generator=generator)
    ids[:, :600] = 7
    by = torch.randn(7, 700, 24, generator=generator).to(torch.bfloat16)
    for _ in range(3):
        layer.zero_grad()
        layer(ids).backward(by)
        found.append(layer.weight.grad.full_tensor())
    return found


def test_the_bits_of_a_gradient_are_the_same_every_time(ranks) -> None:
    first, *others = ranks(1)(again)[0]
    assert all(torch.equal(each, first) for each in others)


def test_ids_out_of_range() -> None:
    gingham.init()
    try:
        layer = gingham.nn.Embedding(4, 4)
        with pytest.raises(gingham.ShapeError, match=r"^Embedding\(4, 4\): rank 0: an id lies outside 0..3: got 4"):
            told_in_time(lambda: layer(torch.tensor([4])))
        with pytest.raises(TypeError, match="integer"):
            layer(torch.ones(2))
    finally:
        gingham.destroy()
