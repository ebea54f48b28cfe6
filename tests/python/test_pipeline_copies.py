"""Copies of pipelined models: moving averages of what was copied before the cut; what a copy after it says."""

import copy
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gingham
from gingham import nn
from grids import relative


def averaged(mesh: Any) -> tuple[list[torch.Tensor], list[str]]:
    """Outputs of a model after some steps and of its moving average, which was copied before the cut; what a copy after it raises."""
    torch.manual_seed(0)
    kit: Any = torch.nn if mesh is None else nn
    options: dict[str, Any] = dict(dtype=torch.float64)
    layers = [kit.Embedding(12, 8, **options), kit.Linear(8, 8, **options), torch.nn.Tanh(), kit.Linear(8, 12, **options)]
    model: Any = torch.nn.Sequential(*layers)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ids = torch.arange(40).view(8, 5) % 12
    if mesh is not None:
        gingham.pipeline(model, mesh, 2)
        gingham.pipeline(average.module, mesh, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        if mesh is None:
            torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        else:
            model.step(ids, ids)
        optimizer.step()
        average.update_parameters(model)
    said = []
    for each in (copy.deepcopy, AveragedModel):
        try:
            made: Any = each(model)
            assert torch.equal(made(ids), model(ids))
        except NotImplementedError as error:
            said.append(str(error))
    return [model(ids).detach(), average(ids).detach()], said


def averaged_on(rank: int, options: dict[str, Any]) -> Any:
    return averaged(gingham.init(**options))


def test_moving_averages_of_a_pipeline_are_copied_before_the_cut(ranks) -> None:
    wanted, _ = averaged(None)
    for options in (dict(parallel=dict(pipeline=2, tensor=dict(size=1, mode="1d"))), dict(mode="1d", size=2)):
        for rank, (found, said) in enumerate(ranks(2)(averaged_on, options)):
            assert all(relative(*pair) < 1e-12 for pair in zip(found, wanted, strict=True))
            assert len(said) == (2 if "parallel" in options else 0)
            for words in said:
                assert f"rank {rank} has one stage" in words and "expected the copy before the cut" in words, words
