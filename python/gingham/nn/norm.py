"""LayerNorm and RMSNorm over features that lie on several ranks: one gather a direction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from ..autograd import second_order
from ..autograd.background import all_reduced, summed
from ..autograd.casts import autocast_dtype, like, local_of
from ..autograd.gradients import deferring
from ..autograd.second_order import check_versions, refuse_deferred, replay, shared, versions_of
from ..checks import cuts_of_block, row_dim
from ..errors import MeshError, ShapeError
from ..function import Function, asked, nodes_of
from ..graph_ops import KNOWN, Meta, Traced, block_of, find, register, traced
from ..mesh import Mesh, check_local
from ..mesh.layout import Cuts, Names, coordinates_of, interval, members
from ..plan.formulas import norm_bytes
from .bias import place_of_features, stored_axes, sum_parts, users_of
from .layer import Layer, size_of
from .parameter import Given, make_parameter


class _Norm(Layer):
    """What LayerNorm and RMSNorm share: their parameters' cuts, the check of x."""

    weight: Any
    bias: Any
    eps: Any
    layout: str

    def _start(self, shape: int | Sequence[int], eps: float | None, mesh: Mesh | None, layout: str, affine: bool, device: Any) -> None:
        mesh = self.begin(mesh, device)
        sizes = shape if isinstance(shape, Sequence) else (shape,)
        self.normalized_shape = tuple(size_of(type(self).__name__, "normalized_shape", size) for size in sizes)
        if len(self.normalized_shape) != 1:
            raise NotImplementedError(
                f"{type(self).__name__}: normalized_shape={self.normalized_shape}, expected one dim, the last, which ranks cut"
            )
        (self.features,), self.eps, self.layout, self.elementwise_affine = self.normalized_shape, eps, layout, affine
        self.stored = stored_axes(mesh, mesh.layout(layout).features)
        self.weight = self.bias = None
        names = mesh.layout(layout).features
        self.place = SimpleNamespace(mesh=mesh, layout=layout, stored=self.stored, features=self.features, label=type(self).__name__)
        self.place.held = mesh.interval(self.features, names)[1]
        self.place.block = place_of_features(mesh, names, self.stored, self.features)
        self.handle = register(mesh, self.place)

    def _parameter(self, name: str, dtype: torch.dtype | None, given: Given) -> torch.nn.Parameter:
        return make_parameter(self.mesh, (self.stored,), name, (self.features,), partial(self.draw, name), dtype, given)

    def draw(self, name: str, full: torch.Tensor) -> None:
        full.fill_(1.0 if name == "weight" else 0.0)

    def ends(self, x: torch.Tensor) -> tuple[Cuts, Cuts]:
        layout = self.mesh.layout(self.layout)
        cuts = cuts_of_block(layout, x.dim(), row_dim(x, layout))
        return cuts, cuts

    def received(self, rows: int, inner: int = 1) -> int:
        own = [each for each in (self.weight, self.bias) if each is not None]
        item, sums = max([4, *(each.element_size() for each in own)]), 2 if isinstance(self, torch.nn.LayerNorm) else 1
        return norm_bytes(self.mesh, rows * inner, self.features, item, self.mesh.layout(self.layout), sums, len(own))

    def sizes(self) -> tuple[int, ...]:
        return (self.features,)

    def _check(self, x: torch.Tensor) -> torch.Tensor:
        """x, or in a region of torch.autocast on a GPU, whose norms return float32, x in that."""
        kind = type(self).__name__
        check_local(x, f"{kind}'s x", self.mesh)
        expected = self.place.held
        if x.dim() == 0 or x.shape[-1] != expected:
            whole = "; a full tensor? mesh.scatter(x) gives this rank's block" if x.dim() and x.shape[-1] == self.features else ""
            raise ShapeError(
                f"{kind}({self.features}): rank {self.mesh.rank} got x of shape {tuple(x.shape)},"
                f" expected [..., {expected}], its block in layout {self.layout!r}{whole}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{kind}({self.features}): rank {self.mesh.rank} got x of {x.dtype}, expected a floating dtype")
        return x.float() if x.dtype.itemsize == 2 and x.device.type != "cpu" and autocast_dtype(x) is not None else x

    def _call(self, x: torch.Tensor, centred: bool, eps: float | None) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return self._normalise(self._check(x), centred, eps)
        try:
            return self._normalise(self._check(x), centred, eps)
        except (ShapeError, MeshError, TypeError) as error:
            raise self.named(error) from None

    def _normalise(self, x: torch.Tensor, centred: bool, eps: float | None) -> torch.Tensor:
        eps = torch.finfo(_wide(x.dtype)).eps if eps is None else eps
        weight, bias = self.operand("weight"), self.operand("bias")
        if not torch.compiler.is_compiling():
            self.place.label = self.label()
            return _Normalise.apply(x, weight, bias, self.place, centred, eps)
        present = [block_of(each) for each in (weight, bias) if each is not None]
        there = "".join("0" if each is None else "1" for each in (weight, bias))
        return traced("normalise", [self.handle, there, str(int(centred)), str(eps)], [x, *present])[0]

    def extra_repr(self) -> str:
        affine = f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        return f"{self.features}, eps={self.eps}, {affine}, layout={self.layout!r}"


