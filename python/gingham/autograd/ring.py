"""Attention over a sequence that row axes cut: each rank keeps its own queries, keys and values come by (ring) or are here (gathered); or
the whole sequence is here, with some of the heads (autograd/heads.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .. import native
from ..function import Function
from ..graph_ops import KNOWN, Meta, Traced, find, names_of, traced
from ..mesh import Mesh
from ..mesh.layout import Names, runs
from .dropout import Masks, dropout_place, masks
from .second_order import gathered, replay


@dataclass(frozen=True)
class CutSequence:
    """How a sequence is cut: over the axes `names`, into pieces of `lengths`, of which `place` is here; zigzag: in the order of
    `Mesh.scatter(order="zigzag")`; past: keys of a cache, before it."""

    mesh: Mesh
    names: Names
    lengths: tuple[int, ...]
    place: int
    zigzag: bool = False
    past: int = 0

    def runs(self, place: int | None = None) -> list[tuple[int, int]]:
        """(position, count) of the contiguous parts of a piece, by default this rank's."""
        found = runs(self.lengths, self.place if place is None else place, self.zigzag)
        return [(self.past + position, count) for position, count in found]

    def positions(self) -> list[int]:
        """Of all keys in the order in which they lie: those of a cache, then piece by piece."""
        every = [run for place in range(len(self.lengths)) for run in self.runs(place)]
        return [*range(self.past), *(position for start, count in every for position in range(start, start + count))]


@dataclass(frozen=True)
class Way:
    """What attention computes. ring: k and v are this rank's piece, else all pieces, in the order of `positions`. turned: q, k and v are
    the whole sequence, in order, with some of the heads: (how many there are on the ranks of the sequence, the first of them here)."""

    sequence: CutSequence
    causal: bool
    scale: float
    dropout: Masks | None = None
    owner: str = field(default="attention", compare=False)
    ring: bool = True
    turned: tuple[int, int] | None = None

    def turned_to(self, heads: int, first: int) -> Way:
        return replace(self, ring=False, turned=(heads, first))

    @property
    def here(self) -> CutSequence:
        """The sequence as q, k and v have it."""
        at = self.sequence
        return at if self.turned is None else CutSequence(at.mesh, (), (sum(at.lengths),), 0, past=at.past)

    @property
    def p(self) -> float:
        return 0.0 if self.dropout is None else self.dropout.p

    def core(self, mask: torch.Tensor | None, numbers: torch.Tensor | None) -> Any:
        """The call of the core, labelled."""
        at = self.here
        mesh = at.mesh
        axis = mesh.axis(at.names) if self.ring else None
        if axis is not None:
            mesh.say(f"{self.owner}: ring over {', '.join(at.names)} (causal={self.causal}, scale={self.scale:.6g}, p={self.p:g})")
        drawn = [] if numbers is None else numbers.tolist()
        options: dict[str, Any] = {
            "causal": self.causal,
            "scale": self.scale,
            "zigzag": at.zigzag,
            "past": at.past,
            "p": self.p,
            "dropout": drawn,
        }
        return native.Attention(mesh.program, axis, at.lengths, at.place, mask, **options)

    def draw(self, q: torch.Tensor) -> torch.Tensor | None:
        """The numbers of one call's mask: seed, name, call; the first sample and head here; all heads and all places of the sequence."""
        if self.dropout is None or not self.p:
            return None
        at = self.sequence
        heads, first = self.turned or (q.shape[2], 0)
        total = at.past + sum(at.lengths)
        shape = torch.empty(q.shape[1], heads, at.lengths[at.place], total, device="meta")
        key, full, start = dropout_place(shape, at.mesh, "inner", (2, 1), self.p, self.dropout.key())
        return torch.tensor([*key, start[0], start[1] + first, full[1], total], device="cpu")


def widest_head(mesh: Mesh, dtype: torch.dtype) -> int:
    """The most numbers a head may have: GPUs' kernels have an end, the CPU's none."""
    return int(native.Attention.widest_head(mesh.program, str(dtype).removeprefix("torch.")))


