"""Attention's words over positions: rotary angles, masks, keys and values of a sequence that the row axes cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..autograd.heads import attend_by_heads, cut_heads
from ..autograd.relayout import relayout
from ..autograd.ring import Way, attend_cut, widest_head
from ..autograd.second_order import scattered
from ..errors import ShapeError
from ..function import Function
from ..graph_ops import KNOWN, Meta, Traced, find, names_of, traced
from ..mesh import Mesh
from ..mesh.layout import Layout, Names
from ..plan.formulas import cheapest_way


def rotate(x: torch.Tensor, start: int, theta: float) -> torch.Tensor:
    """x [.., time, d] at positions start, start + 1, .. turned by rotary angles position theta^(-2i/d), features i and
    i + d/2 being a pair (Su et al. 2021, in the order of Llama's published weights). Angles are taken in float64."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = torch.arange(start, start + x.shape[-2], dtype=torch.float64, device=x.device).unsqueeze(1) * frequencies
    cos, sin = (turn.to(torch.float64 if x.dtype == torch.float64 else torch.float32) for turn in (angles.cos(), angles.sin()))
    one, other = x.to(cos.dtype).split(half, -1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1).to(x.dtype)


def time_axes(mesh: Mesh) -> Names:
    """The axes over which attention with dim=1 has its sequence cut."""
    return mesh.inner.time or mesh.inner.rows


def lengths_of(mesh: Mesh, time: int) -> list[int]:
    """In mode "sequence" the lengths of all pieces of a sequence, of which this rank's has `time` places; else none. Its ranks call it."""
    axis = mesh.axis(mesh.outer.time)
    if axis is None:
        return []
    return [time] * axis.size if torch.compiler.is_compiling() else [count for (count,) in axis.sizes([time])]


def first_of_piece(mesh: Mesh, time: int) -> int:
    """Where this rank's piece of a sequence begins in mode "sequence"; else 0."""
    return sum(lengths_of(mesh, time)[: mesh.interval(mesh.parts(mesh.outer.time), mesh.outer.time)[0]])


def turn(x: torch.Tensor, runs: Sequence[tuple[int, int]], theta: float) -> torch.Tensor:
    """`rotate` of x [time, batch, heads, d] whose places are runs of (position, count)."""
    parts = x.permute(1, 2, 0, 3).split([count for _, count in runs], 2)
    turned = [rotate(part, position, theta) for part, (position, _) in zip(parts, runs, strict=True)]
    return (turned[0] if len(turned) == 1 else torch.cat(turned, 2)).permute(2, 0, 1, 3)


def gather_time(x: torch.Tensor, mesh: Mesh, lengths: list[int], names: Names) -> torch.Tensor:
    """x [time here, ...] -> [time, ...], the members' pieces of `lengths` over the axes `names` one after the other.

    Backward reduce-scatters: each rank's queries give gradients to every key. Bytes received a rank: x of the others
    forward, and backward its own piece once from each, 16-bit gradients in float32.
    """
    if torch.compiler.is_compiling():
        return traced("gather_time", [mesh.handle, ",".join(names)], [x])[0]
    return _GatherTime.apply(x, mesh, lengths, names)


def asked_way(mesh: Mesh) -> str:
    """In mode "sequence" what init's attention= says."""
    return mesh.axes.attention or "ring"


def way_of(asked: str, mesh: Mesh, heads: int, kv_heads: int, width: int, causal: bool, zigzag: bool, dtype: torch.dtype, what: str) -> str:
    """The one of formulas.WAYS that is asked for, or that "auto" takes; heads: of the model, of `width` numbers each. Raises ShapeError
    where the heads do not do, NotImplementedError where they are wider than the kernels of GPUs take."""
    size, features = mesh.parts(time_axes(mesh)), mesh.parts(mesh.inner.features)
    most = widest_head(mesh, dtype)
    if width > most and asked in ("ring", "heads"):
        raise NotImplementedError(
            f"{what}: rank {mesh.rank} got attention by {asked!r} with heads of {width} {dtype} numbers on a GPU, expected at most {most};"
            f" ring=False (attention='gathered') gathers keys and values and leaves attention to torch"
        )
    if asked == "auto":
        if width > most or size == 1:
            return "gathered"
        return cheapest_way(size, heads // features, kv_heads // features, dtype.itemsize, mesh.source == "window", causal, zigzag)
    if asked == "heads" and size > 1:
        cut_heads(kv_heads // features, size, what, mesh.rank)
    return asked


def attend_sequence(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, way: Way) -> torch.Tensor:
    """Attention of the pieces that way.sequence tells of, by the one of formulas.WAYS; q, k, v [time here, batch, heads, width], mask
    [batch, heads, time here, keys] with the keys in the order of the sequence -> as q."""
    at = way.sequence
    if name == "heads":
        return attend_by_heads(q, k, v, mask, replace(way, ring=False))
    if mask is not None and at.zigzag and mask.shape[-1] > 1:
        mask = mask.index_select(-1, torch.tensor(at.positions(), device=mask.device))
    if name == "gathered":
        k, v = gather_time(torch.cat([k, v], -1), at.mesh, list(at.lengths), at.names).split(k.shape[-1], -1)
    return attend_cut(q, k, v, mask, replace(way, ring=name == "ring"))


class _GatherTime(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Mesh, lengths: list[int], names: Names) -> torch.Tensor:
        ctx.mesh, ctx.lengths, ctx.dtype, ctx.names = mesh, tuple(lengths), x.dtype, names
        return torch.cat(mesh.joint(names).all_gather(x.contiguous()))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            return scattered(grad, ctx.mesh, ctx.names, ctx.lengths), None, None, None
        wide = (grad if grad.dtype == torch.float64 else grad.float()).contiguous()
        mine = ctx.mesh.joint(ctx.names).reduce_scatter(wide, ctx.lengths)
        return mine.to(ctx.dtype), None, None, None


def mask_here(mask: torch.Tensor, mesh: Mesh, heads: int, dim: int, rows: int) -> torch.Tensor:
    """The part of a mask, broadcastable to [batch, heads, time, keys], for this rank's heads and inner's rows.

    rows: inner's along `dim` (0: batch, 1: time). A mask of outer's rows is gathered where inner has all of them;
    that, and a control message there, is all that moves. Raises ShapeError where its heads do not fit.
    """
    mask = mask.reshape(*[1] * (4 - mask.dim()), *mask.shape) if mask.dim() < 4 else mask
    if mask.dim() != 4 or mask.shape[1] not in (1, heads):
        raise ShapeError(
            f"attention mask: rank {mesh.rank} got {tuple(mask.shape)}, expected one that broadcasts to [batch, {heads}, T, S]"
        )
    axis = mesh.axis(tuple(set(mesh.outer.rows) ^ set(mesh.inner.rows)))
    at = 0 if dim == 0 else 2
    # equal masks of one row each, meant to be broadcast, may be gathered too: the result is the same
    if axis is not None and sum(count for (count,) in axis.sizes([mask.shape[at]])) == rows:
        outer, inner = (Layout(layout.rows, ()) for layout in (mesh.outer, mesh.inner))
        mask = relayout(mask.transpose(0, at).contiguous(), mesh, outer, inner, mask.shape[3]).transpose(0, at)
    # the other ranks' heads go last: until then they may be asked for by others
    return mask.narrow(1, *mesh.interval(heads, mesh.inner.features)) if mask.shape[1] == heads and heads > 1 else mask


def causal_mask(start: int, time: int, keys: int, device: torch.device) -> torch.Tensor:
    """[time, keys] of bool: the query at start + i sees the keys up to its own position."""
    return torch.arange(keys, device=device) <= torch.arange(start, start + time, device=device).unsqueeze(1)


def _arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    mesh, names = find(words[0]), names_of(words[1])
    return [tensors[0], mesh, [len(tensors[0])] * mesh.parts(names), names]


def _results(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    x, _, lengths, _ = _arguments(words, tensors)
    return [((len(x) * len(lengths), *x.shape[1:]), x.dtype)]


KNOWN["gather_time"] = Traced(_GatherTime, _arguments, _results, saves=False)
