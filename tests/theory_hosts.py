"""What each rank receives from other hosts, in bytes by axis, from docs/theory.md alone: imports nothing of gingham.

What has the slice dim streams in mesh order, so that a rank has what a gather or a reduce-scatter brings it from the one before it on the
axis, all of it. What has it not is gathered or summed whole: a block goes into each host once, to one of its ranks, a sum comes once from
each branch of the tree over places that is on one host. A relayout's pieces come from their holders. Example, 2x2 ranks (row, col) on hosts
a a b b: a ring over col stays inside a host, in one over row each rank's predecessor is on the other, so that all of it crosses: of W
[4, 4] a rank receives 4 words twice, of dW 4. Four ranks on a a b b, all-reduce of 4 words: each receives one share of a sum from the
other host, where it has been summed, and then one of the two sums of the other host's ranks.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

from theory import Grid, cuts, nested_cuts

Place = dict[str, int]  # coordinates by role: m, depth, row, n, k
ORDERS = {"1d": "n", "2d": "mn", "2.5d": "drn", "3d": "knm", "grid": "knm"}
ROLES = {"m": "m", "n": "n", "k": "k", "d": "depth", "r": "row"}


@dataclass
class Linear:
    """A layer without slices: [m, k] @ [k, n]."""

    m: int
    k: int
    n: int
    layout: str = "outer->outer"
    swapped: bool = False
    bias: bool = True


@dataclass
class Placed:
    """A grid whose place number i is on host hosts[i]; `mode` says in what order its axes are numbered."""

    grid: Grid
    mode: str
    hosts: Sequence[int]
    crossed: list[Counter[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.crossed = [Counter() for _ in self.hosts]
        grid = self.grid
        sizes = {"m": grid.pm, "n": grid.pn, "k": grid.pk, "depth": grid.depth, "row": grid.pm // grid.depth}
        order = [ROLES[letter] for letter in ORDERS[self.mode]]
        self.sizes, self.order = sizes, order
        self.places: list[Place] = []
        for place in product(*(range(sizes[role]) for role in order)):
            at = {"m": 0, "n": 0, "k": 0, "depth": 0, "row": 0} | dict(zip(order, place, strict=True))
            if "depth" in order:
                at["m"] = at["depth"] * sizes["row"] + at["row"]
            elif "m" in order:
                at["row"] = at["m"]
            self.places.append(at)
        assert len(self.places) == len(self.hosts) == prod(sizes[role] for role in order)

    def line(self, place: int, roles: Sequence[str]) -> list[int]:
        """The places that differ from this one in these roles only, in mesh order."""
        moved = {"depth", "row"} if "m" in roles and "depth" in self.order else set(roles)
        same = [role for role in self.order if role not in moved]
        return [other for other, at in enumerate(self.places) if all(at[role] == self.places[place][role] for role in same)]

    def gather(self, role: str, words: Callable[[int], int], item: int = 4, streams: bool = True) -> None:
        """words: of the block at a place."""
        if streams:
            self._ring(role, words, item, 0)
        for place in range(len(self.places) if not streams else 0):
            line = self.line(place, [role])
            for other in line:
                near, far = ([each for each in line if self.hosts[each] == self.hosts[at]] for at in (place, other))
                if other not in near and near[far.index(other) % len(near)] == place:
                    self._cross(place, role, item * words(other))

    def reduce_scatter(self, role: str, words: Callable[[int], int], item: int = 4, streams: bool = True) -> None:
        if streams:
            self._ring(role, words, item, -1)
        for place in range(len(self.places) if not streams else 0):
            line = self.line(place, [role])
            sums = [hosts.pop() for hosts in self._branches([self.hosts[each] for each in line])]
            self._cross(place, role, item * words(place) * sum(host != self.hosts[place] for host in sums))

    @staticmethod
    def _branches(hosts: Sequence[int]) -> list[set[int]]:
        """Of a line: pairs of places are summed, then pairs of pairs, and so on; the largest of these that are of one host."""
        whole = [{host} for host in hosts]
        size = 1
        while size < len(hosts):
            size *= 2
            for first in range(0, len(hosts), size):
                found = {host for each in whole[first : first + size] for host in each}
                if len(found) == 1:
                    whole[first : first + size] = [found] + [set()] * (len(whole[first : first + size]) - 1)
        return [hosts for hosts in whole if hosts]

    def _cross(self, place: int, role: str, count: int) -> None:
        if count:
            self.crossed[place][self.grid.key(role)] += count

    def _ring(self, role: str, words: Callable[[int], int], item: int, left_out: int) -> None:
        """Each rank receives every block of the axis but one from its predecessor: its own, or in sums the predecessor's."""
        for place in range(len(self.places)):
            line = self.line(place, [role])
            own = line.index(place)
            if len(line) > 1 and self.hosts[line[own - 1]] != self.hosts[place]:
                received = sum(words(other) for other in line) - words(line[own + left_out])
                self._cross(place, role, item * received)

    def all_reduce(self, role: str, words: Callable[[int], int], item: int = 4) -> None:
        """words: of the tensor, the same on the axis; it is cut in chunks of its own."""

        def part(place: int) -> int:
            line = self.line(place, [role])
            begin, end = cuts(words(place), len(line))[line.index(place)]
            return end - begin

        self.reduce_scatter(role, part, item, streams=False)
        self.gather(role, part, item, streams=False)

    def rows(self, m: int, place: int) -> tuple[int, int]:
        at, grid = self.places[place], self.grid
        if grid.rows == "replicated":
            return 0, m
        if grid.rows == "sequence":
            return cuts(m, grid.pn)[at["n"]]
        return nested_cuts(m, (grid.depth, grid.pm // grid.depth))[at["m"]]

    def features(self, size: int, place: int, roles: Sequence[str]) -> tuple[int, int]:
        """Cut over the roles, the first one outermost."""
        index = 0
        for role in roles:
            index = index * self.sizes[role] + self.places[place][role]
        return nested_cuts(size, [self.sizes[role] for role in roles])[index]

    def block(self, m: int, size: int, layout: str, place: int) -> tuple[tuple[int, int], tuple[int, int]]:
        if self.grid.rows == "replicated":
            return (0, m), (0, size) if layout == "outer" else self.features(size, place, "n")
        if self.grid.rows == "sequence":
            return (self.rows(m, place), (0, size)) if layout == "outer" else ((0, m), self.features(size, place, "n"))
        return self.rows(m, place), self.features(size, place, "kn" if layout == "outer" else "nk")

    def relayout(self, m: int, size: int, to: str) -> None:
        """Y from inner to outer, or back."""
        source = "inner" if to == "outer" else "outer"
        if self.grid.rows == "replicated" and to == "inner":
            return  # each rank has its part already
        if not self.grid.rows and (self.grid.pn == 1 or self.grid.pk == 1):
            return
        for place in range(len(self.places)):
            wanted = self.block(m, size, to, place)
            for other in self.line(place, "nk"):
                if self.hosts[other] != self.hosts[place]:
                    held = self.block(m, size, source, other)
                    self.crossed[place][self.grid.key("nk")] += 4 * _area(*map(_common, wanted, held))

    def linear(self, layer: Linear) -> None:
        """Forward, and backward with all gradients."""
        grid = self.grid
        differ = bool(grid.rows) or (grid.pn > 1 and grid.pk > 1)
        swapped = layer.layout == "inner->outer" if differ and layer.layout != "outer->outer" else layer.swapped
        x_role, y_role = ("k", "n") if swapped else ("n", "k")
        x_layout, y_layout = ("inner", "outer") if swapped else ("outer", "inner")
        moves = differ and layer.layout == "outer->outer"
        weight_role = "row" if grid.depth > 1 and not grid.sharded else "m"

        def x(place: int) -> int:
            return _area(*self.block(layer.m, layer.k, x_layout, place))

        def y(place: int) -> int:
            return _area(*self.block(layer.m, layer.n, y_layout, place))

        def w(place: int) -> int:
            over = ("row",) if weight_role == "row" else ("depth", "row")  # beside the outermost cut of one dim
            k, n = (("n",), ("k", *over)) if swapped else (("k", *over), ("n",))
            return _area(self.features(layer.k, place, k), self.features(layer.n, place, n))

        if moves and swapped:
            self.relayout(layer.m, layer.k, "inner")
        x_streams, y_streams = not swapped or grid.rows == "sequence", swapped or grid.rows == "sequence"
        self._x(x_role, x, x_streams)
        self.gather(weight_role, w)
        self._sum(y_role, y, y_streams)
        if moves and not swapped:
            self.relayout(layer.m, layer.n, "outer")
            self.relayout(layer.m, layer.n, "inner")  # of dY
        if grid.rows != "replicated":
            self.gather(y_role, y, streams=y_streams)
        self.gather(weight_role, w)
        self._sum(x_role, x, x_streams)
        self._x(x_role, x, x_streams)
        self.reduce_scatter(weight_role, w)
        if weight_role == "row":
            self.all_reduce("depth", w)
        if layer.bias:
            self._bias(lambda place: _length(self.features(layer.n, place, "k" if swapped else "n")))
        if moves and swapped:
            self.relayout(layer.m, layer.k, "outer")

    def _x(self, role: str, x: Callable[[int], int], streams: bool) -> None:
        if self.grid.rows != "replicated":
            self.gather(role, x, streams=streams)

    def _sum(self, role: str, block: Callable[[int], int], streams: bool) -> None:
        if self.grid.rows != "replicated":
            self.reduce_scatter(role, block, streams=streams)
        elif self.sizes[role] > 1:
            self.all_reduce(role, block)

    def _bias(self, words: Callable[[int], int]) -> None:
        grid = self.grid
        if grid.depth == 1 or grid.sharded:
            self.all_reduce("m", words)
            return
        row = grid.pm // grid.depth

        def part(place: int) -> int:
            return _length(cuts(words(place), row)[self.places[place]["row"]])

        self.reduce_scatter("row", part, streams=False)
        self.all_reduce("depth", part)
        self.gather("row", part, streams=False)


def _length(interval: tuple[int, int]) -> int:
    return interval[1] - interval[0]


def _area(rows: tuple[int, int], columns: tuple[int, int]) -> int:
    return _length(rows) * _length(columns)


def _common(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    begin, end = max(one[0], other[0]), min(one[1], other[1])
    return begin, max(begin, end)
