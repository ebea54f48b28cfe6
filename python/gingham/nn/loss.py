"""Cross-entropy and accuracy of logits whose vocabulary lies on several ranks, without gathering them."""

from __future__ import annotations

from typing import Any

import torch

from ..autograd.casts import autocast_dtype
from ..autograd.indices import refuse_indices
from ..autograd.loss import Classes, gather_parts, loss_gradient, losses_of, softmax_parts
from ..autograd.relayout import relayout
from ..autograd.second_order import replay, shaped, summed
from ..checks import cuts_of_block, row_dim
from ..errors import ShapeError
from ..function import Function
from ..graph_ops import KNOWN, OUTPUTS, Meta, Traced, find, traced
from ..mesh import Mesh, check_local, current
from ..mesh.checksums import digest_of
from ..mesh.layout import Interval, Layout, Names, blocks_from_shapes


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    mesh: Mesh | None = None,
    layout: str = "outer",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch.nn.functional.cross_entropy of local logits [..., vocabulary] (last dim, unlike torch) and targets [...].

    Targets are cut like the logits' rows, or like outer's: mesh.scatter(target). "mean" and "sum" run over all rows of
    the job and are the same number on every rank; "none" gives the losses of the targets given. One all-gather over the
    feature axes of (maximum, sum of exponentials, target's logit, sum of logits), 32 bytes a row, and one of (sum,
    count), 16 bytes, over the row axes; targets in other rows than the logits are gathered too. Backward moves nothing.
    "mean" over no target at all is nan, as in torch. In a torch.autocast region 16-bit logits give a float32
    loss. weight: of each class, the full vector [vocabulary] on every rank; the loss is then made of sums in float64, with two more
    passes over the logits and messages of 8 bytes a row. Raises ShapeError where logits, targets and weight do not fit,
    NotImplementedError for weight in a compiled graph.
    """
    mesh = current(mesh)
    checks = mesh.checks
    if checks is not None:
        logits, target = _taken(checks, mesh, logits, target, layout, "cross_entropy")
    target, moved, given, needed = _fitting(logits, target, mesh, layout, "cross_entropy")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean', 'sum' or 'none'")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing}: expected a number from 0 to 1")
    if logits.dtype.itemsize == 2 and autocast_dtype(logits) is not None:
        logits = logits.float()
    if weight is not None:
        losses, total = _weighted(logits, target, weight, mesh, layout, ignore_index, label_smoothing, reduction)
    elif torch.compiler.is_compiling():
        words = [mesh.handle, layout, str(ignore_index), str(label_smoothing), reduction]
        losses, total = traced("cross_entropy", words, [logits, target], 2)
    else:
        losses, total = _CrossEntropy.apply(logits, target, mesh, layout, ignore_index, label_smoothing, reduction)
    if reduction != "none":
        return total
    return relayout(losses.unsqueeze(-1), mesh, needed, given, 1).squeeze(-1) if moved else losses


def _weighted(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    mesh: Mesh,
    layout: str,
    ignored: int,
    smoothing: float,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target's loss (1-s) w_t (z - x_t) + s/V sum of w_c (z - x_c), z the logarithm of the sum of exponentials, of which the
    function without weights gives z - x_t and, smoothed by 1, z - sum of x_c / V; and their sum, or mean by the targets' weights."""
    if torch.compiler.is_compiling():
        raise NotImplementedError("cross_entropy: weight= in a compiled graph; take it out of the compiled part")
    check_local(weight, "cross_entropy's weight", mesh)
    named, wide = mesh.layout(layout), logits.double()
    made_of = f"weight of {digest_of(weight):08x}"
    label = f"cross_entropy({layout=}, ignore_index={ignored}, label_smoothing={smoothing}, {reduction=}, {made_of})"
    (start, width), vocabulary = _columns(mesh, named, target.numel(), logits.shape[-1], label)
    if tuple(weight.shape) != (vocabulary,):
        raise ShapeError(f"cross_entropy: rank {mesh.rank} got weight {tuple(weight.shape)}, expected the full one, [{vocabulary}]")
    kept = target != ignored
    weights = torch.where(kept, weight.double()[target.masked_fill(~kept, 0)], 0.0)
    losses, _ = _CrossEntropy.apply(wide, target, mesh, layout, ignored, 0.0, "none")
    losses = (1 - smoothing) * weights * losses
    if smoothing:
        even, _ = _CrossEntropy.apply(wide, target, mesh, layout, ignored, 1.0, "none")
        here = weight.double()[start : start + width]
        sums = summed(torch.stack([wide.sum(-1), (wide * here).sum(-1)]), mesh, named.features)
        spread = weight.double().sum() * (even + sums[0] / vocabulary) - sums[1]
        losses = losses + torch.where(kept, smoothing / vocabulary * spread, 0.0)
    if reduction == "none":
        return losses.to(logits.dtype), losses.sum()
    total = summed(losses.sum(), mesh, named.rows)
    if reduction == "mean":
        total = total / summed(weights.sum(), mesh, named.rows)
    return losses, total.to(logits.dtype)