def attend_cut(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, way: Way) -> torch.Tensor:
    """softmax(q k^T scale + mask) v of q [time here, batch, heads, width], k and v [time here, or all, batch, kv heads, width] -> as q.

    mask [batch, heads, time here, all keys], each dim may be 1: of bool (True: look), or added, without a gradient. A query that sees
    nothing gives 0. Kept for backward: q, k, v, out and one number a query and head. Bytes a rank of a ring of r, kv = words of all keys
    and values: kv (r-1)/r forward, 2 kv (r-1)/r backward; through windows, causal, only what a query here may see.
    Differentiable twice: a gradient of a gradient gathers k and v and holds the scores of the queries here.
    """
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    if torch.compiler.is_compiling():
        if way.p and q.device.type != "cpu":  # the mask's numbers stay on the host, which a graph's results on a GPU do not
            raise NotImplementedError(f"{way.owner}: torch.compile of dropout on attention's probabilities on a GPU; leave either out")
        at = way.sequence
        names = ",".join(at.names)
        handle = "" if way.dropout is None else way.dropout.handle
        words = [at.mesh.handle, names, ",".join(map(str, at.lengths)), str(at.place), str(int(at.zigzag)), str(at.past)]
        words += [str(int(way.causal)), repr(way.scale), handle, way.owner, str(int(way.ring)), ",".join(map(str, way.turned or ()))]
        return traced("attention", words, [q, k, v] if mask is None else [q, k, v, mask])[0]
    # outside of the function, whose second gradient is one for what it saves
    return _Attend.apply(q.contiguous(), k.contiguous(), v.contiguous(), None if mask is None else mask.contiguous(), way)


class _Attend(Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, way: Way) -> torch.Tensor:
        numbers = way.draw(q)
        out, lse = way.core(mask, numbers).forward(q, k, v)
        ctx.way = way
        ctx.save_for_backward(q, k, v, mask, out, lse, numbers)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, mask, out, lse, numbers = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (
                *replay(lambda q, k, v: [_plain(q, k, v, mask, ctx.way, numbers)], [q, k, v], ctx.needs_input_grad[:3], [grad]),
                None,
                None,
            )
        return *ctx.way.core(mask, numbers).backward(q, k, v, out, lse, grad.contiguous()), None, None


def _plain(q: Any, k: Any, v: Any, mask: torch.Tensor | None, way: Way, numbers: torch.Tensor | None) -> torch.Tensor:
    """The same of torch's operations, whose gradients have gradients."""
    at = way.here
    if way.ring:
        k, v = (gathered(part, at.mesh, at.names, at.lengths) for part in (k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    shared = q.shape[2] // k.shape[2]
    qh, kh, vh = (part.to(wide).permute(1, 2, 0, 3) for part in (q, k, v))
    kh, vh = (part.repeat_interleave(shared, 1) for part in (kh, vh))
    scores = qh @ kh.transpose(-2, -1) * way.scale
    keys = torch.tensor(at.positions(), dtype=torch.int64, device=q.device)
    places = [place for start, count in at.runs() for place in range(start, start + count)]
    queries = torch.tensor(places, dtype=torch.int64, device=q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if way.causal:
        scores = scores.masked_fill(keys > queries.unsqueeze(1), -torch.inf)
    blind = scores.detach().amax(-1, keepdim=True) == -torch.inf if scores.numel() else torch.zeros((), device=q.device)
    probabilities = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0) if scores.numel() else scores
    if numbers is not None:
        probabilities = probabilities * _factors(probabilities, at, way.p, numbers.tolist(), keys)
    return (probabilities @ vh).permute(2, 0, 1, 3).to(q.dtype)


def _factors(x: torch.Tensor, at: CutSequence, p: float, numbers: Sequence[int], keys: torch.Tensor) -> torch.Tensor:
    """What the core's dropout multiplies probabilities by, in the order in which the keys lie."""
    seed, name, call, sample, head, heads, time = numbers
    parts = []
    for position, count in at.runs():
        ones = torch.ones(*x.shape[:2], count, time, dtype=x.dtype, device=x.device)
        full, start = [sample + x.shape[0], heads, time, time], [sample, head, position, 0]
        parts.append(native.dropout(ones, p, seed, name, call, full, start, at.mesh.program))
    return torch.cat(parts, 2).index_select(3, keys)


def _arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    mesh, names, lengths, place, zigzag, past, causal, scale, handle, owner, ring, turned = words
    cut = CutSequence(find(mesh), names_of(names), tuple(map(int, names_of(lengths))), int(place), zigzag == "1", int(past))
    heads = tuple(map(int, names_of(turned)))
    drop = masks[handle] if handle else None
    way = Way(cut, causal == "1", float(scale), drop, owner, ring == "1", (heads[0], heads[1]) if heads else None)
    return [*tensors[:3], tensors[3] if len(tensors) > 3 else None, way]


def _results(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    q, way = tensors[0], _arguments(words, tensors)[-1]
    time, batch, heads, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    found: list[Meta] = [(q.shape, q.dtype), (q.shape, q.dtype), ((batch, heads, time), wide)]
    return found + ([([7], torch.int64)] if way.p else [])


KNOWN["attention"] = Traced(_Attend, _arguments, _results)
