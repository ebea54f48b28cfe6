"""The order of a mesh's ranks on several hosts: what is reckoned to cross is what crosses, and init says where another order is better."""

import os
import warnings
from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from gingham.mesh.modes import GridShape, axes_of
from gingham.plan.hosts import axis_words, best_order, crossed_words, orders

SIZE = 24  # rows and features of the pair: every operand is of SIZE x SIZE words


def crossed(rank: int, options: dict[str, Any], per_host: int) -> Any:
    """What a pair of Linears receives from other hosts, forward and backward, and what init warned of."""
    os.environ["GINGHAM_HOST"] = f"h{rank // per_host}"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mesh = gingham.init(**options)
    finally:
        del os.environ["GINGHAM_HOST"]
    torch.manual_seed(0)
    first = nn.Linear(SIZE, SIZE, bias=False, layout="outer->inner")
    second = nn.Linear(SIZE, SIZE, bias=False, layout="inner->outer")
    x = mesh.scatter(torch.ones(SIZE, SIZE)).requires_grad_()
    second(first(x)).sum().backward()
    said = [str(warning.message) for warning in caught if "another axis lies inside" in str(warning.message)]
    return sum(count.get("bytes_crossed", 0) for count in mesh.traffic().values()), said, mesh.ranks


CASES = [
    ({"mode": "2d", "size": 4}, 2),
    ({"mode": "2.5d", "size": 8, "depth": 2}, 2),
    ({"mode": "2.5d", "size": 8, "depth": 2}, 4),
    ({"mode": "3d", "size": 8}, 2),
    ({"grid": (4, 2, 1), "size": 8}, 4),
    ({"grid": (2, 4, 1), "size": 8}, 2),
]


@pytest.mark.parametrize(
    ("options", "per_host"), CASES, ids=lambda value: str(value) if isinstance(value, int) else str(list(value.values()))
)
def test_what_is_reckoned_crosses(ranks, options: dict[str, Any], per_host: int) -> None:
    """As the ranks are numbered, and in the best order: to the byte."""
    grid = GridShape(axes_of(**{"mode": None, **options}))
    host_of = [rank // per_host for rank in range(grid.size)]
    places, least, now = best_order(grid, host_of)
    word = 4 * SIZE * SIZE // grid.size
    found = ranks(grid.size)(crossed, options, per_host)
    assert sum(count for count, *_ in found) == now * word
    assert any(said for _, said, _ in found) == (1.5 * least <= now) and not any(said for _, said, _ in found[1:])
    if least < now:
        again = ranks(grid.size)(crossed, {**options, "ranks": places}, per_host)
        assert sum(count for count, *_ in again) == least * word
        assert not any(said for _, said, _ in again)


def test_the_warning_has_both_counts_and_the_order(ranks) -> None:
    _, said, _ = ranks(8)(crossed, {"mode": "2.5d", "size": 8, "depth": 2}, 2)[0]
    assert len(said) == 1 and "ranks=(0, 2, 1, 3, 4, 6, 5, 7)" in said[0]
    assert "41,943,040 bytes" in said[0] and "67,108,864" in said[0] and "host h3 (ranks 6, 7)" in said[0]


def automatic(rank: int, rows: int) -> Any:
    os.environ["GINGHAM_HOST"] = f"h{rank // 2}"
    try:
        workload = gingham.Workload(((1, gingham.workload.Linears(64, (64,), "outer->inner")),), 1, rows)
        return gingham.init(mode="auto", size=4, model=workload).ranks
    finally:
        del os.environ["GINGHAM_HOST"]


def test_auto_takes_the_order_of_the_model(ranks) -> None:
    """Where weights move most their axis goes inside the hosts, where activations do theirs."""
    for rows in (16, 4096):
        found = set(ranks(4)(automatic, rows))
        assert len(found) == 1 and sorted(found.pop()) == [0, 1, 2, 3]
    grid = GridShape(axes_of("2d", 4))
    weights, rows = (best_order(grid, [0, 0, 1, 1], operands)[0] for operands in ((1, 1, 9), (9, 9, 1)))
    assert weights == (0, 2, 1, 3) and rows == (0, 1, 2, 3)


def test_no_order_is_better_by_itself() -> None:
    """The best of all orders of the axes, by trying each."""
    for options, per_host in CASES:
        grid = GridShape(axes_of(**{"mode": None, **options}))
        host_of = [rank // per_host for rank in range(grid.size)]
        tried = [crossed_words(grid, [host_of[place] for place in order]) for order in orders(grid)]
        assert best_order(grid, host_of)[1] == min(tried)
        assert crossed_words(grid, [0] * grid.size) == 0
        assert crossed_words(grid, range(grid.size)) == sum(
            grid.size * moved.words(grid.parts(names)) for names, moved in axis_words(grid).items()
        )