def _columns(mesh: Mesh, named: Layout, rows: int, width: int, label: str) -> tuple[Interval, int]:
    """(first, number) of this rank's columns of the vocabulary, and its size: a control message among those who hold the other columns,
    and one among those who hold the same block. Who holds other rows is told the vocabulary with the next call's label."""
    same = tuple(name for name in mesh.sizes if name not in (*named.rows, *named.features))
    for axis in mesh.axes_over(same):
        mesh.say(label)
        told = axis.sizes([rows, width])
        if any(each != told[0] for each in told):
            raise ShapeError(f"{label}: ranks that hold the same rows and columns have [rows, columns] {told}")
    sizes = {name: size for name, size in mesh.sizes.items() if name in named.features}
    across = mesh.axis(tuple(sizes))
    mesh.say(label, moves=across is not None)
    mine, vocabulary = (0, width), width
    if across is not None:
        (vocabulary,), blocks = blocks_from_shapes(across.sizes([width]), (named.features,), sizes)
        (mine,) = blocks[across.rank]
    mesh.say(f"{label} of {vocabulary} classes", moves=across is not None)
    return mine, vocabulary


def _fitting(logits: torch.Tensor, target: torch.Tensor, mesh: Mesh, layout: str, name: str) -> tuple[torch.Tensor, bool, Layout, Layout]:
    """The target in the logits' rows, whether it was moved there, and from which rows to which."""
    check_local(logits, f"{name}'s logits", mesh)
    check_local(target, f"{name}'s target", mesh)
    given, needed = (Layout(rows, ()) for rows in (mesh.outer.rows, mesh.layout(layout).rows))
    if target.is_floating_point():
        raise TypeError(f"{name}: target is {target.dtype}, expected class indices of an integer dtype")
    apart = tuple(name for name in given.rows if name not in needed.rows)
    moved = target.dim() > 0 and logits.dim() > 1 and given != needed and _cut_as(target, logits, mesh, given, apart)
    if moved:
        target = relayout(target.unsqueeze(-1), mesh, given, needed, 1).squeeze(-1)
    if logits.dim() < 1 or logits.shape[:-1] != target.shape:
        full = logits.dim() == target.dim() + 1 > 1 and target.shape[0] > logits.shape[0]
        raise ShapeError(
            f"{name}: rank {mesh.rank} got logits {tuple(logits.shape)} and target {tuple(target.shape)}; expected [..., V] and [...]"
            + ("; full labels? mesh.scatter(target) gives this rank's" if full else "")
        )
    return target, moved, given, needed


