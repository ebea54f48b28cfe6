"""Self-attention with whole heads on a rank: multi-head or grouped-query, causal, rotary, masked, cached, batch or sequence cut."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..autograd.casts import autocast_dtype
from ..autograd.linear import linear, linear_plan
from ..autograd.ring import CutSequence, Way, widest_head
from ..errors import ShapeError
from ..mesh import Mesh, check_local, is_zigzag
from ..mesh.layout import Cuts, chunks
from ..plan.formulas import sequence_bytes
from .dropout import Dropout
from .layer import Layer
from .linear import Linear
from .parameter import Given, part_of
from .sequence import asked_way, attend_sequence, causal_mask, gather_time, mask_here, rotate, time_axes, turn, way_of


class SelfAttention(Layer):
    """x [batch, time, width] (outer, batch cut over the row axes; dim=1: time cut instead) -> the same. In mode "sequence" dim is 1 where
    it is left out, and ring what init's attention= says, by default True.

    q, k, v and o are Linears; the three projections run as one step that gathers x once, outer -> inner, and o leads
    back. Heads lie on inner's feature ranks; numbers of heads that they do not divide are a ShapeError.
    kv_heads: fewer heads of k and v, each shared by heads / kv_heads queries. head_dim: width / heads. rotary: theta of
    rotary positions. scale: head_dim^-0.5. out_bias: as bias. dropout: on the probabilities, the mask keyed by global
    indices. given: full tensors "q.weight", .., cut instead of drawn.

    forward(x, mask, cache): mask, of bool (True: look) or added to the scores, broadcasts to [batch, heads, time, keys]
    with this rank's rows and either 1 head or all; cache: a KVCache, whose tokens come before x's.
    With dim=1 each rank keeps its own queries (batch 1 is fine, pieces may be uneven or empty), and the keys and values of its heads
    are gathered over the row axes, or with ring=True come by piece by piece: a rank then keeps 1/r of them for backward, and memory does
    not grow with the number of ranks' pieces, or with ring="heads" (all-to-all, autograd/heads.py) each rank attends over the whole
    sequence with 1/r of its heads, which takes as little, moves less where heads share no keys and values, and needs at least r heads of
    those. ring="auto": what moves the fewest bytes of those that keep at most 1.5 times a ring's (plan/formulas.cheapest_way); `way` says
    which. order="zigzag": the sequence was cut by mesh.scatter(x, dim=1, order="zigzag"), so that
    under a causal mask all ranks have the same work; masks stay in the order of the sequence, but for this rank's rows. Scores exist for
    tiles only; a cache, a mask with a gradient and heads of more than 256 numbers on GPUs (128 in float64) take the gathered way, with
    scores of this rank's heads and rows.
    Bytes: those of the projections, and with dim=1 over r row ranks, kv = 2 batch time kv_heads head_dim words, kv (r-1)/P words each
    way, by a ring 2 kv (r-1)/P backward, by heads (2 q + kv) (r-1)/(r P) each way, q = batch time heads head_dim; a causal ring
    through windows moves only what is looked at, zigzag 3/4 of it. Otherwise attention moves nothing. Raises NotImplementedError where
    ring and heads have no form: a mask with a gradient, and on GPUs such wide heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        causal: bool = True,
        dropout: float = 0.0,
        bias: bool = True,
        mesh: Mesh | None = None,
        swapped: bool | str | None = None,
        dtype: torch.dtype | None = None,
        dim: int | None = None,
        *,
        ring: bool | str | None = None,
        order: str | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: float | None = None,
        scale: float | None = None,
        out_bias: bool | None = None,
        given: Given = None,
        device: Any = None,
    ) -> None:
        mesh = self.begin(mesh, device)
        self.width = width
        kv_heads = heads if kv_heads is None else kv_heads
        _check_heads(mesh, width, heads, kv_heads, head_dim)
        sequence = bool(mesh.outer.time)
        self.heads, self.kv_heads, self.causal, self.dim = heads, kv_heads, causal, _row_dim(int(sequence) if dim is None else dim, mesh)
        self.time_axes = time_axes(mesh)
        pieces = mesh.parts(self.time_axes)
        self.pieces = pieces, mesh.interval(pieces, self.time_axes)[0]  # of a sequence that dim=1 cuts, and which is here
        self.zigzag = is_zigzag(order, "SelfAttention", mesh)
        self.asked = asked_way(mesh) if sequence and ring is None else _asked(ring, self.dim, mesh)
        dtype_ = dtype or torch.get_default_dtype()
        self.head_dim = width // heads if head_dim is None else head_dim
        self.way = way_of(self.asked, mesh, heads, kv_heads, self.head_dim, causal, self.zigzag, dtype_, "SelfAttention")
        self.too_wide = self.head_dim > widest_head(mesh, dtype_)  # for the core's attention
        self.rotary, self.scale = rotary, self.head_dim**-0.5 if scale is None else scale
        if rotary is not None and self.head_dim % 2:
            raise ShapeError(f"SelfAttention: rank {mesh.rank} got rotary with head_dim {self.head_dim}, expected an even one")
        outputs = {"q": heads * self.head_dim, "k": kv_heads * self.head_dim, "v": kv_heads * self.head_dim}
        self.plan = linear_plan(mesh, width, list(outputs.values()), "outer->inner", swapped, "qkv").owned_by(self)
        self.q, self.k, self.v = (
            Linear(width, size, bias, mesh, "outer->inner", self.plan.swapped, dtype=dtype, given=part_of(given, name))
            for name, size in outputs.items()
        )
        out_bias = bias if out_bias is None else out_bias
        self.o = Linear(outputs["q"], width, out_bias, mesh, "inner->outer", swapped, dtype=dtype, given=part_of(given, "o"))
        dims = (0, 1) if self.dim == 0 else (2, 1)
        self.dropout = Dropout(dropout, mesh=mesh, layout="inner", dims=dims) if dropout else None
        self.holds(self.q, self.k, self.v, self.o)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None) -> torch.Tensor:
        if not isinstance(x, torch.Tensor) or x.dim() != 3:
            check_local(x, "SelfAttention's x", self.mesh)
            raise ShapeError(f"SelfAttention: rank {self.mesh.rank} got x of shape {tuple(x.shape)}, expected [batch, time, width]")
        # rows lead, as in every layer: [batch, time, ..] or [time, batch, ..]
        parts = (self.q, self.k, self.v)
        operands = [part.operands() for part in parts]
        weights, biases = [w for (w,), _ in operands], [b for _, (b,) in operands]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in linear(self._rows_first(x), weights, biases, self.plan))
        past = 0 if cache is None else cache.length
        lengths = self._lengths(len(q))
        if mask is not None:
            check_local(mask, "SelfAttention's mask", self.mesh)
            mask = mask_here(mask, self.mesh, self.heads, self.dim, len(q))
        if lengths and cache is None and self._has_kernel(mask):
            y = self._along(q, k, v, mask, lengths)
        else:
            y = self._whole(q, k, v, mask, past, lengths, cache)
        return self._rows_first(self.o(y.flatten(2)))

    def _has_kernel(self, mask: torch.Tensor | None) -> bool:
        """Whether attention over a cut sequence runs in the core: without a gradient for the mask, and on GPUs with heads that its kernels
        take."""
        learned = mask is not None and mask.requires_grad
        if learned and self.asked in ("ring", "heads"):
            raise self.named(
                NotImplementedError(
                    f"{self.asked}: the mask needs a gradient, which only gathered keys and values give: ring=False, or mask.detach()"
                )
            )
        return not learned and not self.too_wide

    def _along(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, lengths: list[int]) -> torch.Tensor:
        """Attention over a sequence of these pieces; all [time, batch, heads here, head_dim]."""
        place = self.pieces[1]
        cut = CutSequence(self.mesh, self.time_axes, tuple(lengths), place, self.zigzag)
        if self.rotary is not None:
            q, k = (turn(part, cut.runs(), self.rotary) for part in (q, k))
        owner = f"SelfAttention #{self.number}" if torch.compiler.is_compiling() else self.label()
        way = Way(cut, self.causal, self.scale, self.dropout if self.training else None, owner)
        return attend_sequence(self.way, q, k, v, mask, way)

    def _whole(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, past: int, lengths: list[int], cache: Any
    ) -> torch.Tensor:
        """Attention where k and v are whole, or are gathered and kept in a cache."""
        if self.zigzag and lengths:
            raise self.named(
                NotImplementedError(
                    "order='zigzag' with a cache, a mask that needs a gradient, or heads too wide for GPUs: scatter in order"
                )
            )
        # to [batch, heads here, time, head_dim]
        order = (0, 2, 1, 3) if self.dim == 0 else (1, 2, 0, 3)
        start = past + sum(lengths[: self.pieces[1]])
        q, k, v = (part.permute(order) for part in (q, k, v))
        if self.rotary is not None:
            q, k = rotate(q, start, self.rotary), rotate(k, start, self.rotary)
        if lengths:
            both = gather_time(torch.cat([k, v], -1).permute(2, 0, 1, 3), self.mesh, lengths, self.time_axes).permute(1, 2, 0, 3)
            k, v = both.split(self.head_dim, -1)
        if cache is not None:
            k, v = cache.update(k, v)
        return self._attend(q, k, v, mask, start).permute((0, 2, 1, 3) if self.dim == 0 else (2, 0, 1, 3))

    def _rows_first(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, time, ..] with dim=1 as [time, batch, ..], and back."""
        return x.transpose(0, 1) if self.dim else x

    def _lengths(self, time: int) -> list[int]:
        """With dim=1 the lengths of all pieces of the sequence that inner's row axes cut."""
        axis = None if self.dim == 0 else self.mesh.axis(self.time_axes)
        if axis is None:
            return []
        if torch.compiler.is_compiling():  # an even cut, which the gather checks
            return [time] * self.pieces[0]
        return [length for (length,) in axis.sizes([time])]

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, start: int) -> torch.Tensor:
        """softmax(q k^T scale + mask) v; all [batch, heads here, time, head_dim]."""
        time, keys = q.shape[2], k.shape[2]
        dropping = self.dropout is not None and self.training
        square = self.causal and mask is None and start == 0 and time == keys and not dropping
        if self.causal and not square and (time > 1 or start + 1 < keys or mask is not None or dropping):
            seen = causal_mask(start, time, keys, q.device)
            if mask is None or mask.dtype == torch.bool:
                mask = seen if mask is None else mask & seen
            else:
                mask = mask.masked_fill(~seen, -torch.inf)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        if not dropping:
            grouped = self.heads != self.kv_heads
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, scale=self.scale, enable_gqa=grouped)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, 1) if self.heads != self.kv_heads else part for part in (k, v))
        if autocast_dtype(q) is None:
            return self._attend_dropping(q, k, v, mask)
        with torch.autocast(q.device.type, enabled=False):  # it would round the scores to 16 bits
            return self._attend_dropping(q, k, v, mask)

    def _attend_dropping(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        wide = q.dtype if q.dtype == torch.float64 else torch.float32
        scores = q.to(wide) @ k.to(wide).transpose(-2, -1) * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return (self.dropout(softmax(scores)) @ v.to(wide)).to(q.dtype)  # type: ignore[misc]

    def extra_repr(self) -> str:
        shape = f"width={self.width}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, scale={self.scale:.4g}"
        way = "" if self.asked == "gathered" else f", ring={_SPELT.get(self.asked, self.asked)!r}"
        way += f" ({self.way})" if self.asked == "auto" else ""
        way += ", order='zigzag'" if self.zigzag else ""
        return f"{shape}, causal={self.causal}, rotary={self.rotary}, dim={self.dim}{way}"

    def received(self, rows: int, inner: int = 1) -> int:
        """q, k and v share x. In mode "sequence", of `rows` samples and `inner` places, with what attention moves; that ranks else read
        each other's keys and values with dim=1 is not in it."""
        return self.projected(rows, inner) + self.o.received(rows, inner) + self.passed(rows, inner)

    def passed(self, rows: int, inner: int) -> int:
        """`received` of attention itself in mode "sequence", whose ranks have parts of the same samples."""
        if not self.mesh.outer.time:
            return 0
        lengths, item = chunks(inner, [self.pieces[0]]), self.q.weight.itemsize
        sizes = self.heads, self.kv_heads, rows * self.head_dim, item
        return sequence_bytes(self.way, lengths, *sizes, self.mesh.source == "window", self.causal, self.zigzag)

    def projected(self, rows: int, inner: int = 1) -> int:
        """`received` of q, k and v."""
        return self.plan.received(self.q, rows, inner)

    def ends(self, x: torch.Tensor) -> tuple[Cuts, Cuts] | None:
        cuts = self.mesh.outer.cuts(x.dim(), self.dim) if x.dim() == 3 else None
        return None if cuts is None else (cuts, cuts)

    def sizes(self) -> tuple[int, ...]:
        return self.width, self.heads

    def reset_parameters(self) -> None:
        """Its linears have their own."""


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Rows that see nothing are 0, as in scaled_dot_product_attention."""
    blind = scores.detach().amax(-1, keepdim=True) == -torch.inf if scores.shape[-1] else None
    return scores.softmax(-1) if blind is None else scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def _row_dim(dim: int, mesh: Mesh) -> int:
    if dim not in (0, 1, -2):
        raise ShapeError(f"SelfAttention: rank {mesh.rank} got dim={dim}, expected 0 (batch) or 1 (sequence)")
    if mesh.outer.time and dim == 0:
        raise ShapeError(f"SelfAttention: rank {mesh.rank} got dim=0 on {mesh}, whose ranks cut the sequence; leave dim out")
    return dim % 3 if dim >= 0 else 1


_SPELT: dict[str, Any] = {"gathered": False, "ring": True}  # ring= of each way


def _asked(ring: bool | str | None, dim: int, mesh: Mesh) -> str:
    """The way that ring= names, or "auto"."""
    if ring in (None, False):
        return "gathered"
    if ring not in (True, "heads", "auto"):
        raise ShapeError(f"SelfAttention: rank {mesh.rank} got ring={ring!r}, expected True, False, 'heads' or 'auto'")
    if dim != 1:
        raise ShapeError(f"SelfAttention: rank {mesh.rank} got ring={ring!r} with dim={dim}; it goes over a cut sequence: dim=1")
    if ring != "auto" and mesh.size > 1 and not time_axes(mesh):
        raise ShapeError(
            f"SelfAttention: rank {mesh.rank} got ring={ring!r} on {mesh}, which cuts no rows inside attention, so that no sequence is cut"
            " there; expected a mesh with row axes, for example grid=(m, n, k) with m > 1"
        )
    return "ring" if ring is True else str(ring)


def _check_heads(mesh: Mesh, width: int, heads: int, kv_heads: int, head_dim: int | None) -> None:
    ranks = mesh.parts(mesh.inner.features)
    if heads < 1 or (head_dim is None and width % heads) or heads % ranks:
        valid = [count for count in range(ranks, width + 1, ranks) if head_dim is not None or width % count == 0]
        raise ShapeError(
            f"{heads} heads of a width of {width} on {ranks} feature ranks: heads must divide the width and be a multiple of"
            f" {ranks}; valid counts: {valid or 'none, choose another width or mesh'}"
        )
    if kv_heads < 1 or heads % kv_heads or kv_heads % ranks:
        valid = [count for count in range(ranks, heads + 1, ranks) if heads % count == 0]
        raise ShapeError(
            f"{kv_heads} key and value heads for {heads} heads on {ranks} feature ranks: they must divide the heads and be a"
            f" multiple of {ranks}; valid counts: {valid}"
        )