class LayerNorm(_Norm, torch.nn.LayerNorm):  # type: ignore[misc]
    """torch.nn.LayerNorm over the last dim: x [..., features] -> the same, both blocks in `layout`.

    Each rank takes mean and M2 (summed squares about it) of its own features in float64; one all-gather over the
    feature axes brings the others', merged by Chan's formula, so that an offset of x costs no digits. Backward gathers
    two sums a row; dgamma and dbeta are all-reduced over the row axes in one message. weight and bias: cut over the
    first of the layout's feature axes and, where the mesh's order allows, the rest; absent with
    elementwise_affine=False. given: full tensors "weight" and "bias", cut instead of drawn.
    Bytes received a rank: forward and backward 16 rows (pf-1) each over pf feature ranks; 2 features/pf words, all-reduced
    over the row ranks.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        mesh: Mesh | None = None,
        layout: str = "outer",
        bias: bool = True,
        dtype: torch.dtype | None = None,
        *,
        elementwise_affine: bool = True,
        given: Given = None,
        device: Any = None,
    ) -> None:
        self._start(normalized_shape, eps, mesh, layout, elementwise_affine, device)
        if elementwise_affine:
            self.weight = self._parameter("weight", dtype, given)
            self.bias = self._parameter("bias", dtype, given) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(x, True, self.eps)


class RMSNorm(_Norm, torch.nn.RMSNorm):  # type: ignore[misc]
    """torch.nn.RMSNorm over the last dim: x / sqrt(mean(x^2) + eps) * weight, blocks in `layout`.

    eps None: the finfo eps of x's dtype, of float32 for 16-bit x (what torch's kernel takes). Squares are summed in
    float64. weight: as LayerNorm's; given: "weight".
    Bytes received a rank: forward and backward 8 rows (pf-1) each over pf feature ranks; features/pf words, all-reduced
    over the row ranks.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        mesh: Mesh | None = None,
        layout: str = "outer",
        dtype: torch.dtype | None = None,
        *,
        elementwise_affine: bool = True,
        given: Given = None,
        device: Any = None,
    ) -> None:
        self._start(normalized_shape, eps, mesh, layout, elementwise_affine, device)
        if elementwise_affine:
            self.weight = self._parameter("weight", dtype, given)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(x, False, self.eps)


def gather_parts(mesh: Mesh, names: Names, part: torch.Tensor) -> torch.Tensor:
    """Every member's `part` [rows, ...], stacked, in an order that all members share, so that sums of it have the same bits."""
    axis = mesh.axis(names)
    return torch.stack(axis.all_gather(part, rows=part.shape[0])) if axis is not None else part.unsqueeze(0)


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