def _taken(checks: Any, mesh: Mesh, logits: Any, target: Any, layout: str, what: str) -> tuple[Any, Any]:
    """The plain tensors, if they lie where the first step's check expects them."""
    given = mesh.layout(layout)
    dim = row_dim(logits, given) if mesh.outer.rows == mesh.inner.rows else 0
    expected = cuts_of_block(given, logits.dim(), dim) if isinstance(logits, torch.Tensor) else None
    fix = f"name the logits' layout: {what}(logits, target, layout='inner') after a Linear that ends in inner or a Classifier"
    return checks.take(logits, expected, f"{what}(layout={layout!r})", fix), checks.take(target, None, what)


def _cut_as(target: torch.Tensor, logits: torch.Tensor, mesh: Mesh, given: Layout, apart: Names) -> bool:
    """Whether the ranks of `given` have pieces of the logits' rows, told by the sizes of all along `apart`, over which the logits' rows
    are not cut: one rank's may fit by chance."""
    if torch.compiler.is_compiling():
        return target.shape[0] * mesh.parts(given.rows) == logits.shape[0]
    axes = mesh.axes_over(apart or given.rows)
    if not axes:
        return target.shape != logits.shape[:-1]
    counts = [count for axis in axes for (count,) in axis.sizes([len(target)])]
    return any(count != logits.shape[0] for count in counts)


@torch.no_grad()
def accuracy(
    logits: torch.Tensor,
    target: torch.Tensor,
    mesh: Mesh | None = None,
    layout: str = "outer",
    ignore_index: int = -100,
    top_k: int = 1,
) -> torch.Tensor:
    """The fraction of all rows of the job whose target is among the top_k largest logits, [] float64, the same number on
    every rank; nan where every target is ignored.

    Ties go to the lowest index and nan counts as the largest, as torch.argmax decides on whole logits. Arguments as
    cross_entropy's. One all-gather over the feature axes of the target's logit, 8 bytes a row, one of how many lie
    before it, 8 bytes a row, and one of (right, count), 16 bytes, over the row axes. Raises ShapeError as cross_entropy.
    """
    mesh = current(mesh)
    if mesh.checks is not None:
        logits, target = _taken(mesh.checks, mesh, logits, target, layout, "accuracy")
    target, *_ = _fitting(logits, target, mesh, layout, "accuracy")
    if torch.compiler.is_compiling():
        return traced("accuracy", [mesh.handle, layout, str(ignore_index), str(top_k)], [logits, target])[0]
    right: torch.Tensor = _Accuracy.apply(logits, target, mesh, layout, ignore_index, top_k)
    return right


