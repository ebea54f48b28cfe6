"""Weights that stand whole over data while they are used, between uses of several kinds."""

import pytest
import torch

import gingham
from gingham import nn


def judged(rank: int, shard: str | None, write: str, judge: str) -> list[float]:
    """Losses of training with an evaluation after each step, while the last step's graph still lives."""
    mesh = gingham.init(parallel=dict(data=dict(size=2, shard=shard), tensor=dict(size=2, mode="1d")))
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.Linear(8, 16), torch.nn.ReLU(), nn.Linear(16, 6))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    x, y = torch.randn(8, 8), torch.arange(8) % 6
    losses = []
    for _ in range(4):
        loss = gingham.cross_entropy(model(mesh.scatter(x)), mesh.scatter(y))
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if write == "step":
            optimizer.step()
        else:
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-0.5)
        with getattr(torch, judge)():
            losses.append(gingham.cross_entropy(model(mesh.scatter(x)), mesh.scatter(y)).item())
    return losses


@pytest.mark.parametrize("judge", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("write", ["step", "data"])
def test_an_evaluation_between_steps_leaves_no_old_weights(ranks, write: str, judge: str) -> None:
    """Where weights stand whole over data, a use without gradients gathers them anew while the last step's are still held."""
    expected, *others = (ranks(4)(judged, shard, write, judge)[0] for shard in (None, "state", "all"))
    assert expected[2] < expected[0] and all(other == pytest.approx(expected, rel=1e-5) for other in others)
