"""How much of what a grid moves goes from host to host, and in which order of its ranks least does (docs/hosts.md).

Example: 2 x 2 ranks, two on each host in their order, so that the last axis lies inside a host. Of a pair of linear maps whose X, Y and W
have one word a rank, 6 words of each rank travel along the columns, inside the host, and 6 along the rows, from host to host.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from ..mesh.layout import Names, coordinates_of, members, position
from ..mesh.modes import GridShape

Sizes = tuple[int, int, int]  # of X, Y and W: of all linear maps of a model, or, where none is known, alike


def axis_words(grid: GridShape, operands: Sizes = (1, 1, 1)) -> list[tuple[Names, int]]:
    """Words that each axis moves for a pair of linear maps, outer->inner and inner->outer, forward and backward, whose operands have so
    many words a rank: by the terms of formulas.linear_words. The second is swapped where the two layouts differ."""
    x, y, w = operands
    axes, depth = grid.axes, grid.parts(grid.axes.depth)
    again = tuple(name for name in axes.m if name not in axes.depth)
    found: dict[Names, int] = {}
    ways = [(axes.n, axes.k), (axes.k, axes.n) if grid.outer != grid.inner else (axes.n, axes.k)]
    for first, second in ways:
        for names, words in ((first, 3 * x * (grid.parts(first) - 1)), (second, 2 * y * (grid.parts(second) - 1))):
            found[names] = found.get(names, 0) + words
        found[again] = found.get(again, 0) + 3 * w * (grid.parts(again) - 1) * depth
        found[axes.depth] = found.get(axes.depth, 0) + 2 * w * (depth - 1)
    return [(names, words) for names, words in found.items() if words]


def crossed_words(grid: GridShape, host_of: Sequence[int], operands: Sizes = (1, 1, 1)) -> int:
    """Of axis_words those that come from another host, of all ranks. host_of: of the mesh's ranks, in its order."""
    total = 0
    for names, words in axis_words(grid, operands):
        crossing = 0
        for index in range(grid.size):
            line = members(names, grid.sizes, coordinates_of(index, grid.sizes))
            before = line[line.index(index) - 1]
            crossing += host_of[before] != host_of[index]
        total += words * crossing
    return total


def orders(grid: GridShape) -> list[tuple[int, ...]]:
    """For every order of the axes the places that the mesh's ranks take in it; the mesh's own first."""
    names = tuple(grid.sizes)
    found = []
    for order in permutations(names):
        sizes = {name: grid.sizes[name] for name in order}
        found.append(tuple(position(order, sizes, coordinates_of(index, grid.sizes)) for index in range(grid.size)))
    return list(dict.fromkeys(found))


def best_order(grid: GridShape, host_of: Sequence[int], operands: Sizes = (1, 1, 1)) -> tuple[tuple[int, ...], int, int]:
    """(places, words, words as it is): the order of the ranks in which least crosses from host to host, the mesh's own where none is
    better. places: which of the mesh's ranks stands at each place of it."""
    now = crossed_words(grid, host_of, operands)
    counted = [(crossed_words(grid, [host_of[place] for place in order], operands), order) for order in orders(grid)]
    least = min(words for words, _ in counted)
    return next(order for words, order in counted if words == least), least, now