class _Accuracy(Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, mesh: Mesh, layout: str, ignore_index: int, top_k: int) -> Any:
        named = mesh.layout(layout)
        x, target = logits.reshape(target.numel(), logits.shape[-1]).double(), target.reshape(-1).long()
        x = torch.nan_to_num(x, nan=torch.inf, posinf=torch.finfo(x.dtype).max, neginf=-torch.inf)
        label = f"accuracy({layout=}, {ignore_index=}, {top_k=})"
        (start, width), vocabulary = _columns(mesh, named, target.numel(), logits.shape[-1], label)
        refuse_indices(mesh, target, vocabulary, ignore_index, f"accuracy: rank {mesh.rank}: a target")
        kept = target != ignore_index
        mine = (target >= start) & (target < start + width)
        column = torch.where(mine, target - start, 0).unsqueeze(1)
        held = torch.where(mine, x.gather(1, column).squeeze(1), -torch.inf) if width else x.new_full((len(x),), -torch.inf)
        score = gather_parts(mesh, named.features, held).amax(0).unsqueeze(1)
        earlier = torch.arange(start, start + width, device=x.device) < target.unsqueeze(1)
        before = ((x > score) | ((x == score) & earlier)).sum(1)
        before = gather_parts(mesh, named.features, before).sum(0)
        right = (before < top_k) & kept
        summed = gather_parts(mesh, named.rows, torch.stack([right.sum(), kept.sum()]).double()).sum(0)
        return summed[0] / summed[1]


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, mesh: Mesh, layout: str, ignored: int, smoothing: float, reduction: str
    ) -> Any:
        named, target_shape, given = mesh.layout(layout), target.shape, target
        x, target = logits.reshape(target.numel(), logits.shape[-1]), target.reshape(-1).long()
        label = f"cross_entropy({layout=}, ignore_index={ignored}, label_smoothing={smoothing}, {reduction=})"
        (start, width), vocabulary = _columns(mesh, named, target.numel(), logits.shape[-1], label)
        ctx.classes = Classes(start, width, vocabulary, ignored, smoothing)
        parts = softmax_parts(mesh, named.features, x, target, ctx.classes)
        losses, sums = losses_of(mesh, parts, target, ctx.classes)
        total, counted = gather_parts(mesh, named.rows, sums).sum(0)
        divisor = counted if reduction == "mean" else torch.ones_like(counted)
        ctx.reduction, ctx.mesh, ctx.layout, ctx.shape = reduction, mesh, layout, target_shape
        ctx.save_for_backward(logits, given, parts, divisor)
        return shaped(losses.to(logits.dtype), target_shape), (total / divisor).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, d_losses: torch.Tensor, d_total: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            return _again(ctx, d_losses, d_total)
        logits, target, parts, divisor = ctx.saved_tensors
        ids = target.reshape(-1).long()
        scale = d_losses.reshape(-1).double() if ctx.reduction == "none" else (d_total.double() / divisor).reshape(1)
        grad = loss_gradient(ctx.mesh, logits.reshape(len(ids), logits.shape[-1]), parts, ids, scale, ctx.classes)
        return grad.view(logits.shape), *[None] * 6


def _again(ctx: Any, d_losses: torch.Tensor, d_total: torch.Tensor) -> Any:
    """The gradient of the logits as one that has gradients itself."""
    logits, target, parts, divisor = ctx.saved_tensors
    mesh, named, classes, ids = ctx.mesh, ctx.mesh.layout(ctx.layout), ctx.classes, target.reshape(-1).long()
    normaliser, kept = parts[:, 0] + parts[:, 1].log(), ids != classes.ignored
    hit = kept & (ids >= classes.first) & (ids < classes.first + classes.width)
    column = torch.where(hit, ids - classes.first, 0).unsqueeze(1)

    def compose(logits: torch.Tensor) -> list[torch.Tensor]:
        x = logits.reshape(len(kept), logits.shape[-1]).double()
        # relative to each row's normaliser as it was, so that no exponential overflows
        exponentials = torch.exp(x - normaliser.unsqueeze(1)).sum(1)
        target = torch.where(hit, x.gather(1, column).squeeze(1), 0.0) if x.shape[1] else x.sum(1)
        sums = summed(torch.stack([exponentials, target, x.sum(1)]), mesh, named.features)
        smoothing = classes.smoothing
        losses = normaliser + sums[0].log() - (1 - smoothing) * sums[1] - smoothing / classes.vocabulary * sums[2]
        losses = torch.where(kept, losses, 0.0)
        total = summed(losses.sum(), mesh, named.rows) / divisor
        return [losses.to(logits.dtype).view(ctx.shape), total.to(logits.dtype)]

    return *replay(compose, [logits], [True], [d_losses, d_total]), *[None] * 6


def _arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    return [*tensors, find(words[0]), words[1], int(words[2]), float(words[3]), words[4]]


def _results(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    logits, target = tensors
    outputs = [(target.shape, logits.dtype), ((), logits.dtype)]
    return [*outputs, ((target.numel(), 4), torch.float64), ((), torch.float64)]


KNOWN["cross_entropy"] = Traced(_CrossEntropy, _arguments, _results)
OUTPUTS["cross_entropy"] = lambda words: 2
KNOWN["accuracy"] = Traced(
    _Accuracy,
    lambda words, tensors: [*tensors, find(words[0]), words[1], int(words[2]), int(words[3])],
    lambda words, tensors: [((), torch.float64)],
    saves=False,
)
