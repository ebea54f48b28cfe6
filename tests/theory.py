"""What every call must receive, in bytes and messages per axis, from docs/theory.md alone: imports nothing of gingham.

A Grid is pm x pn x pk ranks; in 2.5d m is (depth, row). Words are summed over all ranks of the job, which is exact for
sizes that do not divide too; messages are what each single rank receives. Example, Y = X W on 2x2x1, M = K = N = 4:
X travels along n: MK(pn-1) = 16 words in all, 4 per rank, one message; W along m: the same; Y stays.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

PRODUCTS = ("y", "dx", "dw")


def cuts(length: int, parts: int) -> list[tuple[int, int]]:
    """torch.chunk: pieces of ceil(length / parts), the last ones shorter or empty."""
    step = -(-length // parts)
    return [(min(i * step, length), min((i + 1) * step, length)) for i in range(parts)]


def nested_cuts(length: int, sizes: Iterable[int]) -> list[tuple[int, int]]:
    """Cut axis by axis: 37 over (2, 3) gives lengths 7,7,5,6,6,6."""
    pieces = [(0, length)]
    for size in sizes:
        pieces = [(a + x, a + y) for a, b in pieces for x, y in cuts(b - a, size)]
    return pieces


@dataclass
class Grid:
    """depth: the part of pm over which W is replicated (2.5d); sharded: W is cut over depth too.
    rows: "" (activations cut over m), "replicated" (1d classic) or "sequence" (1d): P = pn, outer and inner differ."""

    pm: int = 1
    pn: int = 1
    pk: int = 1
    depth: int = 1
    sharded: bool = False
    rows: str = ""
    names: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.pm * self.pn * self.pk

    @classmethod
    def of(cls, mode: str = "grid", size: int = 1, depth: int = 1, grid: tuple[int, int, int] = (1, 1, 1), **flags: bool) -> "Grid":
        """The grid of gingham.init's arguments, with the axis names under which its mesh counts."""
        if mode == "1d":
            return cls(pn=size, rows="sequence" if flags.get("sequence") else "replicated", names={"n": "tp", "nk": "tp"})
        if mode in ("2d", "2.5d"):
            q = round((size // depth) ** 0.5)
            names = {"m": "row" if depth == 1 else "depth" if q == 1 else "m", "n": "col", "nk": "col"}
            return cls(depth * q, q, 1, depth=depth, sharded=flags.get("shard_depth", False), names=names)
        if mode == "3d":
            p = round(size ** (1 / 3))
            grid = (p, p, p)
        return cls(*grid, names={"nk": "features" if grid[1] > 1 and grid[2] > 1 else "n" if grid[1] > 1 else "k"})

    def key(self, role: str) -> str:
        """The name under which traffic() counts m, row, depth, n or k."""
        return self.names.get(role, role)


@dataclass
class Cost:
    """words: summed over all ranks; messages: per rank; unlike: further messages, summed over ranks that differ; by axis."""

    words: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    unlike: Counter[str] = field(default_factory=Counter)

    def add(self, axis: str, words: int, messages: int) -> None:
        if words or messages:
            self.words[axis] += words
            self.messages[axis] += messages

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.words + other.words, self.messages + other.messages, self.unlike + other.unlike)

    def bytes(self, item: int) -> "Cost":
        """The same with words of `item` bytes counted in bytes."""
        return Cost(Counter({axis: words * item for axis, words in self.words.items()}), Counter(self.messages), Counter(self.unlike))


def all_gather(cost: Cost, axis: str, size: int, words: int, messages: int = 1) -> None:
    """words: of the whole operand summed over every group of the axis."""
    cost.add(axis, words * (size - 1), messages * (size - 1))


reduce_scatter = all_gather


def all_reduce(cost: Cost, axis: str, size: int, words: int) -> None:
    cost.add(axis, 2 * words * (size - 1), 2 * (size - 1))


def _weight(cost: Cost, grid: Grid, w: int, messages: int) -> None:
    """W gathered, or dW scattered, over m; replicated over depth every layer of the grid does it for itself."""
    if grid.depth > 1 and not grid.sharded:
        all_gather(cost, grid.key("row"), grid.pm // grid.depth, w * grid.depth, messages)
    else:
        all_gather(cost, grid.key("m"), grid.pm, w, messages)


def bias_gradient(grid: Grid, n: int, copies: int) -> Cost:
    """db all-reduced over m; copies: the ranks that hold the same block of the gathered dY (those along its cut axis)."""
    cost = Cost()
    if grid.depth > 1 and not grid.sharded:
        row = grid.pm // grid.depth
        reduce_scatter(cost, grid.key("row"), row, n * copies * grid.depth)
        all_gather(cost, grid.key("row"), row, n * copies * grid.depth)
        all_reduce(cost, grid.key("depth"), grid.depth, n * copies)
    else:
        all_reduce(cost, grid.key("m"), grid.pm, n * copies)
    return cost


def step(
    grid: Grid, m: int, k: int, ns: list[int], products: Iterable[str], swapped: bool, slices: int, bias: bool, slice_dim: str = ""
) -> Cost:
    """The step of linears that share X, without relayouts: `y` forward, `dx` and `dw` backward with dY gathered once."""
    cost = Cost()
    wanted = set(products)
    loop = slice_dim or ("N" if swapped else "K")
    x_axis, y_axis = ("k", "n") if swapped else ("n", "k")
    px, py = (getattr(grid, "p" + axis) for axis in (x_axis, y_axis))
    s = {"x": slices if loop in "MK" else 1, "w": slices if loop in "KN" else 1, "y": slices if loop in "MN" else 1}
    x, y, w = m * k, m * sum(ns), k * sum(ns)
    many = len(ns)
    x_key, y_key = grid.key(x_axis), grid.key(y_axis)
    if "y" in wanted:
        _gather_x(cost, grid, x_key, px, x, s["x"])
        _weight(cost, grid, w, s["w"] * many)
        if grid.rows == "replicated":
            all_reduce(cost, y_key, py, y)
        else:
            reduce_scatter(cost, y_key, py, y, s["y"] * many)
    if wanted & {"dx", "dw"} and grid.rows != "replicated":
        all_gather(cost, y_key, py, y, s["y"] * many)
    if "dx" in wanted:
        _weight(cost, grid, w, s["w"] * many)
        if grid.rows == "replicated":
            all_reduce(cost, x_key, px, x)
        else:
            reduce_scatter(cost, x_key, px, x, s["x"])
    if "dw" in wanted:
        _gather_x(cost, grid, x_key, px, x, s["x"])
        _weight(cost, grid, w, s["w"] * many)
        if grid.depth > 1 and not grid.sharded:
            for n in ns:
                all_reduce(cost, grid.key("depth"), grid.depth, k * n)
        if bias:
            for n in ns:
                cost += bias_gradient(grid, n, py)
    return cost


def _gather_x(cost: Cost, grid: Grid, axis: str, size: int, x: int, messages: int) -> None:
    if grid.rows != "replicated":
        all_gather(cost, axis, size, x, messages)


def relayout(grid: Grid, rows: int, features: int, to: str, between: int = 1) -> Cost:
    """Y from `inner` to `outer` or back; the same permutation serves forward and, the other way, backward. between: rows
    that are cut together (those of one sample)."""
    cost = Cost()
    size = grid.pn * grid.pk
    if size == 1:
        return cost
    if grid.rows == "replicated":
        if to == "outer":
            all_gather(cost, grid.key("n"), size, rows * features)
        return cost
    if grid.rows == "sequence":
        stay = sum((b - a) * (d - c) for (a, b), (c, d) in zip(cuts(rows // between, size), cuts(features, size), strict=True))
        stay *= between
        cost.add(grid.key("n"), rows * features - stay, size - 1)
        return cost
    if grid.pn == 1 or grid.pk == 1:
        return cost
    outer = nested_cuts(features, (grid.pk, grid.pn))
    inner = nested_cuts(features, (grid.pn, grid.pk))
    stay = 0
    for k in range(grid.pk):
        for n in range(grid.pn):
            a, b = outer[k * grid.pn + n]
            c, d = inner[n * grid.pk + k]
            stay += max(0, min(b, d) - max(a, c))
    cost.words[grid.key("nk")] += rows * (features - stay)
    ranks = [(outer[k * grid.pn + n], inner[n * grid.pk + k]) for k in range(grid.pk) for n in range(grid.pn)]
    held, wanted = zip(*(pair if to == "inner" else pair[::-1] for pair in ranks), strict=True)
    for mine, (a, b) in zip(held, wanted, strict=True):
        if not (mine[0] <= a and b <= mine[1]):
            cost.unlike[grid.key("nk")] += grid.pm * sum(other != mine and max(a, other[0]) < min(b, other[1]) for other in held)
    return cost


def linear(
    grid: Grid,
    m: int,
    k: int,
    n: int | list[int],
    *,
    layout: str = "outer->outer",
    swapped: bool | str = False,
    bias: bool = True,
    products: Iterable[str] = PRODUCTS,
    slices: int | None = None,
    between: int = 1,
) -> Cost:
    """A Linear layer, or several that share X: the step of its layout and at most one relayout each way. slices: by default 4 where a
    rank's part of W has a million words, and 256 along either dim."""
    ns = [n] if isinstance(n, int) else n
    if slices is None:
        slices = 4 if k * max(ns) >= 2**20 * grid.size and min(k, *ns) >= 256 * grid.pk else 1
    products = set(products)
    differ = bool(grid.rows) or (grid.pn > 1 and grid.pk > 1)
    if differ and layout != "outer->outer":
        swapped = layout == "inner->outer"
    elif swapped == "auto":
        ways = (linear(grid, 2 * grid.size, k, ns, layout=layout, swapped=way, bias=False) for way in (False, True))
        unswapped_words, swapped_words = (sum(way.words.values()) for way in ways)
        swapped = swapped_words < unswapped_words
    swapped = bool(swapped)
    cost = step(grid, m, k, ns, products, swapped, slices, bias, "M" if grid.rows == "sequence" else "")
    if not differ or layout != "outer->outer":
        return cost
    moved = [k] if swapped else ns
    forward, backward = ("inner", "outer") if swapped else ("outer", "inner")
    for features in moved:
        if "y" in products:
            cost += relayout(grid, m, features, forward, between)
        if ("dx" in products) if swapped else (products & {"dx", "dw"}):
            cost += relayout(grid, m, features, backward, between)
    return cost


def feature_ranks(grid: Grid) -> int:
    """Ranks among which outer cuts the features."""
    return 1 if grid.rows else grid.pn * grid.pk


def row_ranks(grid: Grid) -> tuple[str, int]:
    """Ranks among which outer cuts the rows, and their axis."""
    return (grid.key("n"), grid.pn if grid.rows == "sequence" else 1) if grid.rows else (grid.key("m"), grid.pm)


def layer_norm(grid: Grid, rows: int, features: int, item: int = 4) -> Cost:
    """Bytes, outer layout: two float64 sums a row each way; gamma's and beta's gradients in one all-reduce."""
    cost = Cost()
    ranks = feature_ranks(grid)
    all_gather(cost, grid.key("nk"), ranks, 2 * 16 * rows * ranks, 2)
    axis, size = row_ranks(grid)
    all_reduce(cost, axis, size, 2 * features * max(4, item))
    return cost


def embedding(grid: Grid, count: int, width: int) -> Cost:
    """Words: the table gathered forward, its gradient scattered backward over the row ranks, then summed over depth."""
    cost = Cost()
    if grid.rows == "replicated":
        all_gather(cost, grid.key("n"), grid.pn, count * width)
    elif grid.rows == "sequence":
        all_gather(cost, grid.key("n"), grid.pn, count * width, 1)
        reduce_scatter(cost, grid.key("n"), grid.pn, count * width, 1)
    else:
        _weight(cost, grid, count * width, 2)
        cost.words = Counter({axis: 2 * words for axis, words in cost.words.items()})
        if grid.depth > 1 and not grid.sharded:
            all_reduce(cost, grid.key("depth"), grid.depth, count * width)
    return cost


def cross_entropy(grid: Grid, rows: int, layout: str = "outer") -> Cost:
    """Bytes: four float64 numbers a row over the feature ranks; (sum, count) over the row ranks; backward nothing."""
    cost = Cost()
    inner = layout == "inner"
    ranks = grid.pn * grid.pk if inner else feature_ranks(grid)
    all_gather(cost, grid.key("nk"), ranks, 32 * rows * ranks)
    axis, size = (grid.key("n"), 1) if inner and grid.rows else row_ranks(grid)
    cost.add(axis, 16 * (size - 1) * grid.size, size - 1)
    return cost


def attention(grid: Grid, rows: int, width: int, swapped: bool | str = False, slices: int | None = None) -> Cost:
    """Words of q, k and v, which share one gathered X, and of o; attention itself moves nothing, dropout neither."""
    projections = linear(grid, rows, width, [width] * 3, layout="outer->inner", swapped=swapped, slices=slices)
    return projections + linear(grid, rows, width, width, layout="inner->outer", swapped=swapped, slices=slices)


def mlp(
    grid: Grid, rows: int, width: int, hidden: int, swapped: bool | str = False, slices: int | None = None, gated: bool = False
) -> Cost:
    first = linear(grid, rows, width, [hidden, hidden] if gated else hidden, layout="outer->inner", swapped=swapped, slices=slices)
    return first + linear(grid, rows, hidden, width, layout="inner->outer", swapped=swapped, slices=slices)


@dataclass(frozen=True)
class GPT:
    layers: int = 4
    width: int = 256
    vocabulary: int = 256
    context: int = 128
    swapped: bool | str = "auto"

    def step(self, grid: Grid, batch: int, item: int = 4, slices: int | None = None) -> Cost:
        """Bytes of forward and backward of one step on [batch, context] tokens, loss over logits in the inner layout."""
        rows = batch * self.context
        cost = embedding(grid, self.vocabulary, self.width) + embedding(grid, self.context, self.width)
        for _ in range(self.layers):
            cost += attention(grid, rows, self.width, self.swapped, slices)
            cost += mlp(grid, rows, self.width, 4 * self.width, self.swapped, slices)
        cost += linear(grid, rows, self.width, self.vocabulary, layout="outer->inner", swapped=self.swapped, slices=slices)
        cost = cost.bytes(item)
        for _ in range(2 * self.layers + 1):
            cost += layer_norm(grid, rows, self.width, item)
        return cost + cross_entropy(grid, rows, "inner")
