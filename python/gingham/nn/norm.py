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
from ..autograd.norm import norm_gradients, normalise, wide_of
from ..autograd.second_order import check_versions, refuse_deferred, replay, shared, versions_of
from ..checks import cuts_of_block, row_dim
from ..errors import MeshError, ShapeError
from ..function import Function, asked, nodes_of
from ..graph_ops import KNOWN, Meta, Traced, block_of, find, register, traced
from ..mesh import Mesh, check_local
from ..mesh.layout import Cuts, coordinates_of, interval, members
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
        ordered = tuple(name for name in mesh.sizes if name in names)
        places = [coordinates_of(rank, mesh.sizes) for rank in members(ordered, mesh.sizes, mesh.coordinates)]
        self.place.counts = [interval(self.features, names, mesh.sizes, place)[1] for place in places]
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
        eps = torch.finfo(wide_of(x.dtype)).eps if eps is None else eps
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


class _Normalise(Function):
    """y = (x - mean) / sqrt(mean square + eps) * gamma + beta; each of gamma, beta may be None."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, layer: Any, centred: bool, eps: float
    ) -> torch.Tensor:
        mesh, names = layer.mesh, layer.mesh.layout(layer.layout).features
        ctx.layer, ctx.parameters, ctx.centred = layer, (weight, bias), centred
        # as torch.nn: its layer norm reads them always, its RMS norm for the gradient of x
        read = [("weight", weight), ("bias", bias)] if centred or ctx.needs_input_grad[0] else []
        ctx.eps, ctx.versions = eps, versions_of(read)
        ctx.place = layer.block
        gamma, beta = (None if each is None else local_of(each)[ctx.place] for each in (weight, bias))
        mesh.say(layer.label, moves=mesh.axis(names) is not None)
        y, statistics = normalise(mesh, mesh.axis(names), layer.counts, x, gamma, beta, eps, centred)
        ctx.save_for_backward(x, statistics, gamma)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        layer, (weight, bias) = ctx.layer, ctx.parameters
        check_versions(layer.label, layer.mesh, ctx.versions)
        if torch.is_grad_enabled():
            return _again(ctx, dy)
        layout = layer.mesh.layout(layer.layout)
        wanted = [each for each in (weight, bias) if each is not None]
        need_x, *needs = asked(ctx)[:3]
        summed_here = any(need for need, each in zip(needs, (weight, bias), strict=True) if each is not None)
        x, statistics, gamma = ctx.saved_tensors
        sums = [summed_here and each is not None for each in (weight, bias)]
        axis, rest = layer.mesh.axis(layout.features), (gamma, layer.features, ctx.eps, ctx.centred)
        dx, both = norm_gradients(layer.mesh, axis, dy, x, statistics, *rest, (need_x, *sums))
        if both is None:
            return dx, *[None] * 5
        if both.shape[1] != len(local_of(wanted[0])):
            part, both = both, both.new_zeros(len(wanted), len(local_of(wanted[0])))
            both[:, ctx.place] = part
        users = users_of(layout, layer.stored)
        found: list[torch.Tensor | None]
        if deferring((weight, bias)):
            found = [sum_parts(layer.mesh, users, parameter, row) for parameter, row in zip(wanted, both, strict=True)]
        else:
            part = both if len(wanted) > 1 else both[0]
            total = summed(layer.mesh, wanted, nodes_of(ctx, wanted), part, all_reduced(*users), layer.label)
            found = [None] * len(wanted) if total is None else list(total) if len(wanted) > 1 else [total]
        gradients = iter(like(None if each is None else each.to(p.dtype), p) for each, p in zip(found, wanted, strict=True))
        return dx, *(None if each is None else next(gradients) for each in (weight, bias)), None, None, None


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
        y = (wide * (mean_of(wide * wide) + ctx.eps).rsqrt()).to(wide_of(x.dtype))
        y = y if weight is None else y * shared(weight, mesh, users)[place]
        return [(y if bias is None else y + shared(bias, mesh, users)[place]).to(x.dtype)]

    x, *_ = ctx.saved_tensors
    return *replay(compose, (x, *ctx.parameters), asked(ctx)[:3], [dy]), None, None, None


def _arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    rest = iter(tensors[1:])
    return [tensors[0], *(next(rest) if there == "1" else None for there in words[1]), find(words[0]), words[2] == "1", float(words[3])]


def _results(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    x, weight, *_ = _arguments(words, tensors)
    found: list[Meta] = [(x.shape, x.dtype), ((*x.shape[:-1], 2), torch.float64)]
    # a part of gamma is copied for backward; the whole is the input itself
    return found + ([] if weight is None or weight.shape[0] == x.shape[-1] else [([x.shape[-1]], weight.dtype)])


def _read(words: list[str], needs: Sequence[bool]) -> Sequence[int]:
    return range(1, 1 + words[1].count("1")) if words[2] == "1" or needs[0] else ()


KNOWN["normalise"] = Traced(_Normalise, _arguments, _results, reads=_read)
