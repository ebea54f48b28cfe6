"""The autograd functions over the C++ steps: linear maps, changes of layout and of cuts, dropout.

A linear map Y = X W has three products on one grid (docs/theory.md section 1): forward computes Y, backward dX and dW (and db) in one
call that gathers dY once. Parameters and gradients are DTensors; nothing here sums gradients over replicas of an activation.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch

from .. import graph_ops, native
from ..errors import MeshError, ShapeError
from ..function import Function, asked, nodes_of
from ..graph_ops import traced
from ..mesh import Mesh, check_local
from ..mesh.layout import Cuts, Layout, Names, offsets
from ..mesh.live import Live
from ..plan import formulas
from . import background, early, gradients, later, second_order
from .casts import as_parameter, autocast_dtype, block_in, cast_for_autocast, casts_to, like, local_of
from .gradients import deferring, sum_over_depth
from .ranges import in_range, profiling
from .relayout import relayout
from .second_order import changed, check_versions, shaped, versions_of


@dataclass(frozen=True)
class LinearPlan(Live):
    """What one linear map, or several that share X, needs on every call. x, y: (the caller's layout, the step's)."""

    mesh: Mesh
    step: native.Step
    k: int
    n: tuple[int, ...]
    swapped: bool
    x: tuple[Layout, Layout]
    y: tuple[Layout, Layout]
    weight_cuts: Cuts
    bias_cuts: Cuts
    k_local: int
    n_local: tuple[int, ...]
    name: str  # what it is called where no layer owns it
    owners: list[Any] = field(default_factory=list)  # the layer whose plan it is
    handles: list[str] = field(default_factory=list)  # its own, once it is registered

    @property
    def label(self) -> str:
        owner = self.owners[0]() if self.owners else None
        return self.name if owner is None else owner.label()

    def received(self, layer: Any, rows: int, inner: int = 1, need_x: bool = True) -> int:
        """Bytes that all ranks together receive in a forward and backward pass of [rows, inner, k]. layer: one of those whose maps these
        are, for its dtype and whether its bias is added here; need_x: x has a gradient."""
        bias, y = layer.bias is not None and not getattr(layer, "skip_bias_add", False), (self.y[1], self.y[0])
        words = formulas.linear_traffic(self.mesh, rows, self.k, self.n, self.swapped, bias, self.x, y, inner, need_x)
        return words * int(layer.weight.element_size())

    def owned_by(self, layer: Any) -> LinearPlan:
        """Whose calls these are."""
        self.owners[:] = [weakref.ref(layer)]
        return self


def linear_plan(
    mesh: Mesh, k: int, n: list[int], layout: str, swapped: bool | str | None, name: str = "linear", transposed: bool = False
) -> LinearPlan:
    """The plan of linear maps [.., k] -> [.., n_i] that share X. Where mesh.outer and mesh.inner differ the layout
    decides which trade of axes is used, and a `swapped` that disagrees is a MeshError; elsewhere `swapped` is free.
    transposed: weights are stored [in, out]."""
    ends = layout.split("->") if isinstance(layout, str) else []
    if len(ends) != 2 or set(ends) - {"outer", "inner", "rows"} or ends == ["inner", "inner"]:
        raise MeshError(f"layout={layout!r}: expected 'outer->outer', 'outer->inner' or 'inner->outer' ('rows' for outer: whole features)")
    if swapped not in (None, False, True, "auto"):
        raise MeshError(f"swapped={swapped!r}: expected None, False, True or 'auto'")
    swapped = formulas.is_swapped(mesh, k, n, layout, swapped)
    given = [mesh.layout(end) for end in ends]
    first, second = (mesh.axes.n, mesh.axes.k) if swapped else (mesh.axes.k, mesh.axes.n)
    again = mesh.axes.gathered
    x, y = (mesh.inner, mesh.outer) if swapped else (mesh.outer, mesh.inner)
    out, into = (second + again, first) if swapped else (second, first + again)
    rows, columns = (into, out) if transposed else (out, into)
    plan = LinearPlan(
        mesh,
        make_step(mesh, name, k, n, swapped, (x, y), not transposed),
        k,
        tuple(n),
        swapped,
        (given[0], x),
        (given[1], y),
        (rows + mesh.axes.kept, columns),  # pieces of whole weights are rows, which lie in one piece of memory
        (second,),
        mesh.interval(k, given[0].features)[1],
        tuple(mesh.interval(size, y.features)[1] for size in n),
        name,
    )
    plan.handles.append(graph_ops.register(mesh, plan))
    return plan


def make_step(
    mesh: Mesh, name: str, k: int, n: list[int], swapped: bool, layouts: tuple[Layout, Layout] | None, out_in: bool = False
) -> Any:
    """The C++ step. layouts: of X and Y, which may leave an operand whole (classic 1d) or cut it along M (sequence);
    None: the plain step of matmul, with every operand cut, B over all of m. out_in: W lies in memory as [out, in]."""
    axes = mesh.axes
    first, second = (axes.n, axes.k) if swapped else (axes.k, axes.n)
    plain = layouts is None
    again = axes.m if plain else axes.gathered

    def activation(index: int, size: int, first: Names, second: Names) -> Any:
        block = mesh.interval(size, first)[1]
        replicated = False
        if layouts is not None and not set(second) <= set(layouts[index].features):
            if set(second) <= set(layouts[index].rows):
                return native.Operand(mesh.axis(second), 0, [], False)
            replicated = True
        return native.Operand(mesh.axis(second), 1, _points(mesh, block, second), replicated)

    def weight(size: int) -> Any:
        block = mesh.interval(size if swapped else k, second if swapped else first)[1]
        return native.Operand(mesh.axis(again), 1 if swapped else 0, _points(mesh, block, again), False)

    along_rows = layouts is not None and any(set(first + second) & set(layout.rows) for layout in layouts)
    return native.Step(
        mesh.program,
        name,
        activation(0, k, first, second),
        [weight(size) for size in n],
        [activation(1, size, second, first) for size in n],
        None if plain else mesh.axis(axes.replicas),
        "M" if along_rows else "N" if swapped else "K",
        k,
        list(n),
        mesh.slices or (1 if mesh.job.has_gpu else formulas.usual_slices(mesh, k, n)),
        out_in,
    )


def _points(mesh: Mesh, size: int, names: Names) -> list[int]:
    return offsets(size, [mesh.sizes[name] for name in names])


def backward_passes() -> int:
    """How many backward passes of linears this process has made: what one of them used up cannot be used again."""
    return _Linear.passes


def linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    plan: LinearPlan,
    epilogue: str = "none",
) -> list[torch.Tensor]:
    """y_i = epilogue(x weights_i^T + biases_i), x [..., K], y_i [..., N_i], each in the caller's layouts.

    weights: [out, in] ([in, out] where transposed), DTensors or local blocks cut as plan.weight_cuts. Raises TypeError
    for a tensor that is not plain and local; the step raises ShapeError, on every rank, where one rank's last dim or
    dtype does not fit its weights. Bytes: docs/theory.md section 4, and one relayout where layouts ask.
    In a torch.autocast region x, weights and biases are cast to its dtype (float64 is not), products accumulate in float32, y and the
    bytes of panels are of that dtype, partial sums travel in float32; backward uses the same casts, gradients have their own dtypes.
    """
    if torch.compiler.is_compiling():
        return _linear(x, weights, biases, plan, epilogue)
    try:
        return _linear(x, weights, biases, plan, epilogue)
    except (ShapeError, MeshError, TypeError) as error:
        owner = plan.owners[0]() if plan.owners else None
        if isinstance(error, ShapeError) and isinstance(x, torch.Tensor) and x.dim():
            said = str(error).replace(f"dtype bytes{x.element_size()}", f"dtype {x.dtype}")  # the core knows integers by their size
            if x.shape[-1] == plan.k != plan.k_local:  # what is missed most often
                said += f"; x has all {plan.k} features where a rank has {plan.k_local}: a full tensor? mesh.scatter(x) gives its block"
            error = ShapeError(said)
        raise error if owner is None else owner.named(error) from None


def _linear(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None], plan: LinearPlan, epilogue: str
) -> list[torch.Tensor]:
    check_local(x, "linear's x", plan.mesh)
    if x.dim() == 0:
        raise ShapeError(f"linear {plan.k} -> {plan.n}: got a tensor without dims, expected [..., {plan.k_local}]")
    if x.dim() == 1:
        if set(plan.x[1].rows) != set(plan.y[1].rows):
            raise ShapeError(
                f"linear {plan.k} -> {plan.n}: rank {plan.mesh.rank} got x of shape {tuple(x.shape)}, without a dim of rows, which this"
                " mesh cuts before the layer and gathers in it; expected [rows, features]: x.unsqueeze(0)"
            )
        return [y.squeeze(0) for y in _linear(x.unsqueeze(0), weights, biases, plan, epilogue)]
    dtype = autocast_dtype(x)
    x = relayout(x if dtype is None else cast_for_autocast(x), plan.mesh, *plan.x, plan.k).contiguous()
    if torch.compiler.is_compiling():
        outputs = _traced_linear(x, weights, biases, plan, epilogue)
    else:
        outputs = _Linear.apply(x, plan, epilogue, dtype, *weights, *biases)
    return [relayout(y, plan.mesh, plan.y[1], plan.y[0], size) for y, size in zip(outputs, plan.n, strict=True)]


class _Linear(Function):
    passes = 0

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, plan: LinearPlan, epilogue: str, dtype: torch.dtype | None, *parameters: torch.Tensor | None
    ) -> Any:
        count = len(plan.n)
        local = [local_of(parameter) for parameter in parameters]
        ready = early.enter(plan, True, parameters[:count], dtype) if plan.mesh.job.has_gpu else None
        made = ready.blocks if ready else []
        blocks = local if dtype is None else [*made, *(block_in(plan.mesh, each, dtype) for each in local[len(made) :])]
        weights: list[Any] = blocks[:count]
        plan.mesh.say(plan.label)
        outputs = plan.step.forward(x, weights, blocks[count:], epilogue, early=ready.weights if ready else None)
        if plan.mesh.ahead is not None:
            plan.mesh.ahead.start()
        ys, before = outputs[:count], outputs[count:]
        ctx.plan, ctx.parameters, ctx.count, ctx.call = plan, parameters, count, (epilogue, dtype)
        ctx.set_materialize_grads(False)  # a map whose y nobody used has no gradient, rather than zeros
        ctx.shapes = [y.shape for y in ys]
        # as torch.nn: a weight counts where the gradient of x is made of it; a cast one has been copied
        read = zip(parameters, local, weights, strict=False) if ctx.needs_input_grad[0] else ()
        ctx.versions = versions_of([("weight", each) for each, own, used in read if own is used])
        ctx.save_for_backward(x, *weights, *before)
        return tuple(_with_inner_dims(y, x, axis) for y, axis in zip(ys, plan.n_local, strict=True))

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:
        _Linear.passes += 1
        if changed(ctx.versions):
            check_versions(ctx.plan.label, ctx.plan.mesh, ctx.versions)
        if torch.is_grad_enabled():
            return _linear_again(ctx, cotangents)
        owner = ctx.plan.owners[0]() if ctx.plan.owners and profiling() else None
        return _gradients(ctx, cotangents) if owner is None else in_range(owner, partial(_gradients, ctx, cotangents), ".backward")


def _gradients(ctx: Any, cotangents: tuple[torch.Tensor | None, ...]) -> Any:
    """dX, dW and db of one call, dY gathered once for all."""
    count, plan, parameters = ctx.count, ctx.plan, ctx.parameters
    x, *saved = ctx.saved_tensors
    weights, before = saved[:count], saved[count:]
    dys = [x.new_zeros(shape) if dy is None else dy.contiguous() for dy, shape in zip(cotangents, ctx.shapes, strict=True)]
    if before:
        dys = [native.gelu_backward(plan.mesh.program, dy, z.view(dy.shape)) for dy, z in zip(dys, before, strict=True)]
    need_x, _, _, _, *needs = asked(ctx)
    need_w = [need and dy is not None for need, dy in zip(needs[:count], cotangents, strict=True)]
    need_b = [need and dy is not None for need, dy in zip(needs[count:], cotangents, strict=True)]
    if need_x and later.split(plan, parameters, x, weights, dys, need_w):
        need_w = [False] * count
    wanted = [weight for weight, need in zip(parameters, need_w, strict=False) if need]
    keeps = bool(plan.mesh.axes.kept)  # gradients of weights are summed where pieces of the whole are
    put_off = deferring(parameters)
    here = [need and plan.y[1].features == plan.bias_cuts[0] for need in need_b] if put_off else []
    need_b = [need and not mine for need, mine in zip(need_b, here, strict=True)] if put_off else need_b
    bias_later = background.puts_off(plan.mesh) and x.dtype.itemsize > 2  # sums that would wait for another host
    # gradients of a cast are summed over depth after they are float32 again, not before
    cast = ctx.call[1] is not None and any(saved.dtype != weight.dtype for saved, weight in zip(weights, parameters, strict=False))
    ready = early.enter(plan, False, parameters[:count] if need_x else None, ctx.call[1]) if plan.mesh.job.has_gpu else None
    plan.mesh.say(plan.label)
    behind = not (put_off or keeps) and bool(wanted) and background.sums_later(plan.mesh, wanted)
    wide = behind and wanted[0].dtype.itemsize == 2  # summed in float32 too
    nodes = nodes_of(ctx, parameters) if behind or bias_later else []
    at_once, gathered = not (behind or put_off or cast or keeps), ready.weights if ready else None
    dx, dws, dbs = plan.step.backward(x, weights, dys, need_x, bool(wanted), need_b, at_once, not bias_later, gathered, wide)
    if plan.mesh.ahead is not None:
        plan.mesh.ahead.start()
    for index, mine in enumerate(here):
        if mine:
            dbs[index] = _bias_gradient(plan, dys[index], parameters[count + index])
    over_rows = background.deep_sum(plan.mesh.axes.gathered, plan.mesh.axes.replicas)
    for index, need in enumerate(need_b):
        if need and bias_later:
            bias, node = parameters[count + index], nodes[count + index]
            dbs[index] = background.summed(plan.mesh, [bias], [node], dbs[index], over_rows, plan.label)
    dws = [(dw if wide else as_parameter(dw, weight)) if need else None for dw, weight, need in zip(dws, parameters, need_w, strict=False)]
    over_depth = background.all_reduced(plan.mesh.axes.depth, dtype=wanted[0].dtype if wide else None)
    for index, (weight, dw) in enumerate(zip(parameters, dws, strict=False)) if (behind or put_off or cast) and not keeps else ():
        if behind and dw is not None:
            dws[index] = background.behind(plan.mesh, [weight], [nodes[index]], dw, over_depth, plan.label)
        elif put_off and dw is not None:
            dw.copy_(gradients.sum_or_defer(plan.mesh, plan.mesh.axes.depth, weight, dw, partial(sum_over_depth, plan.mesh)))
        elif cast and dw is not None:
            dw.copy_(sum_over_depth(plan.mesh, dw))
    grads = [like(dw, weight) for dw, weight in zip(dws, parameters, strict=False)]
    biases = [like(as_parameter(db, bias), bias) for db, bias in zip(dbs, parameters[count:], strict=True)]
    return dx if dx is None or dx.shape == x.shape else dx.view(x.shape), None, None, None, *grads, *biases


def _linear_again(ctx: Any, cotangents: tuple[torch.Tensor | None, ...]) -> Any:
    """The gradients of a linear map that will be differentiated again: see second_order."""
    plan, count, (epilogue, dtype) = ctx.plan, ctx.count, ctx.call
    second_order.refuse_deferred(plan.label, plan.mesh, deferring(ctx.parameters))

    def compose(x: torch.Tensor, *blocks: torch.Tensor | None) -> list[torch.Tensor]:
        if dtype is not None:
            blocks = tuple(block.to(dtype) if block is not None and casts_to(block, dtype) else block for block in blocks)
        step = second_order.Unsummed(plan.step) if plan.mesh.axes.kept else plan.step
        ys = second_order.product(x, blocks[:count], step)  # type: ignore[arg-type]
        ys = tuple(y if b is None else y + _bias_here(plan, b, n) for y, b, n in zip(ys, blocks[count:], plan.n, strict=True))
        return [torch.nn.functional.gelu(y) if epilogue == "gelu" else y for y in ys]

    x, *_ = ctx.saved_tensors
    need_x, _, _, _, *needs = asked(ctx)
    dx, *found = second_order.replay(compose, (x, *ctx.parameters), (need_x, *needs), cotangents)
    return dx, None, None, None, *found


def _bias_here(plan: LinearPlan, bias: torch.Tensor, size: int) -> torch.Tensor:
    """The part of a bias block that y's features here take, its gradient summed over all who use the block."""
    mesh, layout, (stored,) = plan.mesh, plan.y[1], plan.bias_cuts
    (start, length), (origin, _) = mesh.interval(size, layout.features), mesh.interval(size, stored)
    users = (*layout.rows, *(name for name in layout.features if name not in stored))
    return second_order.shared(bias, mesh, users)[start - origin : start - origin + length]


