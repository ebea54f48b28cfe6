"""Dropout's masks: the same bits on every grid and in one process; numbering, recomputation, gradients."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gingham
from gingham.nn import MLP, Dropout, Linear, SelfAttention
from grids import GRIDS, every_grid, grids, ranks_of


def masks(rank: int, options: dict[str, Any] | None) -> list[torch.Tensor]:
    mesh = gingham.init(**options) if options is not None else None
    torch.manual_seed(11)
    found = []
    for layout in ("outer", "inner"):
        layer, operand = Dropout(0.3, layout=layout), "inner" if layout == "inner" else "x"
        for shape in ((7, 3, 19), (8, 24), (2, 3)):
            full = torch.ones(shape)
            found.append(layer(full) if mesh is None else mesh.gather(layer(mesh.scatter(full, operand)), operand))
    return found


@every_grid
def test_masks_have_the_same_bits_on_every_grid(ranks, name: str) -> None:
    serial = masks(0, None)
    for found in ranks(ranks_of(name))(masks, GRIDS[name]):
        assert all(torch.equal(got, expected) for got, expected in zip(found, serial, strict=True))


def sequences(rank: int, options: dict[str, Any], order: str | None) -> list[torch.Tensor]:
    """Activations [batch, time, features] whose time is cut, through Dropout and an MLP's: outputs, and gradients."""
    mesh = gingham.init(**options)
    torch.manual_seed(11)
    found = []
    layers = [Dropout(0.3, dims=(1, -1), order=order), MLP(24, 24, 0.4, dim=1, order=order, dtype=torch.float64)]
    for layer in layers:
        for shape in ((2, 13, 24), (1, 24, 24), (2, 3, 24)):
            full = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
            y = mesh.gather(layer(mesh.scatter(full, "x", 1, order=order)), "x", 1, order=order)
            y.pow(2).sum().backward()
            found += [y.detach(), full.grad]
    return found


SEQUENCES: dict[str, dict[str, Any]] = {
    "sequence": dict(mode="sequence", size=4),
    "2d": dict(mode="2d", size=4),
    "2.5d": dict(mode="2.5d", size=8, depth=2),
    "3d": dict(mode="3d", size=8),
    "data": dict(parallel=dict(data=2, tensor=dict(size=2, mode="sequence"))),
}


