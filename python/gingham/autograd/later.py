"""Backward in two halves, for the schedules of pipelines that fill their idle time with products of weights' gradients.

Inside gradients.weights_later() a linear's backward makes dX alone and leaves dW = X^T dY to a function that is called later. Every
product is made once and every byte sent once: a linear whose dY must be gathered for both (it stands cut over the axes of the sum)
makes both at once, as does one whose weight is not a parameter, as in compiled graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from . import gradients
from .casts import as_parameter, like


def split(
    plan: Any,
    parameters: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    dys: Sequence[torch.Tensor],
    needs: Sequence[bool],
) -> bool:
    """Whether the gradients of the weights that `needs` names have been put off."""
    found = gradients.put_off
    mine = [weight for weight, need in zip(parameters, needs, strict=False) if need]
    if found is None or not mine or _gathers_dy(plan) or not all(isinstance(each, torch.nn.Parameter) for each in mine):
        return False
    found.append(partial(_make, plan, parameters, x, weights, dys, needs))
    return True


def _gathers_dy(plan: Any) -> bool:
    mesh, layout = plan.mesh, plan.y[1]
    names = set(mesh.axes.n if plan.swapped else mesh.axes.k)
    return mesh.parts(tuple(names)) > 1 and (names <= set(layout.features) or names <= set(layout.rows))


@torch.no_grad()
def _make(
    plan: Any,
    parameters: Sequence[Any],
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    dys: Sequence[torch.Tensor],
    needs: Sequence[bool],
) -> None:
    count, mesh = len(plan.n), plan.mesh
    mesh.say(plan.label)
    _, dws, _ = plan.step.backward(x, weights, dys, False, True, [False] * count, False)
    for weight, dw, need in zip(parameters, dws, needs, strict=False):
        if not need:
            continue
        part: Any = as_parameter(dw, weight)
        total = gradients.sum_or_defer(mesh, mesh.axes.depth, weight, part, partial(gradients.sum_over_depth, mesh))
        torch.autograd.backward(weight, like(total, weight))  # with the hooks of its accumulation