def _traced_linear(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None], plan: LinearPlan, epilogue: str
) -> list[torch.Tensor]:
    present = [graph_ops.block_of(each) for each in (*weights, *biases) if each is not None]
    there = "".join("0" if bias is None else "1" for bias in biases)
    dtype = autocast_dtype(x)
    words = [plan.handles[0], epilogue, there, str(dtype).removeprefix("torch.") if dtype else ""]
    return traced("linear", words, [x, *present], len(plan.n))


def _linear_arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    plan, (x, *parameters) = graph_ops.find(words[0]), tensors
    biases = iter(parameters[len(plan.n) :])
    dtype = getattr(torch, words[3]) if words[3] else None
    return [x, plan, words[1], dtype, *parameters[: len(plan.n)], *(next(biases) if there == "1" else None for there in words[2])]


def _linear_results(words: list[str], tensors: list[torch.Tensor]) -> list[graph_ops.Meta]:
    x, plan, epilogue, dtype, *weights = _linear_arguments(words, tensors)
    rows = graph_ops.evenly(plan.mesh, x.shape[0], plan.x[1].rows, plan.y[1].rows)
    inner = x.shape[1:-1]
    found: list[graph_ops.Meta] = [([rows, *inner, n], x.dtype) for n in plan.n_local]
    found += [(list(weight.shape), dtype) for weight in weights[: len(plan.n)] if casts_to(weight, dtype)]
    if epilogue == "none":
        return found
    # before the epilogue, flat where the number of rows changes
    return [*found, *(([rows, *inner, n] if rows == x.shape[0] else [rows * prod(inner), n], x.dtype) for n in plan.n_local)]


