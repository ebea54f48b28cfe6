"""What crosses hosts is what theory_hosts.py says, to the byte and rank: Linears on every grid, with ranks in any order."""

import random
from typing import Any

import pytest
import torch

import gingham
from grids import GRIDS, ranks_of
from theory import Grid
from theory_hosts import Linear, Placed
from virtual import name_of, on_host, split, ways

EVEN, UNEVEN = (48, 24, 72), (37, 19, 53)


def layers() -> list[Linear]:
    """What is run, in this order. Where inner and outer do not differ both layers of a pair are unswapped."""
    found = []
    for m, k, n in (EVEN, UNEVEN):
        found += [Linear(m, k, n, "outer->inner"), Linear(m, n, k, "inner->outer")]
        found += [Linear(m, k, n, "outer->outer", swapped, bias=swapped) for swapped in (False, True)]
    return found


def counted(rank: int, grid: dict[str, Any], order: tuple[int, ...], hosts: tuple[int, ...], engine: str) -> list[dict[str, int]]:
    """Of each layer, by axis."""
    with on_host(rank, hosts, engine):
        mesh = gingham.init(**grid, ranks=order, timeout=30.0)
    found = []
    for layer in layers():
        swapped = None if layer.layout != "outer->outer" else layer.swapped
        module = gingham.nn.Linear(layer.k, layer.n, bias=layer.bias, layout=layer.layout, swapped=swapped)
        x = mesh.scatter(torch.ones(layer.m, layer.k), "x" if layer.layout.startswith("outer") else "inner").requires_grad_()
        mesh.traffic(reset=True)
        y = module(x)
        y.backward(torch.ones_like(y))
        found.append({axis: counts["bytes_crossed"] for axis, counts in mesh.traffic(reset=True).items() if "bytes_crossed" in counts})
    return found


def expected(grid: dict[str, Any], order: tuple[int, ...], hosts: tuple[int, ...]) -> list[list[dict[str, int]]]:
    """Of each rank of the job and layer."""
    ours = Grid.of(**grid)
    found: list[list[dict[str, int]]] = [[] for _ in order]
    for layer in layers():
        placed = Placed(ours, grid.get("mode", "grid"), [hosts[rank] for rank in order])
        placed.linear(layer)
        for place, rank in enumerate(order):
            found[rank].append(dict(placed.crossed[place]))
    return found


def orders(size: int) -> list[tuple[int, ...]]:
    """As the job counts, from the last to the first, and shuffled."""
    mixed = list(range(size))
    random.Random(size).shuffle(mixed)
    return list(dict.fromkeys([tuple(range(size)), tuple(reversed(range(size))), tuple(mixed)]))


QUICK = {("2.5d", split(4, 4), 0), ("1d sequence", split(3, 1), 2), ("3d", split(2, 2, 2, 2), 2), ("1d", split(1, 3), 0)}
CASES = [
    pytest.param(
        name, order, hosts, marks=[] if (name, hosts, at) in QUICK else [pytest.mark.matrix], id=f"{name} {name_of(hosts)} order {at}"
    )
    for name in sorted(GRIDS, key=ranks_of)
    for at, order in enumerate(orders(ranks_of(name)))
    for hosts in ways(ranks_of(name))
]


@pytest.mark.parametrize(("name", "order", "hosts"), CASES)
def test_crossed_bytes_are_theorys(ranks, name: str, order: tuple[int, ...], hosts: tuple[int, ...]) -> None:
    engine = "ucx" if hosts[0] == hosts[1] else "gloo"
    answers = ranks(ranks_of(name))(counted, GRIDS[name], order, hosts, engine)
    right = expected(GRIDS[name], order, hosts)
    for at, layer in enumerate(layers()):
        for rank, answer in enumerate(answers):
            got = {axis: crossed for axis, crossed in answer[at].items() if crossed}
            assert got == {axis: crossed for axis, crossed in right[rank][at].items() if crossed}, (rank, layer)
