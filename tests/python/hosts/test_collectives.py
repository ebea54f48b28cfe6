"""Collectives on an axis that is longer than a host: sums are those of a tree over the places, to the bit, wherever the ranks are, and a
block enters a host once (docs/theory.md section 3)."""

from typing import Any

import pytest
import torch

import gingham
from virtual import name_of, on_host, split

SIZES = (0, 1, 3, 7, 1000, 4099)
PLACES = [split(4), split(2, 2), split(3, 1), split(1, 1, 1, 1), (0, 1, 0, 1), split(4, 2), split(2, 2, 2), split(1, 5), (0, 1, 1, 0, 2, 0)]


def number(rank: int, count: int) -> torch.Tensor:
    """Values whose sum depends on the order in which it is taken."""
    return torch.randn(count, generator=torch.Generator().manual_seed(10 * count + rank)) * 10.0 ** (rank % 4)


def tree(parts: list[torch.Tensor]) -> torch.Tensor:
    """Pairs of places, pairs of pairs, and so on; who has no partner waits."""
    while len(parts) > 1:
        parts = [parts[at] + parts[at + 1] if at + 1 < len(parts) else parts[at] for at in range(0, len(parts), 2)]
    return parts[0]


def lengths(count: int, size: int) -> list[int]:
    """Uneven ones, the first of them empty."""
    found = [count * at // sum(range(size)) for at in range(size - 1)]
    return [*found, count - sum(found)]


def collectives(rank: int, hosts: tuple[int, ...], engine: str, source: str) -> list[Any]:
    size = len(hosts)
    with on_host(rank, hosts, engine):
        mesh = gingham.init(mode="1d", size=size, source=source, timeout=30.0)
    axis, found = mesh.joint(("tp",)), []
    for count in SIZES:
        mesh.traffic(reset=True)
        mine = number(rank, count)
        summed = mine.clone()
        axis.all_reduce_(summed)
        own = axis.reduce_scatter(mine, lengths(count, size))
        gathered = axis.all_gather(own)
        wide = mine.double()
        axis.all_reduce_(wide)
        found.append((summed, own, torch.cat(gathered), wide, mesh.traffic(reset=True)["tp"]))
    return found


@pytest.mark.parametrize("hosts", PLACES, ids=name_of)
def test_sums_are_those_of_the_tree_and_blocks_enter_a_host_once(ranks, hosts: tuple[int, ...]) -> None:
    size = len(hosts)
    runs = [("ucx", "ring"), ("gloo", "ring")] if len(set(hosts)) > 1 else [("", "window"), ("", "ring")]
    for engine, source in runs:
        answers = ranks(size)(collectives, hosts, engine, source)
        for at, count in enumerate(SIZES):
            parts = [number(rank, count) for rank in range(size)]
            total = tree(parts)
            pieces = total.split(lengths(count, size))
            for rank, answer in enumerate(answers):
                summed, own, gathered, wide, traffic = answer[at]
                where = engine, source, rank, count
                assert torch.equal(summed, total) and torch.equal(own, pieces[rank]) and torch.equal(gathered, total), where
                assert torch.equal(wide, tree([part.double() for part in parts])), where
                assert traffic.get("bytes_crossed", 0) == crossed(hosts, rank, count), where
            received = sum(answer[at][4]["bytes_received"] for answer in answers)
            assert received == (size - 1) * count * (4 * 2 + 4 + 4 + 8 * 2), (engine, source, count)


def crossed(hosts: tuple[int, ...], rank: int, count: int) -> int:
    """Bytes of `collectives` that this rank has from other hosts."""
    size = len(hosts)
    near = [place for place in range(size) if hosts[place] == hosts[rank]]

    def gathered(words: list[int]) -> int:
        found = 0
        for place in range(size):
            far = [each for each in range(size) if hosts[each] == hosts[place]]
            if place not in near and near[far.index(place) % len(near)] == rank:
                found += words[place]
        return found

    def summed(words: list[int]) -> int:
        return words[rank] * sum(hosts[first] != hosts[rank] for first in branches(hosts))

    step = -(-count // size)
    chunks = [max(0, min(count, (at + 1) * step) - min(count, at * step)) for at in range(size)]
    uneven = lengths(count, size)
    return (4 + 8) * (gathered(chunks) + summed(chunks)) + 4 * (gathered(uneven) + summed(uneven))


def branches(hosts: tuple[int, ...]) -> list[int]:
    """The first place of each largest part of the tree that is of one host."""
    width = 1 << len(hosts).bit_length()
    first, found = 0, []
    while first < len(hosts):
        part = width
        while first % part or len(set(hosts[first : first + part])) > 1:
            part //= 2
        found.append(first)
        first += part
    return found