def _weights_read(words: list[str], needs: Sequence[bool]) -> Sequence[int]:
    """Those that the gradient of x is made of; autocast reads copies."""
    return range(1, 1 + len(graph_ops.find(words[0]).n)) if needs[0] and not words[3] else ()


graph_ops.KNOWN["linear"] = graph_ops.Traced(_Linear, _linear_arguments, _linear_results, reads=_weights_read)
graph_ops.OUTPUTS["linear"] = lambda words: len(graph_ops.find(words[0]).n)


def _bias_gradient(plan: LinearPlan, dy: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The sums of dy's columns, made or left out by the rule of no_sync."""
    mesh, rows = plan.mesh, plan.y[1].rows
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    part = dy.sum(tuple(range(dy.dim() - 1)), dtype=dtype)
    return gradients.sum_or_defer(mesh, rows, bias, part, partial(background.all_reduced(rows), mesh.axis))


def _with_inner_dims(y: torch.Tensor, x: torch.Tensor, features: int) -> torch.Tensor:
    """Y's rows may come flat, [rows, features], where their number changes; the dims between are X's."""
    if x.dim() == 2:
        return y
    inner = x.shape[1:-1]
    rows = y.numel() // features if features else y.shape[:-1].numel()
    # a piece of a sequence may be empty
    return shaped(y, (rows // prod(inner) if prod(inner) else x.shape[0], *inner, features))
