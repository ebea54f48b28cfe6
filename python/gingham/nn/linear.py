"""Linear: y = x W^T + b with W cut over the mesh; Classifier, whose W may be an embedding's table; share_input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..autograd.casts import local_of
from ..autograd.kept import kept
from ..autograd.linear import linear, linear_plan
from ..autograd.relayout import reshard
from ..checks import cuts_of_block, row_dim
from ..errors import MeshError, ShapeError
from ..mesh import Mesh, current, promised
from ..mesh.layout import Cuts
from ..plan.formulas import feature_words, reshard_words
from .bias import block_of_features, stored_axes
from .embedding import Embedding
from .layer import Layer, bound_of, size_of
from .parameter import Given, make_parameter
from .shared import SharedInput

Initialiser = Callable[[torch.Tensor], object] | None


class Linear(Layer, torch.nn.Linear):
    """torch.nn.Linear on a mesh: x [..., in] -> [..., out], both this rank's blocks.

    weight, bias: DTensors of the global shapes [out, in] and [out], the same bits as torch.nn.Linear's after the same
    seed. layout: the activation layouts that come in and go out, "outer->outer", "outer->inner" or "inner->outer";
    where they differ on the mesh the first costs one relayout. swapped: n and k trade places (None: no, or as layout
    asks; "auto": the cheaper). epilogue: "gelu" applies the exact GELU to the result before it is stored.
    skip_bias_add: forward returns (y without bias, the block of bias that belongs to y's features); its gradient is
    summed over the ranks that hold other rows. transposed: weight is [in, out], drawn as GPT-2's Conv1D draws it
    (normal, 0.02; bias 0). init_weight, init_bias: fill the full tensor in place, so that fans are global.
    given: full tensors "weight" and "bias" to be cut instead of drawn. group: see share_input.

    Bytes received, forward and backward: [3x(pn-1) + 2y(pk-1) + 3w(pm-1)] / P words unswapped, n and k traded when
    swapped, 2w(d-1)/(d q^2) more where the weights are replicated over depth (docs/theory.md section 4).
    Raises MeshError where layout and swapped disagree; see functional.linear for the errors of a call.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mesh: Mesh | None = None,
        layout: str = "outer->outer",
        swapped: bool | str | None = None,
        epilogue: str = "none",
        dtype: torch.dtype | None = None,
        *,
        skip_bias_add: bool = False,
        transposed: bool = False,
        init_weight: Initialiser = None,
        init_bias: Initialiser = None,
        given: Given = None,
        device: Any = None,
    ) -> None:
        self.begin(mesh, device)
        in_features, out_features = size_of("Linear", "in_features", in_features), size_of("Linear", "out_features", out_features)
        self.in_features, self.out_features = in_features, out_features
        self.initialisers = {"weight": init_weight, "bias": init_bias}
        self.layout, self.epilogue, self.skip_bias_add, self.transposed = layout, epilogue, skip_bias_add, transposed
        self.asked = swapped
        self.group: Any = None
        if skip_bias_add and epilogue != "none":
            raise MeshError(f"Linear: skip_bias_add leaves out the bias that the epilogue {epilogue!r} needs before it; use one of them")
        self.plan = linear_plan(self.mesh, in_features, [out_features], layout, swapped, transposed=transposed).owned_by(self)
        self.bias_cuts = (stored_axes(self.mesh, self.plan.y[0].features),) if skip_bias_add else self.plan.bias_cuts
        self.weight = self._weight(dtype, given)
        self.bias = self._bias(dtype, given) if bias else None  # type: ignore[assignment]

    def _weight(self, dtype: torch.dtype | None, given: Given) -> torch.nn.Parameter:
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return make_parameter(self.mesh, self.plan.weight_cuts, "weight", shape, partial(self.draw, "weight"), dtype, given)

    def _bias(self, dtype: torch.dtype | None, given: Given) -> torch.nn.Parameter:
        return make_parameter(self.mesh, self.bias_cuts, "bias", (self.out_features,), partial(self.draw, "bias"), dtype, given)

    def draw(self, name: str, full: torch.Tensor) -> None:
        initialise = self.initialisers[name]
        if initialise is not None:
            initialise(full)
        elif self.transposed:
            torch.nn.init.normal_(full, std=0.02) if name == "weight" else torch.nn.init.zeros_(full)
        elif name == "weight":
            torch.nn.init.kaiming_uniform_(full, a=sqrt(5))
        elif self.in_features:
            torch.nn.init.uniform_(full, -bound_of(self.in_features), bound_of(self.in_features))
        else:
            torch.nn.init.zeros_(full)

    def ends(self, x: torch.Tensor) -> tuple[Cuts, Cuts]:
        given, made = self.plan.x[0], self.plan.y[0]
        dim = row_dim(x, given) if self.mesh.outer.rows == self.mesh.inner.rows else 0
        return cuts_of_block(given, x.dim(), dim), cuts_of_block(made, x.dim(), dim)

    def sizes(self) -> tuple[int, ...]:
        return self.in_features, self.out_features

    def forward(self, x: torch.Tensor) -> Any:
        if self.group is not None:
            y = self.group(self, x)
        else:
            weights, biases = self.operands()
            y = linear(x, weights, biases, self.plan, self.epilogue)[0]
        if not self.skip_bias_add:
            return y
        if self.bias is None:
            return y, None
        return y, block_of_features(self.operand("bias"), self.mesh, self.plan.y[0], self.bias_cuts[0], self.out_features)

    def received(self, rows: int, inner: int = 1) -> int:
        """Linears that share their input: all with the first of them."""
        first, plan = (self, self.plan) if self.group is None else (self.group.linears[0], self.group.plan)
        apart = 0
        if self.skip_bias_add and self.bias is not None:
            apart = feature_words(self.mesh, self.out_features, self.plan.y[0]) * max(4, self.bias.element_size())
        return apart + (plan.received(self, rows, inner) if first is self else 0)

    def operands(self) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """What functional.linear multiplies by and adds."""
        return [self.operand("weight")], [None if self.skip_bias_add else self.operand("bias")]

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        more = [f"{name}={value!r}" for name, value in (("epilogue", self.epilogue),) if value != "none"]
        more += [f"{name}=True" for name in ("skip_bias_add", "transposed") if getattr(self, name)]
        return ", ".join([f"{shape}, layout={self.layout!r}, swapped={self.plan.swapped}", *more])


