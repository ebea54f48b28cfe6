"""What further layers must receive, as theory.py: imports nothing of gingham."""

from collections import Counter

from theory import Cost, Grid, all_gather, all_reduce, cuts, embedding, feature_ranks, linear, nested_cuts, reduce_scatter, row_ranks


def rms_norm(grid: Grid, rows: int, features: int, item: int = 4) -> Cost:
    """Bytes, outer layout: one float64 sum a row each way; the weight's gradient all-reduced."""
    cost = Cost()
    ranks = feature_ranks(grid)
    all_gather(cost, grid.key("nk"), ranks, 2 * 8 * rows * ranks, 2)
    axis, size = row_ranks(grid)
    all_reduce(cost, axis, size, features * max(4, item))
    return cost


def skipped_bias(grid: Grid, n: int) -> Cost:
    """Words of the gradient of a bias that is handed out beside Y in the outer layout."""
    cost = Cost()
    axis, size = row_ranks(grid)
    all_reduce(cost, axis, size, n)
    return cost


Piece = tuple[tuple[int, int], tuple[int, int]]


def lacking(before: list[Piece], after: list[Piece]) -> tuple[int, int]:
    """Words and messages, over all ranks, when every rank changes from one block (rows, columns) to another: what it has
    not, from one holder of each distinct block."""
    words = messages = 0
    for mine, wanted in zip(before, after, strict=True):
        for held in set(before) - {mine}:
            part = 1
            for (a, b), (c, d) in zip(held, wanted, strict=True):
                part *= max(0, min(b, d) - max(a, c))
            words, messages = words + part, messages + (part > 0)
    return words, messages


def reshard(grid: Grid, key: str, before: list[Piece], after: list[Piece]) -> Cost:
    """Words of a parameter's way to other cuts and of its gradient's way back."""
    there, back = lacking(before, after), lacking(after, before)
    return Cost(Counter({key: there[0] + back[0]}), Counter(), Counter({key: there[1] + back[1]}))


