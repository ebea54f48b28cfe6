"""LayerNorm over features that lie on several ranks: one gather a direction."""

from __future__ import annotations

from typing import Any

import torch

from ..functional import like, local_of
from ..layout import Names, coordinates_of, interval, members
from ..mesh import Mesh, ShapeError, check_local, current


class LayerNorm(torch.nn.Module):
    """torch.nn.LayerNorm over the last dim: x [..., features] -> the same, both blocks in `layout`.

    Each rank takes mean and M2 (summed squares about it) of its own features in float64; one all-gather over the
    feature axes brings the others', merged by Chan's formula, so that an offset of x costs no digits. Backward gathers
    two sums a row; dgamma and dbeta are all-reduced over the row axes in one message. weight and bias: cut over the
    first of the layout's feature axes and, where the mesh's order allows, the rest.
    Bytes received a rank: forward and backward 16 rows (pf-1) each over pf feature ranks; 2 features/pf words, all-reduced
    over the row ranks.
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        mesh: Mesh | None = None,
        layout: str = "outer",
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mesh, self.features, self.eps, self.layout = current(mesh), normalized_shape, eps, layout
        names = self.mesh.layout(layout).features
        self.stored = names if list(names) == [name for name in self.mesh.sizes if name in names] else names[:1]
        self.weight = self.mesh.parameter(torch.ones(normalized_shape, dtype=dtype), (self.stored,))
        self.bias = self.mesh.parameter(torch.zeros(normalized_shape, dtype=dtype), (self.stored,)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_local(x, "LayerNorm's x", self.mesh)
        expected = self.mesh.interval(self.features, self.mesh.layout(self.layout).features)[1]
        if x.dim() == 0 or x.shape[-1] != expected:
            raise ShapeError(
                f"LayerNorm({self.features}): rank {self.mesh.rank} got x of shape {tuple(x.shape)},"
                f" expected [..., {expected}], its block in layout {self.layout!r}"
            )
        return _LayerNorm.apply(x, self.weight, self.bias, self)

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}, layout={self.layout}"


def gather_parts(mesh: Mesh, names: Names, part: torch.Tensor) -> torch.Tensor:
    """Every member's `part` [rows, ...], stacked, in an order that all members share, so that sums of it have the same bits."""
    axis = mesh.axis(names)
    return torch.stack(axis.all_gather(part, mesh.source, rows=part.shape[0])) if axis is not None else part.unsqueeze(0)


def merge(mesh: Mesh, names: Names, features: int, mean: torch.Tensor, m2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of all features from each member's (mean, M2), by Chan's formula; float64."""
    parts = gather_parts(mesh, names, torch.stack([mean, m2], -1))
    if len(parts) == 1:
        return mean, m2 / features
    ordered = tuple(name for name in mesh.sizes if name in names)
    places = [coordinates_of(rank, mesh.sizes) for rank in members(ordered, mesh.sizes, mesh.coordinates)]
    counts = torch.tensor([interval(features, names, mesh.sizes, place)[1] for place in places], dtype=torch.float64, device=mean.device)
    counts = counts.view(-1, *[1] * mean.dim())
    means = parts[..., 0]
    total = (counts * means).sum(0) / features
    return total, (parts[..., 1] + counts * (means - total) ** 2).sum(0) / features


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: LayerNorm) -> torch.Tensor:
        mesh, names = layer.mesh, layer.mesh.layout(layer.layout).features
        wide = x.double()
        if x.numel():
            variance, mean = torch.var_mean(wide, -1, correction=0)
            m2 = variance * x.shape[-1]
        else:
            mean = m2 = wide.new_zeros(x.shape[:-1])
        mean, variance = merge(mesh, names, layer.features, mean, m2)
        scale = (variance + layer.eps).rsqrt().unsqueeze(-1)
        normal = ((wide - mean.unsqueeze(-1)) * scale).to(x.dtype)
        ctx.layer, ctx.parameters, ctx.place = layer, (weight, bias), _place(layer)
        gamma = local_of(weight)[ctx.place]
        ctx.save_for_backward(normal, scale, gamma)
        y = normal * gamma
        return y if bias is None else y + local_of(bias)[ctx.place]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        normal, scale, gamma = ctx.saved_tensors
        layer, (weight, bias) = ctx.layer, ctx.parameters
        names = layer.mesh.layout(layer.layout).features
        dx = None
        if ctx.needs_input_grad[0]:
            slope = (dy * gamma).double()
            sums = torch.stack([slope.sum(-1), (slope * normal).sum(-1)], -1)
            sums = gather_parts(layer.mesh, names, sums).sum(0) / layer.features
            dx = ((slope - sums[..., :1] - normal * sums[..., 1:]) * scale).to(dy.dtype)
        if not any(ctx.needs_input_grad[1:3]):
            return dx, None, None, None
        rows = tuple(range(dy.dim() - 1))
        both = dy.new_zeros(2, len(local_of(weight)), dtype=torch.float64)
        both[0, ctx.place] = (dy * normal).sum(rows, dtype=torch.float64)
        both[1, ctx.place] = dy.sum(rows, dtype=torch.float64)
        both = _sum_over_rows(layer, both.to(dy.dtype if dy.dtype == torch.float64 else torch.float32))
        both = both.to(gamma.dtype)
        return dx, like(both[0], weight), None if bias is None else like(both[1], bias), None


def _place(layer: LayerNorm) -> slice:
    """This rank's features within its block of the parameters, which may be cut over fewer axes."""
    start, length = layer.mesh.interval(layer.features, layer.mesh.layout(layer.layout).features)
    origin, _ = layer.mesh.interval(layer.features, layer.stored)
    return slice(start - origin, start - origin + length)


def _sum_over_rows(layer: LayerNorm, both: torch.Tensor) -> torch.Tensor:
    layout = layer.mesh.layout(layer.layout)
    for names in (layout.rows, tuple(name for name in layout.features if name not in layer.stored)):
        axis = layer.mesh.axis(names)
        if axis is not None:
            axis.all_reduce_(both, layer.mesh.source)
    return both
