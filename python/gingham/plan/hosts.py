"""How much of what a grid moves goes from host to host, and in which order of its ranks least does (docs/hosts.md).

Example: 2 x 2 ranks, two on each host in their order, so that the last axis lies inside a host. Of a pair of linear maps whose X, Y and W
have one word a rank, 6 words of each rank travel along the columns, inside the host, and 6 along the rows, from host to host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from ..mesh.layout import Names, coordinates_of, members, position
from ..mesh.modes import GridShape, neighbours
from .pipeline import borders_of, rank_of

Sizes = tuple[int, int, int]  # of X, Y and W: of all linear maps of a model, or, where none is known, alike


@dataclass
class Moved:
    """Words a rank of what an axis moves, by how it goes where ranks of the axis are on several hosts (docs/theory.md section 3)."""

    streamed: int = 0  # from rank to rank, while it is multiplied
    gathered: int = 0  # once into each host
    summed: int = 0  # once from each branch of the tree of sums that lies on one host

    def words(self, size: int) -> int:
        """That a rank receives on an axis of so many ranks."""
        return (self.streamed + self.gathered + self.summed) * (size - 1)

    def crossed(self, hosts: Sequence[int]) -> int:
        """Of all ranks of a line those words that come from another host. hosts: of its ranks, in its order."""
        along = sum(hosts[at - 1] != hosts[at] for at in range(len(hosts))) * (len(hosts) - 1)
        into = len(hosts) * (len(set(hosts)) - 1)
        whole = branches(hosts)
        summed = sum(hosts[first] != host for host in hosts for first in whole)
        return self.streamed * along + self.gathered * into + self.summed * summed


def branches(hosts: Sequence[int], first: int = 0) -> list[int]:
    """The first place of each largest branch of the tree of sums over a line whose ranks are all on one host."""
    if len(set(hosts)) <= 1:
        return [first] if hosts else []
    half = 1 << (len(hosts) - 1).bit_length() - 1
    return branches(hosts[:half], first) + branches(hosts[half:], first + half)


def axis_words(grid: GridShape, operands: Sizes = (1, 1, 1), microbatches: int = 1) -> dict[Names, Moved]:
    """What each axis moves for a pair of linear maps, outer->inner and inner->outer, forward and backward, whose operands have so many
    words a rank: by the terms of formulas.linear_words. The second is swapped where the two layouts differ: what has the slice dim streams,
    Y of the first and X of the second have not, but for rows that are cut (sequence), where both have.
    microbatches: of the rows, each of which gathers and scatters weights, while sums over replicas are made once."""
    x, y, w = operands
    axes, depth = grid.axes, grid.parts(grid.axes.depth)
    kept = grid.parts(axes.kept)
    found: dict[Names, Moved] = {}

    def of(names: Names) -> Moved:
        return found.setdefault(names, Moved())

    differ = grid.outer != grid.inner
    by_rows = bool({*axes.n, *axes.k} & {*grid.outer.rows, *grid.inner.rows})
    for swapped in (False, differ):
        first, second = (axes.k, axes.n) if swapped else (axes.n, axes.k)
        if swapped and not by_rows:
            of(first).gathered += 2 * x
            of(first).summed += x
        else:
            of(first).streamed += 3 * x
        if swapped or by_rows:
            of(second).streamed += 2 * y
        else:
            of(second).gathered += y
            of(second).summed += y
        of(axes.gathered).streamed += 3 * w * depth * kept * microbatches
        of(axes.kept).gathered += w * depth
        of(axes.kept).summed += w * depth
        of(axes.depth).gathered += w
        of(axes.depth).summed += w
    return {names: moved for names, moved in found.items() if moved.words(grid.parts(names))}


def crossed_words(grid: GridShape, host_of: Sequence[int], operands: Sizes = (1, 1, 1), microbatches: int = 1) -> int:
    """Of axis_words those that come from another host, of all ranks. host_of: of the mesh's ranks, in its order."""
    total = 0
    for names, moved in axis_words(grid, operands, microbatches).items():
        lines = {tuple(members(names, grid.sizes, coordinates_of(index, grid.sizes))) for index in range(grid.size)}
        total += sum(moved.crossed([host_of[index] for index in line]) for line in lines)
    return total


def crossed_by_stages(
    grid: GridShape, size: int, schedule: str, host_of: Sequence[int], operands: Sequence[Sizes], passed: Sequence[int], microbatches: int
) -> int:
    """crossed_words of a pipeline of `size` ranks, and of what its stages hand on, there and back. grid: of a stage; host_of: of the job's
    ranks, by pipeline, data and tensor; operands: of each stage; passed: words of a rank's block of all rows behind each."""
    found, stages = 0, len(operands)
    hosts = [[host_of[grid.size * place + rank] for rank in neighbours(grid.axes)] for place in range(size)]
    for stage, sizes in enumerate(operands):
        found += crossed_words(grid, hosts[rank_of(stage, size, schedule)], sizes, microbatches)
    for stage, first, second in borders_of(size, schedule, stages // size):
        found += 2 * passed[stage] * sum(one != other for one, other in zip(hosts[first], hosts[second], strict=True))
    return found


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