def _moments(x: torch.Tensor, mesh: Mesh, names: Names, features: int, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (0 where not centred) and mean square about it of whole rows, [...] in float64."""
    if not centred:
        squares = gather_parts(mesh, names, (x * x).sum(-1)).sum(0) / features
        return torch.zeros_like(squares), squares
    if not x.numel():
        mean = m2 = x.new_zeros(x.shape[:-1])
    else:
        variance, mean = torch.var_mean(x, -1, correction=0)
        m2 = variance * x.shape[-1]
    return merge(mesh, names, features, mean, m2)


class _Normalise(Function):
    """y = (x - mean) / sqrt(mean square + eps) * gamma + beta; each of gamma, beta may be None."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, layer: Any, centred: bool, eps: float
    ) -> torch.Tensor:
        mesh, names = layer.mesh, layer.mesh.layout(layer.layout).features
        ctx.layer, ctx.parameters, ctx.centred, ctx.dtype = layer, (weight, bias), centred, x.dtype
        # as torch.nn: its layer norm reads them always, its RMS norm for the gradient of x
        read = [("weight", weight), ("bias", bias)] if centred or ctx.needs_input_grad[0] else []
        ctx.eps, ctx.versions = eps, versions_of(read)
        ctx.place = layer.block
        gamma, beta = (None if each is None else local_of(each)[ctx.place] for each in (weight, bias))
        mesh.say(layer.label, moves=mesh.axis(names) is not None)
        if mesh.axis(names) is None:
            y, mean, scale, *shift = _normalise_whole(x, gamma, beta, centred, eps)
        else:
            wide = x.double()
            mean, variance = _moments(wide, mesh, names, layer.features, centred)
            scale, shift = (variance + eps).rsqrt().unsqueeze(-1), []
            y = ((wide - mean.unsqueeze(-1)) * scale).to(_wide(x.dtype))
            y = y if gamma is None else y * gamma
            y = y if beta is None else y + beta
        ctx.save_for_backward(x, mean, scale, gamma, *shift)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        layer, (weight, bias) = ctx.layer, ctx.parameters
        check_versions(layer.label, layer.mesh, ctx.versions)
        if torch.is_grad_enabled():
            return _again(ctx, dy)
        layout = layer.mesh.layout(layer.layout)
        wanted = [each for each in (weight, bias) if each is not None]
        apart = _apart_whole if layer.mesh.axis(layout.features) is None else _apart
        need_x, *needs = asked(ctx)[:3]
        dx, parts = apart(ctx, dy, need_x, bool(wanted) and any(needs))
        if not parts:
            return dx, *[None] * 5
        both = parts[0].new_zeros(len(wanted), len(local_of(wanted[0])))
        for row, part in zip(both, parts, strict=True):
            row[ctx.place] = part
        both = both.to(_wide(ctx.dtype))
        users = users_of(layout, layer.stored)
        sums: list[torch.Tensor | None]
        if deferring((weight, bias)):
            sums = [sum_parts(layer.mesh, users, parameter, row) for parameter, row in zip(wanted, both, strict=True)]
        else:
            part = both if len(wanted) > 1 else both[0]
            total = summed(layer.mesh, wanted, nodes_of(ctx, wanted), part, all_reduced(*users), layer.label)
            sums = [None] * len(wanted) if total is None else list(total) if len(wanted) > 1 else [total]
        found = iter(like(None if each is None else each.to(p.dtype), p) for each, p in zip(sums, wanted, strict=True))
        return dx, *(None if each is None else next(found) for each in (weight, bias)), None, None, None


def _apart(ctx: Any, dy: torch.Tensor, need_x: bool, parameters: bool) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """dx, and where asked for this rank's sums of dgamma and dbeta, for features that lie on several ranks, in float64."""
    layer, (weight, bias) = ctx.layer, ctx.parameters
    x, mean, scale, gamma = ctx.saved_tensors
    normal, wide, dx = (x.double() - mean.unsqueeze(-1)) * scale, dy.double(), None
    if need_x:
        slope = wide if gamma is None else wide * gamma
        sums = [slope.sum(-1)] * ctx.centred + [(slope * normal).sum(-1)]
        names = layer.mesh.layout(layer.layout).features
        sums = gather_parts(layer.mesh, names, torch.stack(sums, -1)).sum(0) / layer.features
        dx = slope - normal * sums[..., -1:]
        dx = ((dx - sums[..., :1] if ctx.centred else dx) * scale).to(ctx.dtype)
    rows = tuple(range(dy.dim() - 1))
    parts = [wide * normal] * (weight is not None) + [wide] * (bias is not None) if parameters else []
    return dx, [part.sum(rows) for part in parts]