def places(grid: Grid) -> list[tuple[int, int, int, int]]:
    """(depth, m within it, n, k) of every rank in mesh order; depth counts where W is replicated, else m has it all."""
    depth = 1 if grid.sharded else grid.depth
    if grid.pk > 1 or grid.depth == 1 and not grid.names.get("m"):
        return [(0, m, n, k) for k in range(grid.pk) for n in range(grid.pn) for m in range(grid.pm)]
    return [(d, m, n, 0) for d in range(depth) for m in range(grid.pm // depth) for n in range(grid.pn)]


def weight_of_step(grid: Grid, k: int, n: int) -> list[Piece]:
    """Each rank's block of [N, K] in the unswapped step: N over n, K over k and then m."""
    rows, m = cuts(n, grid.pn), grid.pm // (1 if grid.sharded else grid.depth)
    columns = nested_cuts(k, (grid.pk, *((grid.depth, m // grid.depth) if grid.sharded else (m,))))
    return [(rows[j], columns[kk * m + i]) for _, i, j, kk in places(grid)]


def patches(grid: Grid, images: int, count: int, fan_in: int, width: int, slices: int | None = None) -> Cost:
    """Words of PatchEmbedding on images without gradient: its linear, and the reshard of a weight cut along N by all."""
    cost = linear(grid, images * count, fan_in, width, products={"y", "dw"}, slices=slices, between=count)
    depth = 1 if grid.sharded else grid.depth
    m, whole = grid.pm // depth, (0, fan_in)
    if grid.names.get("m"):
        pieces = nested_cuts(width, (grid.depth, m // grid.depth, grid.pn) if grid.sharded else (m, grid.pn))
        before = [(pieces[i * grid.pn + j], whole) for _, i, j, _ in places(grid)]
    else:
        pieces = nested_cuts(width, (grid.pk, grid.pn, m))
        before = [(pieces[(kk * grid.pn + j) * m + i], whole) for _, i, j, kk in places(grid)]
    names = [name for name, size in (("m", grid.pm), ("n", grid.pn), ("k", grid.pk)) if size > 1]
    key = grid.key(names[0]) if len(names) == 1 else grid.key("nk") if grid.pm == 1 else "world"
    return cost + reshard(grid, key, before, weight_of_step(grid, fan_in, width))


def tied(grid: Grid, rows: int, count: int, width: int, slices: int | None = None) -> Cost:
    """Words of embedding ids and of a classifier onto the same table, outer -> inner: in 2d and 2.5d swapped, in 1d not,
    elsewhere the table [count over m, width over k, n] goes to the step's cuts and back."""
    square = not grid.rows and grid.pk == 1
    cost = embedding(grid, count, width)
    cost += linear(grid, rows, width, count, layout="outer->inner", swapped=square, bias=False, slices=slices)
    if grid.rows or square:
        return cost
    over_m, over_kn = cuts(count, grid.pm), nested_cuts(width, (grid.pk, grid.pn))
    before = [(over_m[i], over_kn[kk * grid.pn + j]) for _, i, j, kk in places(grid)]
    return cost + reshard(grid, "world" if grid.pm > 1 else grid.key("n"), before, weight_of_step(grid, width, count))


def sequence_attention(grid: Grid, rows: int, width: int, heads: int, kv_heads: int, slices: int | None = None) -> Cost:
    """Words with the sequence cut: the projections, and keys and values gathered over the row ranks, their gradients back."""
    kv = width // heads * kv_heads
    cost = linear(grid, rows, width, [width, kv, kv], layout="outer->inner", slices=slices)
    cost += linear(grid, rows, width, width, layout="inner->outer", slices=slices)
    if not grid.rows:
        all_gather(cost, grid.key("m"), grid.pm, 2 * rows * kv)
        reduce_scatter(cost, grid.key("m"), grid.pm, 2 * rows * kv)
    return cost


def accuracy(grid: Grid, rows: int) -> Cost:
    """Bytes: the target's logit and what lies before it, 8 a row each, over the feature ranks; (right, count) over rows."""
    cost = Cost()
    ranks = feature_ranks(grid)
    all_gather(cost, grid.key("nk"), ranks, 2 * 8 * rows * ranks, 2)
    axis, size = row_ranks(grid)
    cost.add(axis, 16 * (size - 1) * grid.size, size - 1)
    return cost


def runs(lengths: list[int], place: int, zigzag: bool) -> list[tuple[int, int]]:
    """(first position, count) of a rank's piece of a sequence: in order, or its first half from the front and the rest from the back."""
    if not zigzag:
        return [(sum(lengths[:place]), lengths[place])]
    fronts = [length - length // 2 for length in lengths]
    back = sum(fronts) + sum(length // 2 for length in lengths[place + 1 :])
    return [(sum(fronts[:place]), fronts[place]), (back, lengths[place] // 2)]


def ring_words(lengths: list[int], words: int, window: bool, causal: bool, zigzag: bool) -> list[tuple[int, int]]:
    """What each rank receives of attention over a sequence of these pieces, forward and backward; words: of keys and values a place.

    Through windows only what some query of the rank may see: of the keys, and of the sums of their gradients it adds to, all but those
    that it is the first to add to. At last each rank gets the sums of its own that anyone has begun.
    """
    size = len(lengths)

    def seen(reader: int, owner: int) -> set[int]:
        """The places."""
        positions = [at for start, count in runs(lengths, owner, zigzag) for at in range(start, start + count)]
        last = max((start + count for start, count in runs(lengths, reader, zigzag) if count), default=0)
        if not window:
            return set(positions)
        starts = {at: start for start, count in runs(lengths, owner, zigzag) for at in range(start, start + count)}
        return {at for at in positions if lengths[reader] and (not causal or starts[at] < last)}

    found = []
    for rank in range(size):
        forward = sum(len(seen(rank, owner)) for owner in range(size) if owner != rank)
        sums = 0
        for hop in range(1, size):
            owner = (rank - hop) % size
            before = set[int]().union(*(seen((owner + earlier) % size, owner) for earlier in range(1, hop)))
            sums += len(seen(rank, owner) & before)
        sums += len(set[int]().union(*(seen(other, rank) for other in range(size) if other != rank)))
        found.append((words * forward, words * (forward + sums)))
    return found


def heads_bytes(lengths: list[int], heads: int, kv_heads: int, words: int, item: int) -> list[tuple[int, int]]:
    """What each rank receives of attention by all-to-all of heads, forward and backward. heads: of the ranks together; words: of a head at
    a place. Forward a rank gets the others' places of its own heads of q, k and v, and of the others' heads its own places of the output;
    backward its heads' gradient of the output at the others' places, and of q, k and v its own places of the others' heads."""
    ranks = range(len(lengths))
    keys = [kv_heads // len(lengths) + (rank < kv_heads % len(lengths)) for rank in ranks]
    queries = [count * heads // kv_heads for count in keys]
    found = []
    for rank in ranks:
        mine, others = lengths[rank], sum(lengths) - lengths[rank]
        forward = others * (queries[rank] + 2 * keys[rank]) + mine * (heads - queries[rank])
        backward = others * queries[rank] + mine * (heads - queries[rank] + 2 * (kv_heads - keys[rank]))
        found.append((forward * words * item, backward * words * item))
    return found
