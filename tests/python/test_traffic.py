"""Bytes and messages that layers receive, equal to theory.py on every grid: products, swaps, sources, slices, layouts."""

from typing import Any

import pytest
import torch

import gingham
import theory
from grids import GRIDS, every_grid, ranks_of
from theory import Grid

EVEN, UNEVEN = (48, 24, 72), (37, 19, 53)
CASES = [("outer->outer", False), ("outer->outer", True), ("outer->inner", False), ("outer->inner", True), ("inner->outer", True)]
Counts = dict[str, dict[str, int]]


def of_linear(mesh: Any, shape: tuple[int, int, int], layout: str, swapped: bool, products: set[str]) -> Counts | None:
    """This rank's traffic of the wanted products; None where layout and swapped disagree."""
    m, k, n = shape
    try:
        layer = gingham.nn.Linear(k, n, layout=layout, swapped=swapped)
    except gingham.MeshError:
        return None
    layer.weight.requires_grad_("dw" in products)
    if layer.bias is not None:
        layer.bias.requires_grad_("dw" in products)
    x = mesh.scatter(torch.ones(m, k), "x" if layout.startswith("outer") else "inner").requires_grad_("dx" in products)
    mesh.traffic(reset=True)
    y = layer(x)
    if products - {"y"}:
        y.backward(torch.ones_like(y))
    return mesh.traffic(reset=True)


PRODUCTS: list[set[str]] = [{"y"}, {"y", "dx"}, {"y", "dw"}, {"y", "dx", "dw"}]


LINK = (1e-5, 1e9)  # a slower way counts the same
WAYS = [("window", 1, None), ("ring", 3, None), ("window", 3, LINK), ("ring", 1, LINK), ("window", 3, None), ("ring", 1, None)]
every_way = pytest.mark.parametrize(
    ("source", "slices", "link"), WAYS[:2] + [pytest.param(*way, marks=pytest.mark.matrix) for way in WAYS[2:]]
)


def counted(rank: int, options: dict[str, Any], source: str, slices: int, link: Any) -> list[Counts | None]:
    mesh = gingham.init(**options, source=source, slices=slices, link=link)
    return [
        of_linear(mesh, shape, layout, swapped, products) for shape in (EVEN, UNEVEN) for layout, swapped in CASES for products in PRODUCTS
    ]


def expected(name: str, slices: int) -> list[theory.Cost]:
    grid = Grid.of(**GRIDS[name]) if GRIDS[name] else Grid.of(grid=(1, 1, 1))
    return [
        theory.linear(grid, *shape, layout=layout, swapped=swapped, products=products, slices=slices)
        for shape in (EVEN, UNEVEN)
        for layout, swapped in CASES
        for products in PRODUCTS
    ]


@every_way
@every_grid
def test_linear(ranks, name: str, source: str, slices: int, link: Any) -> None:
    answers = ranks(ranks_of(name))(counted, GRIDS[name], source, slices, link)
    for index, cost in enumerate(expected(name, slices)):
        found = [answer[index] for answer in answers]
        if found[0] is None:
            continue
        for axis in found[0]:
            received = sum(counts[axis]["bytes_received"] for counts in found)
            assert received == 4 * cost.words[axis], (index, axis, received, cost)
            assert received == sum(counts[axis]["bytes_sent"] for counts in found), (index, axis)
            if index < len(CASES) * len(PRODUCTS) and axis != "features":
                assert {counts[axis]["messages"] for counts in found} == {cost.messages[axis]}, (index, axis, found, cost)
        assert set(cost.words) <= set(found[0])


def matmul_counts(rank: int, options: dict[str, Any], source: str, slices: int, link: Any) -> list[Counts]:
    mesh = gingham.init(**options, source=source, slices=slices, link=link)
    found = []
    for m, k, n in (EVEN, UNEVEN):
        for products in PRODUCTS:
            a = mesh.scatter(torch.ones(m, k), "a").requires_grad_("dx" in products)
            b = mesh.scatter(torch.ones(k, n), "b").requires_grad_("dw" in products)
            c = gingham.matmul(a, b, shape=(m, k, n))
            if products - {"y"}:
                c.sum().backward()
            found.append(mesh.traffic(reset=True))
    return found


@every_way
@every_grid
def test_matmul_is_the_plain_step(ranks, name: str, source: str, slices: int, link: Any) -> None:
    answers = ranks(ranks_of(name))(matmul_counts, GRIDS[name], source, slices, link)
    grid = Grid.of(**GRIDS[name]) if GRIDS[name] else Grid.of(grid=(1, 1, 1))
    grid.rows, grid.depth = "", 1
    for index, (shape, products) in enumerate((shape, products) for shape in (EVEN, UNEVEN) for products in PRODUCTS):
        cost = theory.step(grid, *shape[:2], [shape[2]], products, False, slices, False)
        found = [answer[index] for answer in answers]
        for axis in found[0]:
            assert sum(counts[axis]["bytes_received"] for counts in found) == 4 * cost.words[axis], (shape, products, axis, cost)
            assert {counts[axis]["messages"] for counts in found} == {cost.messages[axis]}, (shape, products, axis, found)
        assert set(cost.words) <= set(found[0])


def depth_of_16_bits(rank: int) -> tuple[int, list[int]]:
    """What dW of a bfloat16 linear receives over depth, and its bits."""
    mesh = gingham.init(mode="2.5d", size=8, depth=2)
    torch.manual_seed(0)
    layer = gingham.nn.Linear(32, 48, bias=False, dtype=torch.bfloat16)
    x = mesh.scatter(torch.randn(64, 32).bfloat16()).requires_grad_()
    mesh.traffic(reset=True)
    layer(x).backward(mesh.scatter(torch.randn(64, 48).bfloat16()))
    assert layer.weight.grad is not None
    bits = layer.weight.grad.to_local().contiguous().view(torch.int16).flatten().tolist()
    return mesh.traffic(reset=True)["depth"]["bytes_received"], bits


def test_a_sum_over_depth_is_gathered_in_16_bits(ranks) -> None:
    """(d - 1) / d of a block of 16 x 24 in float32, then as much in bfloat16; the ranks of a depth line have the same bits."""
    found = ranks(8)(depth_of_16_bits)
    assert [received for received, _ in found] == [16 * 24 // 2 * (4 + 2)] * 8
    assert all(found[rank][1] == found[rank + 4][1] for rank in range(4)) and len(found[0][1]) == 16 * 24
