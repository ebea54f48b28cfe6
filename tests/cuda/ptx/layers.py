"""Layer norm, cross-entropy and embedding on a Host, each result beside its float64 twin."""

import ctypes
from collections.abc import Iterator

import numpy as np

from .host import Host
from .memory import Array

Pair = tuple[str, Array, Array]  # name, got, expected


def normal(rows: int, cols: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, cols))


def layer_norm(host: Host, rows: int, cols: int, dtype: str, centred: bool = True, whole: bool = False) -> Iterator[Pair]:
    """The columns as two ranks would hold them, or whole; a mean far from zero. Not centred: the RMS norm."""
    eps, wide = 0.1, "f64" if dtype == "f64" else "f32"
    x, dy = host.matrix(normal(rows, cols, 1) * 0.5 + 3, dtype), host.matrix(normal(rows, cols, 2), dtype)
    gamma, beta = host.matrix(normal(1, cols, 3), dtype), host.matrix(normal(1, cols, 4), dtype)
    statistics, others, pieces = (host.empty(rows, 2, "f64") for _ in range(3))
    y, dx = (host.empty(rows, cols, dtype) for _ in range(2))
    dgamma, dbeta = (host.empty(1, cols, wide) for _ in range(2))
    results = (statistics, y, dx, dgamma, dbeta) if whole else (statistics, others, y, pieces, dx, dgamma, dbeta)
    host.run("layer_norm_whole" if whole else "layer_norm", x, dy, gamma, beta, *results, ctypes.c_double(eps), ctypes.c_int(centred))
    values, grad, g = host.read(x), host.read(dy), host.read(dy) * host.read(gamma)
    mean = values.mean(1, keepdims=True) * centred
    square = ((values - mean) ** 2).mean(1, keepdims=True)
    rstd = 1 / np.sqrt(square + eps)
    xhat = (values - mean) * rstd
    yield "statistics", host.read(statistics), np.hstack([mean, square * cols])
    yield "y", host.read(y), xhat * host.read(gamma) + host.read(beta)
    if not whole:
        yield "pieces", host.read(pieces), np.stack([g.sum(1) * centred, (g * xhat).sum(1)], axis=1)
    yield "dx", host.read(dx), rstd * (g - g.mean(1, keepdims=True) * centred - xhat * (g * xhat).mean(1, keepdims=True))
    yield "dgamma", host.read(dgamma), (grad * xhat).sum(0, keepdims=True)
    yield "dbeta", host.read(dbeta), grad.sum(0, keepdims=True)


def cross_entropy(host: Host, rows: int, cols: int, dtype: str, smoothing: float) -> Iterator[Pair]:
    logits = host.matrix(normal(rows, cols, 1) * 3, dtype)
    ids = np.random.default_rng(2).integers(0, cols, rows)
    ids[rows // 2] = -100
    maxima, pieces, out = host.empty(rows, 1, "f64"), host.empty(rows, 3, "f64"), host.empty(rows, 2, "f64")
    by = normal(1 if smoothing else rows, 1, 3)
    gradient, scale = host.empty(rows, cols, dtype), host.matrix(by, "f64")
    host.call(
        "host_cross_entropy",
        ctypes.byref(logits.matrix),
        host.integers(ids),
        ctypes.c_double(smoothing),
        *(ctypes.byref(view.matrix) for view in (maxima, pieces, out)),
        *(ctypes.byref(view.matrix) for view in (scale, gradient)),
    )
    x = host.read(logits)
    shifted = x - x.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    wanted = np.full(x.shape, smoothing / cols)
    wanted[np.arange(rows), np.maximum(ids, 0)] += 1 - smoothing
    counts = (ids >= 0)[:, None]
    yield "maxima", host.read(maxima), x.max(1, keepdims=True)
    yield "losses", host.read(out), np.hstack([-(wanted * log_p).sum(1, keepdims=True) * counts, counts])
    yield "gradient", host.read(gradient), by * (np.exp(log_p) - wanted) * counts


def embedding(host: Host, rows: int, cols: int, count: int, dtype: str) -> Iterator[Pair]:
    """Some ids are none of the table's, one comes in two of three positions. The sums are those of a table that begins at id 5."""
    ids = np.random.default_rng(3).integers(-2, rows + 10, count)
    ids[: 2 * count // 3] = 7
    table, out = host.matrix(normal(rows, cols, 1), dtype), host.empty(count, cols, dtype)
    host.call("host_embedding", ctypes.byref(table.matrix), host.integers(ids), ctypes.byref(out.matrix))
    got, there = host.read(out), (ids >= 0) & (ids < rows)
    got[~there] = np.where(np.isnan(got[~there]), 0, 1)
    yield "gather", got, np.where(there[:, None], host.read(table)[np.where(there, ids, 0)], 0)
    given, sums = host.matrix(normal(count, cols, 2), dtype), host.empty(rows, cols, "f64" if dtype == "f64" else "f32")
    order, skipped = np.argsort(ids, kind="stable"), 9
    numbers = ctypes.c_int64(5), ctypes.c_int64(skipped)
    host.call(
        "host_scatter", ctypes.byref(given.matrix), host.integers(ids[order]), host.integers(order), *numbers, ctypes.byref(sums.matrix)
    )
    expected, here = np.zeros((rows, cols)), (ids >= 5) & (ids < 5 + rows) & (ids != skipped)
    np.add.at(expected, ids[here] - 5, host.read(given)[here])
    yield "scatter", host.read(sums), expected


def indices(host: Host, count: int) -> Iterator[Pair]:
    """One index is ignored, the last and another are wrong."""
    ids = np.random.default_rng(4).integers(0, 50, count)
    ids[[0, count // 2, -1]] = -100, -3, 2**40
    found = host.memory.array(np.zeros(3, np.int64))
    numbers = (ctypes.c_int64(each) for each in (count, 50, -100))
    host.call("host_find_wrong", host.integers(ids), *numbers, ctypes.c_void_p(found))
    yield "indices", host.memory.read(found).astype(float), np.array([-3, 2.0**40, 2])
