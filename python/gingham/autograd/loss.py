"""The core's softmax cross-entropy of rows: forward, with one gather where ranks hold parts of the vocabulary, and the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import native
from ..mesh import Mesh
from ..mesh.layout import Names
from .indices import check_indices


@dataclass(frozen=True)
class Classes:
    """The columns first .. first + width of `vocabulary` that are here, and what the loss makes of them."""

    first: int
    width: int
    vocabulary: int
    ignored: int
    smoothing: float


def softmax_parts(mesh: Mesh, names: Names, logits: torch.Tensor, target: torch.Tensor, classes: Classes) -> torch.Tensor:
    """Of whole rows, [rows, 4] in float64: the largest logit m, the sum of exp(x - m), x - m of the target and, with smoothing, the sum of
    x - m. logits [rows, columns here], target [rows] int64; names: of the axes over which the vocabulary is cut."""
    # of a wrong target the sum is NaN, and with it its loss and its row's gradient
    check_indices(mesh, target, classes.vocabulary, classes.ignored, f"cross_entropy: rank {mesh.rank}: a target")
    part = native.loss_parts(
        mesh.program, _fitting(logits), target.contiguous(), classes.ignored, classes.first, classes.vocabulary, classes.smoothing
    )
    if mesh.axis(names) is None:
        return part
    # T and A travel as sums of x, since each rank's m is another
    mine = (target >= classes.first) & (target < classes.first + classes.width) & (target != classes.ignored)
    part[:, 2] += torch.where(mine, part[:, 0], 0.0)
    if classes.smoothing and classes.width:
        part[:, 3] += classes.width * part[:, 0]
    largest, exponentials, hit, whole = gather_parts(mesh, names, part).unbind(-1)
    top = largest.amax(0)
    total = torch.where(exponentials == 0, 0.0, exponentials * torch.exp(largest - top)).sum(0)
    less = classes.vocabulary * top if classes.smoothing else 0.0
    return torch.stack([top, total, torch.where(target != classes.ignored, hit.sum(0) - top, 0.0), whole.sum(0) - less], 1)


def losses_of(mesh: Mesh, parts: torch.Tensor, target: torch.Tensor, classes: Classes) -> tuple[torch.Tensor, torch.Tensor]:
    """Of softmax_parts: the rows' losses [rows], 0 where the target is ignored, and [sum of them, number of rows that count], float64."""
    rows, sums = native.loss_sums(mesh.program, parts, target.contiguous(), classes.ignored, classes.vocabulary, classes.smoothing)
    return rows[:, 0], sums.view(2)


def loss_gradient(
    mesh: Mesh, logits: torch.Tensor, parts: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, classes: Classes
) -> torch.Tensor:
    """The gradient of the logits where the rows' losses have the gradient `scale`, [1] or [rows] in float64."""
    return native.loss_gradient(
        mesh.program,
        _fitting(logits),
        parts,
        target.contiguous(),
        scale.contiguous(),
        classes.ignored,
        classes.first,
        classes.vocabulary,
        classes.smoothing,
    )


def gather_parts(mesh: Mesh, names: Names, part: torch.Tensor) -> torch.Tensor:
    """Every member's `part` [rows, ...], stacked, in an order that all members share, so that sums of it have the same bits."""
    axis = mesh.axis(names)
    return torch.stack(axis.all_gather(part, rows=part.shape[0])) if axis is not None else part.unsqueeze(0)


def _fitting(logits: torch.Tensor) -> torch.Tensor:
    return logits.resolve_neg().contiguous()