def share_input(*linears: Linear) -> None:
    """Linears that are called on the same x run as one step with one gather of X: sets their `group`.

    The first call with an x computes all; the others' results wait for their own calls with that very x, unchanged.
    All must have the same mesh, in_features, layout, epilogue and storage, else MeshError. They are swapped alike:
    where they were made with swapped="auto" the sum of their outputs decides, and weights that were cut otherwise are
    cut again (before they are given to an optimizer). Bytes: x is gathered once instead of len(linears) times.
    """
    first = linears[0]
    for other in linears[1:]:
        for name in ("mesh", "in_features", "layout", "epilogue", "transposed", "asked"):
            if getattr(other, name) != getattr(first, name):
                raise MeshError(
                    f"share_input: rank {first.mesh.rank} got linears of {name} {getattr(first, name)!r} and {getattr(other, name)!r};"
                    f" expected the same {name} of all"
                )
    outputs = [each.out_features for each in linears]
    plan = linear_plan(first.mesh, first.in_features, outputs, first.layout, first.asked, "shared", first.transposed).owned_by(first)
    for each in linears:
        if each.plan.swapped != plan.swapped:
            _cut_again(each, plan.swapped)
    group = SharedInput(plan, linears)
    for each in linears:
        each.group = group


@torch.no_grad()
def _cut_again(layer: Linear, swapped: bool) -> None:
    old = layer.plan
    sizes = [layer.out_features]
    layer._placed.clear()
    layer.plan = linear_plan(layer.mesh, layer.in_features, sizes, layer.layout, swapped, transposed=layer.transposed).owned_by(layer)
    layer.weight = _recut(layer.mesh, layer._parameters["weight"], old.weight_cuts, layer.plan.weight_cuts)
    if layer.bias is not None and not layer.skip_bias_add:
        layer.bias = _recut(layer.mesh, layer._parameters["bias"], old.bias_cuts, layer.plan.bias_cuts)
        layer.bias_cuts = layer.plan.bias_cuts