def _normalise_whole(
    x: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None, centred: bool, eps: float
) -> tuple[torch.Tensor, ...]:
    """Where all features are here: y, mean, 1 / sqrt(mean square + eps) and, where centred, what x was shifted by before. Torch's own
    kernel, which loses digits to an offset, sees each row about its rounded mean."""
    wide = x.to(_wide(x.dtype))
    gamma, beta = (None if each is None else each.to(wide.dtype) for each in (gamma, beta))
    if centred:
        shift = wide.mean(-1, keepdim=True)
        return *torch.native_layer_norm(wide - shift, [wide.shape[-1]], gamma, beta, eps), shift
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normal = wide * scale
    return normal if gamma is None else normal.mul_(gamma), scale.new_zeros(scale.shape), scale


def _apart_whole(ctx: Any, dy: torch.Tensor, need_x: bool, parameters: bool) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """What _apart gives, where all features are here."""
    weight, bias = ctx.parameters
    x, mean, scale, gamma, *shift = ctx.saved_tensors
    wide, slope = x.to(_wide(x.dtype)), dy.to(_wide(x.dtype))
    gamma = None if gamma is None else gamma.to(wide.dtype)
    if ctx.centred:
        wide = wide - shift[0]
        wanted = (need_x, parameters, parameters)
        ones = torch.ones(wide.shape[-1], dtype=wide.dtype, device=x.device) if gamma is None else gamma
        dx, *parts = torch.ops.aten.native_layer_norm_backward(slope.contiguous(), wide, [wide.shape[-1]], mean, scale, ones, ones, wanted)
        found = [part for part, each in zip(parts, (weight, bias), strict=True) if parameters and each is not None]
        return None if dx is None else dx.to(ctx.dtype), found
    normal = wide * scale
    part = slope * normal
    found = [part.sum(tuple(range(dy.dim() - 1)))] if parameters else []
    if not need_x:
        return None, found
    if gamma is not None:
        slope, part = slope * gamma, part.mul_(gamma)
    return normal.mul_(part.mean(-1, keepdim=True)).neg_().add_(slope).mul_(scale).to(ctx.dtype), found


def _again(ctx: Any, dy: torch.Tensor) -> Any:
    """The gradients as ones that have gradients themselves."""
    layer, place = ctx.layer, ctx.place
    mesh, layout = layer.mesh, layer.mesh.layout(layer.layout)
    users = (*layout.rows, *(name for name in layout.features if name not in layer.stored))
    refuse_deferred(layer.label, mesh, deferring(ctx.parameters))

    def compose(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> list[torch.Tensor]:
        def mean_of(part: torch.Tensor) -> torch.Tensor:
            return shared(second_order.summed(part.sum(-1, keepdim=True), mesh, layout.features) / layer.features, mesh, layout.features)

        wide = x.double()
        wide = wide - mean_of(wide) if ctx.centred else wide
        y = (wide * (mean_of(wide * wide) + ctx.eps).rsqrt()).to(_wide(x.dtype))
        y = y if weight is None else y * shared(weight, mesh, users)[place]
        return [(y if bias is None else y + shared(bias, mesh, users)[place]).to(x.dtype)]

    x, *_ = ctx.saved_tensors
    return *replay(compose, (x, *ctx.parameters), asked(ctx)[:3], [dy]), None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    rest = iter(tensors[1:])
    return [tensors[0], *(next(rest) if there == "1" else None for there in words[1]), find(words[0]), words[2] == "1", float(words[3])]


def _results(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    x, weight, _, layer, centred, _ = _arguments(words, tensors)
    rows, whole = x.shape[:-1], layer.mesh.axis(layer.mesh.layout(layer.layout).features) is None
    wide = _wide(x.dtype) if whole else torch.float64
    found: list[Meta] = [(x.shape, x.dtype), ((*rows, 1) if whole else rows, wide), ((*rows, 1), wide)]
    # a part of gamma is copied for backward; the whole is the input itself
    found += [] if weight is None or weight.shape[0] == x.shape[-1] else [([x.shape[-1]], weight.dtype)]
    return [*found, ((*rows, 1), wide)] if whole and centred else found


def _read(words: list[str], needs: Sequence[bool]) -> Sequence[int]:
    return range(1, 1 + words[1].count("1")) if words[2] == "1" or needs[0] else ()


KNOWN["normalise"] = Traced(_Normalise, _arguments, _results, reads=_read)
