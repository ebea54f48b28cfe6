"""What layers move and hold on a grid, from docs/theory.md section 4: arithmetic on axes, for a mesh that runs or one only thought of.

Bytes and words are summed over all ranks of the job, which is exact for sizes that do not divide too; messages are one
rank's. Forward and backward. Example, Y = X W on 2 x 2 x 1, M = K = N = 4 without bias: X travels along n three times, W
along m three times, Y stays: 3 * 16 + 3 * 16 = 96 words and 6 messages.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import MeshError
from ..mesh.layout import Cuts, Layout, Names, block, chunks, coordinates_of, intersection, interval, runs, volume
from ..mesh.modes import GridShape


def x_is_whole(grid: GridShape, swapped: bool) -> bool:
    """Whether X (swapped: Y) lies whole on every rank of its axis, as in classic 1d, instead of being cut along it."""
    again, layout = set(grid.axes.k if swapped else grid.axes.n), grid.inner if swapped else grid.outer
    return not again <= {*layout.features, *layout.rows}


def linear_words(grid: GridShape, m: int, k: int, n: Sequence[int], swapped: bool, bias: bool, need_x: bool = True) -> int:
    """Linear maps [m, k] -> [m, n_i] that share X, without relayouts: 3x(pn-1) + 2y(pk-1) + 3w(pm-1), swapped: n and k
    trade; weights replicated over depth 2w(d-1) for their gradients' sum; kept whole over data w(d-1) each way; db, all-reduced over m."""
    pm, pn, pk = grid.grid
    px, py = (pk, pn) if swapped else (pn, pk)
    depth, kept = grid.parts(grid.axes.depth), grid.parts(grid.axes.kept)
    x, y, w = m * k, m * sum(n), k * sum(n)
    # X's passages are those of X forward and backward and of dX; classic 1d: only dX's sum, an all-reduce
    there, gradient = (0, 2) if x_is_whole(grid, swapped) else (2, 1)
    words = (there + gradient * need_x) * x * (px - 1) + 2 * y * (py - 1)
    # W forward, for dX, and dW
    words += (2 + need_x) * w * (pm - depth * kept) + 2 * w * depth * (kept - 1) + 2 * w * (depth - 1)
    return words + (2 * sum(n) * py * (pm - 1) if bias else 0)