def _recut(mesh: Mesh, parameter: Any, source: Cuts, target: Cuts) -> torch.nn.Parameter:
    meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    if promised.waits(parameter):
        return promised.cut_again(mesh, parameter, meta, target)
    new = mesh.parameter(meta, target)
    local_of(new).copy_(reshard(parameter, mesh, source, target))
    new.requires_grad_(parameter.requires_grad)
    return new


class Classifier(Linear):
    """A Linear onto classes or a vocabulary; tied: its weight is the Embedding's own Parameter, [out, in].

    The trade of axes is chosen so that the step's cuts are the table's where the mesh has one of that kind: in 2d and
    2.5d the swapped linear, in 1d the unswapped one. Elsewhere the table is resharded for each forward, and its
    gradient back: at most w/P words a rank each (functional.reshard). The gradient of a tied table is the sum of both
    uses. layout: "outer->inner" by default, for cross_entropy(layout="inner"). Bytes: Linear's and reshard's. Raises
    ShapeError where the table has another shape, MeshError where it lies on another mesh.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        mesh: Mesh | None = None,
        *,
        tied: Embedding | None = None,
        layout: str = "outer->inner",
        swapped: bool | str | None = None,
        dtype: torch.dtype | None = None,
        init_weight: Initialiser = None,
        init_bias: Initialiser = None,
        given: Given = None,
        device: Any = None,
    ) -> None:
        mesh = current(mesh)
        self.tied_cuts: Cuts | None = None
        if tied is not None:
            if tied.mesh is not mesh:
                raise MeshError(f"Classifier: rank {mesh.rank} got an embedding on {tied.mesh}, expected one on {mesh}")
            if (tied.count, tied.width) != (out_features, in_features):
                raise ShapeError(
                    f"Classifier({in_features}, {out_features}): rank {mesh.rank} got a table of {tied.count} x {tied.width},"
                    f" expected {out_features} x {in_features}"
                )
            swapped = _without_reshard(mesh, in_features, out_features, layout, tied.cuts) if swapped is None else swapped
        # torch.nn.Module wants its own constructor first, and Linear draws the weight there
        object.__setattr__(self, "_tied_weight", None if tied is None else tied.weight)
        dtype = dtype if tied is None else tied.weight.dtype
        super().__init__(
            in_features,
            out_features,
            bias,
            mesh,
            layout,
            swapped,
            dtype=dtype,
            init_weight=init_weight,
            init_bias=init_bias,
            given=given,
            device=device,
        )
        self.tied_cuts = None if tied is None or tied.cuts == self.plan.weight_cuts else tied.cuts

    def _weight(self, dtype: torch.dtype | None, given: Given) -> torch.nn.Parameter:
        tied = self.__dict__.pop("_tied_weight", None)
        return super()._weight(dtype, given) if tied is None else tied

    def operands(self) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        if self.tied_cuts is None:
            return [self.operand("weight")], [self.operand("bias")]
        weight = self.placed("weight")
        shape = (self.out_features, self.in_features)
        weight = reshard(weight, self.mesh, self.tied_cuts, self.plan.weight_cuts, None if isinstance(weight, DTensor) else shape)
        return [kept(weight, self.mesh, self.plan.weight_cuts, shape)], [self.operand("bias")]

    def received(self, rows: int, inner: int = 1) -> int:
        """And the tied weight cut anew."""
        tied = self.tied_cuts
        words = 0 if tied is None else reshard_words(self.mesh, self.weight.shape, tied, self.plan.weight_cuts)
        return super().received(rows, inner) + words * self.weight.element_size()


def _without_reshard(mesh: Mesh, k: int, n: int, layout: str, cuts: Cuts) -> bool | None:
    """The `swapped` whose step cuts W as the table is cut, or None where there is none."""
    for swapped in (False, True):
        try:
            if linear_plan(mesh, k, [n], layout, swapped).weight_cuts == cuts:
                return swapped
        except MeshError:
            continue  # the layout asks for the other
    return None
