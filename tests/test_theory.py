"""theory.py against a simulated grid: who holds what, element by element, and how much a rank lacks."""

import itertools
from math import gcd

import pytest

import theory
from theory import Grid, nested_cuts

SHAPE = (37, 19, 53)
GRIDS = [(1, 1, 1), (2, 2, 1), (3, 2, 2), (2, 2, 2), (1, 3, 2), (4, 1, 3), (3, 3, 1), (2, 1, 5)]


def lengths(total: int, *parts: int) -> list[int]:
    return [b - a for a, b in nested_cuts(total, parts)]


def lacking(grid: Grid, row_parts: str, row: int, col_parts: str, col: int, cut: str, cut_dim: int) -> int:
    """Words that all ranks together lack of an operand whose blocks (row axis, column axis) are cut further over `cut`."""
    size = {"m": grid.pm, "n": grid.pn, "k": grid.pk}
    rows, cols = lengths(row, size[row_parts]), lengths(col, size[col_parts])
    total = 0
    for r, c in itertools.product(rows, cols):
        pieces = lengths(r if cut_dim == 0 else c, size[cut])
        other = c if cut_dim == 0 else r
        total += sum((sum(pieces) - piece) * other for piece in pieces)
    return total


@pytest.mark.parametrize("sizes", GRIDS)
@pytest.mark.parametrize("swapped", [False, True])
def test_step_is_what_the_ranks_lack(sizes: tuple[int, int, int], swapped: bool) -> None:
    grid = Grid(*sizes)
    m, k, n = SHAPE
    n_axis, k_axis = ("k", "n") if swapped else ("n", "k")
    x = lacking(grid, "m", m, k_axis, k, n_axis, 1)
    w = lacking(grid, k_axis, k, n_axis, n, "m", 1 if swapped else 0)
    y = lacking(grid, "m", m, n_axis, n, k_axis, 1)
    cost = theory.step(grid, m, k, [n], theory.PRODUCTS, swapped, slices=1, bias=False)
    assert sum(cost.words.values()) == 3 * x + 3 * w + 2 * y
    assert cost.words[n_axis] == 3 * x and cost.words["m"] == 3 * w and cost.words[k_axis] == 2 * y


def test_sizes_that_divide_give_the_table() -> None:
    """docs/theory.md section 4, 2.5D: 3x(q-1)/P + 3w(q-1)/q^2 + 2w(d-1)/(d q^2) words, 6(q-1) + 2(d-1) messages."""
    q, d, (m, k, n) = 2, 2, (16, 256, 1024)
    cost = theory.linear(Grid.of("2.5d", d * q * q, d), m, k, n, bias=False)
    x, w, ranks = m * k, k * n, d * q * q
    assert sum(cost.words.values()) == 3 * x * (q - 1) + d * 3 * w * (q - 1) + 2 * w * (d - 1)
    assert sum(cost.messages.values()) == 6 * (q - 1) + 2 * (d - 1)
    sharded = theory.linear(Grid.of("2.5d", ranks, d, shard_depth=True), m, k, n, bias=False)
    assert sum(sharded.words.values()) - sum(cost.words.values()) == (d - 1) * w


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_one_axis_gives_the_table(ranks: int) -> None:
    m, k, n = 48, 24, 72
    classic, sequence = Grid.of("1d", ranks), Grid.of("1d", ranks, sequence=True)
    expected = [
        (classic, "outer->inner", 2 * m * k),
        (classic, "inner->outer", 2 * m * n),
        (sequence, "outer->inner", 3 * m * k),
        (sequence, "inner->outer", 2 * m * n),
    ]
    for grid, layout, words in expected:
        cost = theory.linear(grid, m, k, n, layout=layout)
        assert sum(cost.words.values()) == words * (ranks - 1), (grid.rows, layout)


@pytest.mark.parametrize(("pn", "pk"), [(2, 2), (3, 3), (2, 3), (4, 6), (5, 1)])
def test_relayout_gives_the_formula(pn: int, pk: int) -> None:
    """(y/P)(1 - (gcd(pn-1, pk-1) + 1)/(pn pk)) words on average where sizes divide."""
    rows, features = 7, 60 * pn * pk
    cost = theory.relayout(Grid(1, pn, pk), rows, features, "outer")
    expected = rows * features * (pn * pk - gcd(pn - 1, pk - 1) - 1) // (pn * pk) if pk > 1 else 0
    assert sum(cost.words.values()) == expected


@pytest.mark.parametrize(("q", "d"), [(2, 2), (3, 2), (2, 3)])
def test_bias_in_layers_costs_the_same_words(q: int, d: int) -> None:
    """Reduce-scatter over row, all-reduce over depth, all-gather over row: as one all-reduce over all d q ranks."""
    cost = theory.bias_gradient(Grid.of("2.5d", d * q * q, d), 24, 1)
    assert sum(cost.words.values()) == 2 * 24 * (d * q - 1)
    assert sum(cost.messages.values()) == 2 * (q - 1) + 2 * (d - 1)
