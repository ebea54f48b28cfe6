"""What a rank keeps of a model whose weights are cut over data: parameters, gradients and the optimizer's states."""

from typing import Any

import pytest
import torch

import gingham
from gingham.commands.gpt import GPT, Shape, parallel_kit
from gingham.mesh.modes import GridShape, axes_of
from grids import TENSOR


def held_at_rest(rank: int, config: dict[str, Any]) -> float:
    """Parameters, gradients and AdamW's states of a GPT of width 256 on this rank, as a part of all."""
    mesh = gingham.init(parallel=config)
    model = GPT(parallel_kit(mesh), Shape(layers=2, width=256, heads=8, context=16, dropout=0.0))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(256, (16, 17), generator=torch.Generator().manual_seed(1))
    model.loss(model(mesh.scatter(tokens[:, :-1].contiguous())), mesh.scatter(tokens[:, 1:].contiguous())).backward()
    optimizer.step()
    held = 0
    for parameter in model.parameters():
        states = [value for name, value in optimizer.state[parameter].items() if name != "step"]
        held += sum(each.to_local().numel() for each in (parameter, parameter.grad, *states))
    return held / (4 * sum(parameter.numel() for parameter in model.parameters()))


@pytest.mark.matrix
@pytest.mark.parametrize("name", TENSOR)
def test_memory_at_rest_with_cut_weights(ranks, name: str) -> None:
    """Within 1.1 of a part for each rank; where depth holds replicas, of each of its lines."""
    size = TENSOR[name][0] * 2
    axes = axes_of(**{"mode": None, **TENSOR[name][1]}, data=2, shard="all")
    replicas = GridShape(axes).parts(axes.depth)
    assert max(ranks(size)(held_at_rest, dict(data=dict(size=2, shard="all"), tensor=TENSOR[name][1]))) <= 1.1 * replicas / size
