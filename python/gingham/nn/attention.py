"""Multi-head self-attention with whole sequences and whole heads on a rank."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..functional import linear, linear_plan
from ..mesh import Mesh, ShapeError, current
from .dropout import Dropout
from .linear import Linear


class SelfAttention(torch.nn.Module):
    """x [batch, time, width] (outer, batch cut over the row axes) -> [batch, time, width] (outer).

    q, k, v and o are Linears; the three projections run as one step that gathers x once, outer -> inner, and o leads
    back. Heads lie on inner's feature ranks; a number of heads that they do not divide is a ShapeError. dropout: on
    the probabilities. Bytes: those of the projections; attention itself moves nothing.
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
        dim: int = 0,
    ) -> None:
        super().__init__()
        if dim != 0:
            raise NotImplementedError("SelfAttention over sequences cut along dim=1 is not built yet: scatter along the batch, dim=0")
        mesh = current(mesh)
        ranks = mesh.parts(mesh.inner.features)
        if heads < 1 or width % heads or heads % ranks:
            valid = [count for count in range(ranks, width + 1, ranks) if width % count == 0]
            raise ShapeError(
                f"{heads} heads of a width of {width} on {ranks} feature ranks: heads must divide the width and be a multiple of"
                f" {ranks}; valid counts: {valid or 'none, choose another width or mesh'}"
            )
        self.mesh, self.heads, self.causal = mesh, heads, causal
        self.plan = linear_plan(mesh, width, [width] * 3, "outer->inner", swapped, "qkv")
        self.q, self.k, self.v = (Linear(width, width, bias, mesh, "outer->inner", self.plan.swapped, dtype=dtype) for _ in range(3))
        self.o = Linear(width, width, bias, mesh, "inner->outer", swapped, dtype=dtype)
        self.dropout = Dropout(dropout, mesh=mesh, layout="inner", dims=(0, 1)) if dropout else None
        self.head_width = width // heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3:
            raise ShapeError(f"SelfAttention: x has shape {tuple(x.shape)}, expected [batch, time, width]")
        parts = (self.q, self.k, self.v)
        projected = linear(x, [part.weight for part in parts], [part.bias for part in parts], self.plan)
        q, k, v = (part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in projected)
        if self.dropout is None or not self.training:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-2, -1) * self.head_width**-0.5
            if self.causal:
                scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1), -torch.inf)
            y = self.dropout(scores.softmax(-1)) @ v
        return self.o(y.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}"
