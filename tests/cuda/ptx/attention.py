"""Attention on a Host, forward and backward, each result beside its float64 twin."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .host import Host, Matrix
from .layers import Pair, normal
from .memory import Array


class Call(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "width", "causal", "time", "query_runs", "key_runs")],
        *[(name, ctypes.c_void_p) for name in ("queries", "keys")],
        ("mask_strides", ctypes.c_int64 * 4),
        *[(name, ctypes.c_double) for name in ("scale", "p")],
        ("mask", Matrix),
    ]


@dataclass(frozen=True)
class Case:
    """Queries at both ends of a sequence of `keys` places, whose second half of keys lies first. mask: "none", "bytes" by head, query
    and key, "added" by sample, query and key; the middle query sees nothing."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    width: int = 16
    queries: int = 12
    keys: int = 20
    causal: bool = True
    mask: str = "none"
    p: float = 0.0

    def query_runs(self) -> Array:
        first, rest = self.queries - self.queries // 2, self.queries // 2
        return np.array([[0, first, 0, 0], [first, rest, self.keys - rest, 0]], np.int64)

    def key_runs(self) -> Array:
        half = self.keys // 2
        rest = self.keys - half
        return np.array([[0, rest, half, 0], [rest, half, 0, rest]], np.int64)

    @staticmethod
    def positions(runs: Array) -> Array:
        return np.concatenate([np.arange(position, position + count) for _, count, position, _ in runs])


def masks(case: Case) -> Array | None:
    """[lines, queries, keys] as the kernels take it."""
    if case.mask == "none":
        return None
    lines = case.heads if case.mask == "bytes" else case.batch
    drawn = np.random.default_rng(7).random((lines, case.queries, case.keys))
    drawn[:, case.queries // 2] = 0
    return (drawn > 0.3).astype(float) if case.mask == "bytes" else np.where(drawn > 0.3, drawn, -np.inf)


def attention(host: Host, case: Case, dtype: str, pad: int = 0) -> Iterator[Pair]:
    wide, lines, narrow = "f64" if dtype == "f64" else "f32", case.batch * case.heads, case.batch * case.kv_heads
    q, dout = (host.matrix(normal(case.queries, lines * case.width, seed) * 2, dtype, pad=pad) for seed in (1, 4))
    k, v = (host.matrix(normal(case.keys, narrow * case.width, seed), dtype, pad=pad) for seed in (2, 3))
    out, narrowed = host.empty(case.queries, lines * case.width, wide), host.empty(case.queries, lines * case.width, dtype)
    lse, total, delta = (host.empty(lines, case.queries, wide) for _ in range(3))
    dq = host.matrix(normal(case.queries, lines * case.width, 5), wide, pad=pad)
    dk, dv = (host.matrix(normal(case.keys, narrow * case.width, seed), wide, pad=pad) for seed in (6, 7))
    before = [host.read(each) for each in (dq, dk, dv)]
    mask, runs = masks(case), [case.query_runs(), case.key_runs()]
    call = Call(case.batch, case.heads, case.kv_heads, case.width, case.causal, case.keys, *map(len, runs), *(r.ctypes.data for r in runs))
    call.scale, call.p = case.width**-0.5, case.p
    if mask is not None:
        held = host.matrix(mask.reshape(-1, case.keys), "bytes1" if case.mask == "bytes" else wide)
        call.mask, each = held.matrix, case.queries * case.keys
        call.mask_strides = (ctypes.c_int64 * 4)(*((0, each) if case.mask == "bytes" else (each, 0)), case.keys, 1)
    views = [q, k, v, dout, out, narrowed, lse, total, delta, dq, dk, dv]
    host.call("host_attention", ctypes.byref(call), *(ctypes.byref(view.matrix) for view in views))
    got = [host.read(each) for each in (out, lse, dq, dk, dv)]
    expected = reference(host, case, mask, [host.read(each) for each in (q, k, v, dout)])
    seen = np.isfinite(expected[1])
    assert (got[1][~seen] == -np.inf).all(), "lse of a query that sees nothing"
    got[1], expected[1] = np.where(seen, got[1], 0), np.where(seen, expected[1], 0)
    for name, have, want, base in zip(("out", "lse", "dq", "dk", "dv"), got, expected, [0, 0, *before], strict=True):
        yield name, have, want + base


def factors(host: Host, case: Case) -> Array:
    """Dropout's, [batch heads, time, time] by position, from the CPU's kernel."""
    shape = (case.batch * case.heads, case.keys, case.keys)
    ones, out = np.ones(shape), np.empty(shape)
    sizes = np.array([*shape, *shape, 0, 0, 0], np.int64)
    arrays = [ctypes.c_void_p(each.ctypes.data) for each in (ones, out)]
    assert host.library.host_cpu_dropout(*arrays, 1, 3, ctypes.c_void_p(sizes.ctypes.data), ctypes.c_double(case.p)) == 0
    return out


def reference(host: Host, case: Case, mask: Array | None, inputs: list[Array]) -> list[Array]:
    """out, lse, dq, dk, dv in the kernels' layout."""

    def heads(x: Array, count: int) -> Array:
        return x.reshape(len(x), case.batch, count, case.width).transpose(1, 2, 0, 3)

    def rows(x: Array) -> Array:
        return x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1)

    def summed(x: Array) -> Array:
        return x.reshape(case.batch, case.kv_heads, -1, *x.shape[2:]).sum(2)

    q, dout = heads(inputs[0], case.heads), heads(inputs[3], case.heads)
    k, v = (np.repeat(heads(x, case.kv_heads), case.heads // case.kv_heads, 1) for x in inputs[1:3])
    scale = case.width**-0.5
    scores = q @ k.swapaxes(-1, -2) * scale
    here, there = case.positions(case.query_runs()), case.positions(case.key_runs())
    if mask is not None:
        scores = scores + (mask[:, None] if case.mask == "added" else np.where(mask[None] != 0, 0, -np.inf))
    if case.causal:
        scores = np.where(there <= here[:, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = top + np.log(total)
        p = np.where(total > 0, p / total, 0)
    drop = np.ones_like(p)
    if case.p:
        every = factors(host, case).reshape(case.batch, case.heads, case.keys, case.keys)
        drop = every[:, :, here][..., there]
    out = (p * drop) @ v
    dp = dout @ v.swapaxes(-1, -2) * drop
    ds = p * (dp - (dout * out).sum(-1, keepdims=True)) * scale
    dk, dv = ds.swapaxes(-1, -2) @ q, (p * drop).swapaxes(-1, -2) @ dout
    return [rows(out), lse.reshape(-1, case.queries), rows(ds @ k), rows(summed(dk)), rows(summed(dv))]
