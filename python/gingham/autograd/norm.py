"""The core's normalisation of rows: forward, and the gradients, each with one gather where ranks hold parts of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import native
from ..mesh import Mesh

Weights = Sequence[torch.Tensor | None]


def normalise(
    mesh: Mesh,
    axis: native.Axis | None,
    counts: Sequence[int],
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = (x - mean) / sqrt(mean square + eps) gamma + beta of x [..., features here] and, [..., 2] in float64, the rows' means and
    summed squares about them (not centred: 0 and the summed squares). axis: over whom the features are cut, into counts; None: nobody."""
    (given,), (gamma, beta) = _fitting(x, (gamma, beta))
    parts: list[torch.Tensor] = []
    if axis is not None:
        mine = native.norm_statistics(mesh.program, given, centred)
        parts = axis.all_gather(mine, rows=mine.shape[0])
    y, statistics = native.norm_forward(mesh.program, given, parts, counts if parts else (), gamma, beta, eps, centred)
    return y if y.dtype == x.dtype else y.to(x.dtype), statistics


def norm_gradients(
    mesh: Mesh,
    axis: native.Axis | None,
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    gamma: torch.Tensor | None,
    features: int,
    eps: float,
    centred: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What normalise's x, gamma and beta need: dx, and this rank's sums for dgamma and dbeta, a row for each that is asked for, in float32
    or float64."""
    (given, slope), (gamma,) = _fitting(x, (gamma,), dy)
    pieces: list[torch.Tensor] = []
    if axis is not None and needs[0]:
        mine = native.norm_pieces(mesh.program, slope, given, statistics, gamma, features, eps, centred)
        pieces = axis.all_gather(mine, rows=mine.shape[0])
    dx, sums = native.norm_backward(mesh.program, slope, given, statistics, pieces, gamma, features, eps, centred, *needs)
    return None if dx is None else dx if dx.dtype == x.dtype else dx.to(x.dtype), sums


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """In which sums of that dtype are kept."""
    return dtype if dtype == torch.float64 else torch.float32


def _fitting(x: torch.Tensor, weights: Weights, *others: torch.Tensor) -> tuple[list[torch.Tensor], Weights]:
    """x and the others, contiguous, and the weights in dtypes that the kernels take together."""
    given = [x, *others]
    if any(each is not None and each.dtype != x.dtype for each in weights):
        weights = [None if each is None else each.to(wide_of(x.dtype)) for each in weights]
        if x.device.type != "cpu":  # kernels of GPUs take one dtype
            given = [each.to(wide_of(x.dtype)) for each in given]
    return [each.resolve_neg().contiguous() for each in given], weights