@pytest.mark.parametrize("order", [None, "zigzag"])
@pytest.mark.parametrize("name", ["sequence", "2d", *(pytest.param(each, marks=pytest.mark.matrix) for each in ("2.5d", "3d", "data"))])
def test_masks_go_by_the_place_in_the_sequence(ranks, name: str, order: str | None) -> None:
    """In zigzag order too; lengths that do not divide, and ranks without a place."""
    serial = ranks(1)(sequences, {}, None)[0]
    for found in ranks(SEQUENCES[name].get("size", 4))(sequences, SEQUENCES[name], order):
        for got, expected in zip(found, serial, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def unknown_order(rank: int) -> str:
    mesh = gingham.init(grid=(2, 1, 1))
    mesh.checks = None
    x = mesh.scatter(torch.ones(1, 8, 4), "x", 1, order="zigzag")
    with pytest.raises(gingham.LayoutError) as refused:
        MLP(4, 4, 0.5, dim=1)(x)
    Dropout(0.5, dims=(1, -1), order="plain")(x)
    Dropout(0.5)(mesh.scatter(torch.ones(8, 4)))
    with pytest.raises(gingham.ShapeError, match="expected 4 of 8 places"):
        Dropout(0.5, dims=(1, -1), order="zigzag")(x[:, :3] if rank else torch.cat([x, x[:, :1]], 1))
    with pytest.raises(ValueError, match="order='back'"):
        Dropout(0.5, order="back")
    return str(refused.value)


def test_an_order_that_nobody_says_is_refused(ranks) -> None:
    for refused in ranks(2)(unknown_order):
        assert "order='zigzag'" in refused and "'plain'" in refused


def test_without_init_as_one_rank() -> None:
    torch.manual_seed(1)
    layer = Dropout(0.25)
    x = torch.ones(1000, 100, requires_grad=True)
    y = layer(x)
    assert abs(float((y == 0).float().mean()) - 0.25) < 0.01 and torch.equal(y.unique(), torch.tensor([0.0, 1 / 0.75]))
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert not torch.equal(layer(x), y), "the next call draws anew"
    assert torch.equal(layer.eval()(x), x)


def test_modules_are_numbered_since_the_seed() -> None:
    def first_two() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(4)
        one, two = Dropout(), Dropout()
        return one(torch.ones(64)), two(torch.ones(64))

    one, two = first_two()
    again = first_two()
    assert torch.equal(one, again[0]) and torch.equal(two, again[1]) and not torch.equal(one, two)
    assert torch.equal(Dropout(name="dropout0")(torch.ones(64)), one)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_reuses_the_call_number(reentrant: bool) -> None:
    gingham.init()
    try:
        model = torch.nn.Sequential(Dropout(0.5), Linear(24, 24, dtype=torch.float64), Dropout(0.5))
        x = torch.randn(8, 24, dtype=torch.float64, requires_grad=True)
        gradients = []
        for run in (lambda x: checkpoint(model, x, use_reentrant=reentrant), model):
            model[0].calls = model[2].calls = 0
            # two calls in one graph: the second is recomputed first
            one, two = run(x), run(x)
            gradients.append(torch.autograd.grad(one.sum() + 2 * two.sum(), x)[0] if not reentrant else _backward(one, two, x))
        assert torch.equal(*gradients)
    finally:
        gingham.destroy()


def checkpointed(rank: int, options: dict[str, Any], reentrant: bool | None) -> list[torch.Tensor]:
    """Masks and gradients of dropout in a layer, its attention and between them; reentrant None: kept, not recomputed."""
    mesh = gingham.init(**options)
    torch.manual_seed(3)
    mlp = MLP(24, 24, dropout=0.3, dtype=torch.float64)
    model = torch.nn.Sequential(Dropout(0.2), SelfAttention(24, 12, dropout=0.4, dtype=torch.float64), Dropout(0.5), mlp)
    x = torch.randn(5, 3, 24, dtype=torch.float64).requires_grad_()
    found = []
    for _ in range(2):
        block = mesh.scatter(x)
        y = mesh.gather(model(block) if reentrant is None else checkpoint(model, block, use_reentrant=reentrant))
        y.pow(2).sum().backward()
        found += [y.detach(), x.grad.clone()]
    return found


@pytest.mark.parametrize("reentrant", [True, False])
@grids("2.5d")
def test_recomputed_masks_are_those_of_one_process(ranks, name: str, reentrant: bool) -> None:
    serial = ranks(1)(checkpointed, {}, None)[0]
    for found in ranks(ranks_of(name))(checkpointed, GRIDS[name], reentrant):
        for got, expected in zip(found, serial, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def _backward(one: torch.Tensor, two: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x.grad = None
    (one.sum() + 2 * two.sum()).backward()
    return x.grad.clone()


ROWS = ((3, 2), (2, 2), (4, 1), (1, 0))  # of two data ranks, batch by batch


def asked_and_drawn(rank: int) -> tuple[list[int], list[torch.Tensor]]:
    """Of each batch: how often the ranks asked for sizes, and what three layers make of it."""
    mesh = gingham.init(parallel=dict(data=2, tensor=dict(size=2, mode="1d")))
    torch.manual_seed(11)
    layers, asked, found = torch.nn.Sequential(Dropout(0.3), Dropout(0.3), Dropout(0.3)), [], []
    step = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for scattered in (True, False):  # False: the ranks make their blocks themselves
        for rows in ROWS:
            x = torch.ones(rows[mesh.data.rank], 5, 6)
            x = mesh.scatter(x, own=True) if scattered else x
            before = mesh.world.calls
            y = layers(x)
            asked.append(mesh.world.calls - before)
            found.append(mesh.gather(y))
            step.step()
    return asked, found


def test_sizes_are_asked_for_once_a_forward_pass(ranks) -> None:
    torch.manual_seed(11)
    layers = torch.nn.Sequential(Dropout(0.3), Dropout(0.3), Dropout(0.3))
    expected = [layers(torch.ones(sum(rows), 5, 6)) for _ in range(2) for rows in ROWS]
    for asked, found in ranks(4)(asked_and_drawn):
        assert asked == [3, 1, 1, 1] + [3] * len(ROWS), "the first pass learns who holds the same blocks"
        assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected, strict=True))


COUNTS = ((4, 4), (4, 3), (3, 2), (3, 3), (4, 4), (2, 1))  # rows of two batches, pass by pass: one rank may hold blocks of one shape


def test_two_batches_of_one_pass_may_differ(ranks) -> None:
    def towers(rank: int) -> list[torch.Tensor]:
        mesh = gingham.init(parallel=dict(data=2))
        step = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        torch.manual_seed(11)
        one, other = (torch.nn.Sequential(Dropout(0.3), Dropout(0.3)) for _ in range(2))
        found = []
        for rows in COUNTS:
            xs = [mesh.scatter(torch.ones(count, 5, 6)) for count in rows]
            found += [mesh.gather(tower(x)) for tower, x in zip((one, other), xs, strict=True)]
            step.step()
        return found

    torch.manual_seed(11)
    one, other = (torch.nn.Sequential(Dropout(0.3), Dropout(0.3)) for _ in range(2))
    wanted = [tower(torch.ones(count, 5, 6)) for rows in COUNTS for tower, count in zip((one, other), rows, strict=True)]
    for found in ranks(2)(towers):
        assert all(torch.equal(got, expected) for got, expected in zip(found, wanted, strict=True))


def test_a_rank_whose_rows_differ_within_a_pass_is_named(ranks) -> None:
    def mixed(rank: int) -> str:
        mesh = gingham.init(parallel=dict(data=2))
        first, second = Dropout(0.3), Dropout(0.3)
        for _ in range(2):
            x = mesh.scatter(torch.ones(3, 5, 6), own=True)
            y = first(x)
            mesh.gather(second(y))
        y = first(mesh.scatter(torch.ones(3, 5, 6), own=True))
        with pytest.raises(gingham.MeshError) as error:
            mesh.gather(second(y[:2] if rank else y))
        return str(error.value)

    for said in ranks(2)(mixed):
        assert "Dropout(p=0.3" in said and "as told before" in said and "rank 1" in said, said


def test_selected_tokens_are_asked_for_each_time(ranks) -> None:
    def selected(rank: int) -> torch.Tensor:
        mesh = gingham.init(parallel=dict(data=2))
        torch.manual_seed(11)
        first, second = Dropout(0.3), Dropout(0.3)
        x = mesh.scatter(torch.ones(4, 5, 6))
        h = first(x).flatten(0, 1)
        return mesh.gather(second(h[: 10 if rank == 0 else 3]))

    torch.manual_seed(11)
    first, second = Dropout(0.3), Dropout(0.3)
    h = first(torch.ones(4, 5, 6)).flatten(0, 1)
    wanted = second(torch.cat([h[:10], h[10:13]]))
    assert all(torch.equal(found, wanted) for found in ranks(2)(selected))
