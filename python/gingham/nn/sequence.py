"""Attention's words over positions: rotary angles, masks, keys and values of a sequence that the row axes cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..autograd.relayout import relayout
from ..autograd.second_order import scattered
from ..errors import ShapeError
from ..function import Function
from ..graph_ops import KNOWN, Meta, Traced, find, names_of, traced
from ..mesh import Mesh
from ..mesh.layout import Layout, Names


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
