"""Pipelines whose layers' outputs are written to after they were given on: the next stage has what they were, as in one process."""

from typing import Any

import pytest
import torch

import gingham
from gingham import nn


class Reusing(torch.nn.Module):
    """Gives the same memory at each call outside of training, as a layer with a buffer of its own does."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self.mesh, self.room = mesh, dict[Any, torch.Tensor]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return x * 2
        room = self.room.get(x.shape)
        if room is None:
            room = self.room[x.shape] = torch.empty_like(x) if self.mesh is None else self.mesh.empty(x.shape, x.dtype)
        return torch.mul(x, 2, out=room)


def writing(mesh: Any) -> torch.nn.Sequential:
    """Layers whose outputs are written to after they were given on, where no gradients are asked for: by hooks that add them up in the
    first one's memory, and by Reusing."""
    torch.manual_seed(1)
    linear = torch.nn.Linear if mesh is None else nn.Linear
    layers = torch.nn.Sequential(*(each for _ in range(4) for each in (linear(8, 8, dtype=torch.float64), Reusing(mesh))))
    totals = dict[torch.nn.Module, torch.Tensor]()

    def add(module: torch.nn.Module, _: Any, y: torch.Tensor) -> None:
        if not module.training:  # else autograd refuses, as it needs them
            totals[module] = totals[module].add_(y) if module in totals else y

    for each in layers[::2]:
        each.register_forward_hook(add)
    return layers


def square(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).square().mean()


ROWS = torch.randn(8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def wrote(rank: int, schedule: str) -> list[float]:
    mesh = gingham.init(parallel=dict(pipeline=2), timeout=30.0)
    model = gingham.pipeline(writing(mesh), mesh, 4, schedule, loss=square)
    return [model.step(ROWS, ROWS.flip(0)).item(), model.eval().eval_step(ROWS, ROWS.flip(0)).item()]


@pytest.mark.parametrize(
    "schedule", ["1f1b", "zbv", *(pytest.param(each, marks=pytest.mark.matrix) for each in ("gpipe", "interleaved", "dual"))]
)
def test_outputs_that_are_written_to_after_they_were_given_on(ranks, schedule: str) -> None:
    model, losses = writing(None), []
    for train in (True, False):
        pairs = zip(ROWS.split(2), ROWS.flip(0).split(2), strict=True)
        with torch.set_grad_enabled(train):
            losses.append(sum(square(model.train(train)(x), target).item() for x, target in pairs) / 4)
    for answer in ranks(2)(wrote, schedule):
        assert answer == pytest.approx(losses, rel=1e-12)