def linear_saved(grid: GridShape, k: int, n: Sequence[int], swapped: bool, bias: bool, parts: int) -> int:
    """What a step of `parts` micro-batches, under no_sync and in pipelines, receives less than linear_words of each: sums over replicas,
    and what keeps weights whole over data, are made once. So are sums of a bias's gradient where dY is cut as the bias is, then over all
    ranks that cut dY's rows."""
    depth, kept, w = grid.parts(grid.axes.depth), grid.parts(grid.axes.kept), k * sum(n)
    saved = (parts - 1) * (2 * w * depth * (kept - 1) + 2 * w * (depth - 1))
    layout, second = (grid.outer, grid.axes.k) if swapped else (grid.inner, grid.axes.n)
    if not bias or layout.features != second:
        return saved
    rows = grid.parts(layout.rows)
    once = 2 * sum(n) * (rows - 1) * (grid.size // (rows * grid.parts(second)))
    return saved + parts * 2 * sum(n) * grid.grid[1 if swapped else 2] * (grid.grid[0] - 1) - once


def linear_messages(grid: GridShape, maps: int, swapped: bool, bias: bool, slices: int = 1) -> int:
    """Messages of `maps` linear maps that share X: 3(px-1) for X and 2(py-1) for Y, 3(pm-1) for W and 2(d-1) for its sum over depth or to
    keep it whole over data; db: an all-reduce over m, in 2.5d over row and depth. slices: of the dim that the step loops over, K, swapped
    N, in sequence mode M; an operand that has it goes in so many messages."""
    pm, pn, pk = grid.grid
    px, py = (pk, pn) if swapped else (pn, pk)
    depth, kept = grid.parts(grid.axes.depth), grid.parts(grid.axes.kept)
    row = pm // (depth * kept)
    by_rows = bool({*grid.axes.n, *grid.axes.k} & {*grid.outer.rows, *grid.inner.rows})
    sx, sy, sw = (slices, slices, 1) if by_rows else (1, slices, slices) if swapped else (slices, 1, slices)
    x, y = (2 * (px - 1), 2 * (py - 1)) if x_is_whole(grid, False) else (3 * (px - 1) * sx, 2 * (py - 1) * maps * sy)
    db = 2 * (row - 1) + 2 * (depth * kept - 1) if depth * kept > 1 else 2 * (pm - 1)
    return x + y + maps * (3 * (row - 1) * sw + 2 * (kept - 1) + 2 * (depth - 1) + (db if bias else 0))


def linear_messages_saved(grid: GridShape, maps: int, swapped: bool, bias: bool, parts: int) -> int:
    """linear_saved, of the messages of one rank."""
    depth, kept = grid.parts(grid.axes.depth), grid.parts(grid.axes.kept)
    saved = (parts - 1) * (2 * (kept - 1) + 2 * (depth - 1))
    layout, second = (grid.outer, grid.axes.k) if swapped else (grid.inner, grid.axes.n)
    if bias and layout.features == second:
        pm = grid.grid[0]
        each = 2 * (pm // (depth * kept) - 1) + 2 * (depth * kept - 1) if depth * kept > 1 else 2 * (pm - 1)
        saved += parts * each - 2 * (grid.parts(layout.rows) - 1)
    return maps * saved


# (words of a rank's part of W, slices): from so many words on a panel goes in so many pieces. Larger products compute longer than they
# wait, and pay for slices with products of shorter K.
SLICED = ((1 << 22, 2), (1 << 20, 4))


def usual_slices(grid: GridShape, k: int, n: Sequence[int]) -> int:
    """The slices of a step on CPUs where init was given none: of global sizes alone, so that sums have the same bits wherever the ranks
    are. The dim that is sliced lies cut over the axes k, K as it stands, swapped N."""
    most, shortest = k * max(n) // grid.size, min(k, *n) // grid.parts(grid.axes.k)
    fitting = (slices for words, slices in SLICED if most >= words and shortest >= 64 * slices)
    return next(fitting, 1) if grid.size > 1 else 1


def relayout_words(grid: GridShape, rows: int, features: int, source: Layout, target: Layout) -> int:
    """What every rank's new block has and its old one had not; nothing for ranks that hold the new block already."""
    words = 0
    for rank in range(grid.size if source != target else 0):
        place = coordinates_of(rank, grid.sizes)
        old, new = (
            [interval(size, names, grid.sizes, place) for size, names in ((rows, layout.rows), (features, layout.features))]
            for layout in (source, target)
        )
        both = [max(0, min(a + p, b + q) - max(a, b)) for (a, p), (b, q) in zip(old, new, strict=True)]
        words += new[0][1] * new[1][1] - both[0] * both[1]
    return words


Way = tuple[Layout, Layout]  # from, to


def linear_relayouts(grid: GridShape, rows: int, k: int, n: Sequence[int], x: Way, y: Way, need_x: bool = True) -> list[int]:
    """Words of each relayout around linear maps [rows, k] -> [rows, n_i], forward and backward: see linear_traffic."""
    ways = [(*x, k), *((*y, size) for size in n), *((y[1], y[0], size) for size in n)] + [(x[1], x[0], k)] * need_x
    return [relayout_words(grid, rows, size, source, target) for source, target, size in ways]


def linear_traffic(
    grid: GridShape,
    rows: int,
    k: int,
    n: Sequence[int],
    swapped: bool,
    bias: bool,
    x: Way,
    y: Way,
    inner: int = 1,
    need_x: bool = True,
) -> int:
    """Words of linear maps that share X, [rows, inner, k] -> [rows, inner, n_i], with their relayouts: of X from the caller's layout to the
    step's, of Y from the step's to the caller's, each once more the other way in backward. Layouts cut `rows` and features. need_x: X has
    a gradient."""
    moved = linear_relayouts(grid, rows, k, n, x, y, need_x)
    return linear_words(grid, rows * inner, k, n, swapped, bias, need_x) + inner * sum(moved)


def reshard_words(grid: GridShape, shape: Sequence[int], source: Cuts, target: Cuts) -> int:
    """A parameter cut anew forward and its gradient backward: what every rank's new block has and its old one had not, both ways."""
    words = 0
    for rank in range(grid.size):
        place = coordinates_of(rank, grid.sizes)
        old, new = (block(shape, cuts, grid.sizes, place) for cuts in (source, target))
        words += volume(old) + volume(new) - 2 * volume(intersection(old, new))
    return words


def is_swapped(grid: GridShape, k: int, n: Sequence[int], layout: str, asked: bool | str | None) -> bool:
    """Whether linear maps [.., k] -> [.., n_i] that share X have n and k traded. Where outer and inner differ, a layout with an inner end
    decides; else what is asked: None is no, "auto" what moves less. Raises MeshError where asked disagrees with the layout."""
    source, target = layout.split("->")
    if grid.outer != grid.inner and "inner" in (source, target):
        needed = source == "inner"
        if asked not in (None, "auto", needed):
            raise MeshError(f"swapped={asked} disagrees with layout={layout!r}, which is swapped={needed} on {grid}")
        return needed
    if asked != "auto":
        return bool(asked)
    rows = 2 * grid.size  # W moves alike both ways, so that any number does that all ranks divide

    def words(swapped: bool) -> int:
        at_x, at_y = (grid.inner, grid.outer) if swapped else (grid.outer, grid.inner)
        return linear_traffic(grid, rows, k, n, swapped, False, (grid.layout(source), at_x), (at_y, grid.layout(target)))

    return words(True) < words(False)


def table_axes(grid: GridShape) -> tuple[Names, Names]:
    """(axes that cut an embedding's rows as it is used, those over which its gradient is summed as it is cut)."""
    summed = tuple(name for name in grid.outer.rows if name not in grid.axes.depth + grid.axes.kept)
    return summed or tuple(name for name in grid.axes.n + grid.axes.k if name not in grid.outer.features), summed


def embedding_words(grid: GridShape, count: int, width: int) -> int:
    """The table gathered forward and its gradient scattered backward over the row ranks; then kept whole over data, or summed over
    depth. Ranks that hold the same
    rows of activations, as in 1d with data, each do it for themselves."""
    table, depth, kept = count * width, grid.parts(grid.axes.depth), grid.parts(grid.axes.kept)
    cut, summed = table_axes(grid)
    alike = grid.size // (grid.parts(cut) * depth * kept * grid.parts(grid.outer.features))
    return (2 if summed else 1) * table * depth * kept * (grid.parts(cut) - 1) * alike + embedding_sums(grid, count, width)


def embedding_sums(grid: GridShape, count: int, width: int) -> int:
    """Of embedding_words those that micro-batches pay once: see linear_saved."""
    table, depth, kept = count * width, grid.parts(grid.axes.depth), grid.parts(grid.axes.kept)
    alike = grid.size // (grid.parts(table_axes(grid)[0]) * depth * kept * grid.parts(grid.outer.features))
    return (2 * table * depth * (kept - 1) + 2 * table * (depth - 1)) * alike


def embedding_messages(grid: GridShape) -> int:
    cut, summed = table_axes(grid)
    return (2 if summed else 1) * (grid.parts(cut) - 1) + 2 * (grid.parts(grid.axes.depth) - 1) + 2 * (grid.parts(grid.axes.kept) - 1)


def norm_axes(grid: GridShape, layout: Layout) -> Names:
    """The axes that cut a per-feature parameter at rest: the features', in full where they stand in the mesh's order."""
    names = layout.features
    return names if list(names) == [name for name in grid.sizes if name in names] else names[:1]


def feature_words(grid: GridShape, features: int, layout: Layout) -> int:
    """The gradient of a per-feature parameter, summed over the row ranks and over those that hold a copy of its piece; ranks that hold the
    same block of the activation each do it for themselves."""
    over_rows, copies = grid.parts(layout.rows), grid.parts(layout.features) // grid.parts(norm_axes(grid, layout))
    alike = grid.size // (over_rows * grid.parts(layout.features))
    return 2 * features * ((over_rows - 1) * copies + (copies - 1) * over_rows) * alike


def norm_bytes(grid: GridShape, rows: int, features: int, item: int, layout: Layout, sums: int = 2, tensors: int = 2) -> int:
    """`sums` float64 a row each way over the feature ranks (LayerNorm 2, RMSNorm 1); `tensors` gradients (2 or 1), of
    `item` bytes a word, summed over the row ranks."""
    ranks = grid.parts(layout.features)
    return 2 * 8 * sums * rows * ranks * (ranks - 1) + item * tensors * feature_words(grid, features, layout)


def norm_messages(grid: GridShape, layout: Layout) -> int:
    return 2 * (grid.parts(layout.features) - 1) + 2 * (grid.parts(layout.rows) - 1)


def cross_entropy_bytes(grid: GridShape, rows: int, layout: Layout) -> int:
    """Four float64 numbers a row over the feature ranks, and two in all over the row ranks."""
    features, over_rows = grid.parts(layout.features), grid.parts(layout.rows)
    return 32 * rows * features * (features - 1) + 16 * (over_rows - 1) * grid.size


def targets_bytes(grid: GridShape, rows: int, inner: int, layout: Layout) -> int:
    """Class numbers [rows, inner] that come in outer's rows, as in pipelines, to logits in those of `layout`."""
    return 8 * inner * relayout_words(grid, rows, 1, Layout(grid.outer.rows, (), grid.outer.time), Layout(layout.rows, (), layout.time))


def cross_entropy_messages(grid: GridShape, layout: Layout) -> int:
    return grid.parts(layout.features) - 1 + grid.parts(layout.rows) - 1


WAYS = ("gathered", "ring", "heads")
KEPT = 1.5  # of a ring's memory for backward, which "auto" lets a way take


def shares(count: int, parts: int) -> list[int]:
    """`count` things for so many ranks, as equal as they go, larger shares first."""
    return [count // parts + (index < count % parts) for index in range(parts)]


def ring_words(lengths: Sequence[int], words: int, window: bool, causal: bool, zigzag: bool = False) -> tuple[int, int]:
    """Attention over a sequence of these pieces, a rank each: (words of keys and values, forward and backward, words of the sums of their
    gradients); words: of keys and values a place. kv (r-1) forward, 2 kv (r-1) backward for all r ranks together; through windows only
    what some query of the reader may see, and of the sums a reception for every rank that adds to them, its owner having the last."""
    size, seen = len(lengths), 0
    lasts = [max((start + count for start, count in runs(lengths, rank, zigzag) if count), default=0) for rank in range(size)]
    for owner in range(size):
        for start, count in runs(lengths, owner, zigzag):
            looking = [not window or bool(lasts[rank]) and (not causal or start < lasts[rank]) for rank in range(size) if rank != owner]
            seen += sum(looking) * count
    return 2 * words * seen, words * seen


def sequence_bytes(
    way: str, lengths: Sequence[int], heads: int, kv_heads: int, words: int, item: int, window: bool, causal: bool, zigzag: bool = False
) -> int:
    """Attention over a sequence of these pieces, forward and backward, all ranks together. heads, kv_heads: of a rank of the sequence;
    words: of a head at a place, for all samples; item: bytes of a word, the sums of 16-bit gradients being of 4."""
    wide, kv = max(item, 4), 2 * kv_heads * words
    if way == "gathered":
        return kv * (len(lengths) - 1) * sum(lengths) * (item + wide)
    if way == "ring":
        read, summed = ring_words(lengths, kv, window, causal, zigzag)
        return item * read + wide * summed
    parts = shares(kv_heads, len(lengths))
    stays = sum(length * part for length, part in zip(lengths, parts, strict=True))
    return 2 * (2 * heads // kv_heads + 2) * words * (sum(lengths) * kv_heads - stays) * item


def cheapest_way(size: int, heads: int, kv_heads: int, item: int, window: bool, causal: bool, zigzag: bool = False) -> str:
    """Of attention over a sequence that so many ranks cut: which of WAYS moves the fewest bytes, of those that keep for backward at most
    KEPT times what a ring keeps (queries, outputs, keys and values of a piece; gathered, those of the whole); of equals the one
    that keeps least. Heads need one of keys and values a rank."""
    lengths = [2] * size

    def kept(way: str) -> int:
        return heads + kv_heads * (size if way == "gathered" else 1)

    ways = [way for way in WAYS if kept(way) <= KEPT * kept("ring") and (way != "heads" or kv_heads >= size)]
    return min(ways, key=lambda way: (sequence_bytes(way, lengths, heads, kv_heads, 1, item, window, causal, zigzag), kept(way)))


def largest(grid: GridShape, size: int, names: Names) -> int:
    """The largest piece of a dim of `size` cut over the axes `names`: the first."""
    return chunks(size, [grid.sizes[name] for name in names])[0]


def linear_parameters(grid: GridShape, k: int, n: Sequence[int], swapped: bool, bias: bool) -> int:
    """Words of weights and biases on the rank that holds most: [out, in] cut as docs/theory.md section 1 says."""
    first, second = (grid.axes.n, grid.axes.k) if swapped else (grid.axes.k, grid.axes.n)
    again, kept = grid.axes.gathered, grid.axes.kept
    out, into = (second + again, first) if swapped else (second, first + again)
    held = sum(largest(grid, size, out + kept) * largest(grid, k, into) for size in n)
    return held + (sum(largest(grid, size, second) for size in n) if bias else 0)


def linear_whole(grid: GridShape, k: int, n: Sequence[int], swapped: bool) -> int:
    """Of linear_parameters' weights the words that shard="state" keeps whole from one optimizer step to the next."""
    first, second = (grid.axes.n, grid.axes.k) if swapped else (grid.axes.k, grid.axes.n)
    out, into = (second + grid.axes.gathered, first) if swapped else (second, first + grid.axes.gathered)
    return sum(largest(grid, size, out) * largest(grid, k, into) for size in n)
