"""Converted models on meshes with data, one behind another and in gradients of gradients: one process's numbers on the joined batch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gingham
from families import plain

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "2 x 1d 2": (4, dict(data=2, tensor=dict(size=2, mode="1d"))),
    "2 x 2d 4": (8, dict(data=2, tensor=dict(size=4, mode="2d"))),
    "3 x 1d 2, all": (6, dict(data=dict(size=3, shard="all"), tensor=dict(size=2, mode="1d"))),
    "2 x 1d 2, state": (4, dict(data=dict(size=2, shard="state"), tensor=dict(size=2, mode="1d"))),
}
ROWS = {2: (5, 3), 3: (4, 1, 2)}  # of each data rank
Models = list[Any]


def made() -> Models:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))]


def behind(models: Models, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(models[1](models[0](x)), y)


def twice(models: Models, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Called on its own output, as a recurrence."""
    return F.cross_entropy(models[1](models[0](models[0](x).relu())), y)


def penalty(models: Models, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of the gradient of each sample."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(models[1](models[0](x)).pow(2).sum(), x, create_graph=True)
    return F.cross_entropy(models[1](models[0](x)), y) + ((grad.norm(dim=1) - 1) ** 2).mean()


def frozen(models: Models, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Behind a model that does not train, as a perceptual loss."""
    for parameter in models[1].parameters():
        parameter.requires_grad_(False)
    return behind(models, x, y)


OBJECTIVES: dict[str, Callable[[Models, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    each.__name__: each for each in (behind, twice, penalty, frozen)
}


def hessian(models: Models, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """H g of the job's loss."""
    names, parameters = zip(*((f"{at}.{name}", p) for at, model in enumerate(models) for name, p in model.named_parameters()), strict=True)
    first = torch.autograd.grad(behind(models, x, y), parameters, create_graph=True)
    second = torch.autograd.grad(sum((each * each).sum() for each in first), parameters)
    return {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in zip(names, second, strict=True)}


def gradients(models: Models) -> dict[str, torch.Tensor]:
    found = {}
    for at, model in enumerate(models):
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            if grad is not None:
                found[f"{at}.{name}"] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def apart(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    assert found.keys() == truth.keys() and found
    scale = max(float(each.abs().max()) for each in truth.values())
    return max(float((found[name] - each).abs().max()) for name, each in truth.items()) / scale


def compared(rank: int, config: dict[str, Any], sizes: dict[int, tuple[int, ...]], compiled: bool) -> dict[str, float]:
    torch.set_default_dtype(torch.float64)
    try:
        mesh = gingham.init(parallel=config, timeout=60.0)
        rows = sizes[mesh.data.size]
        x, y = torch.randn(sum(rows), 8, generator=torch.Generator().manual_seed(1)), torch.arange(sum(rows)) % 4
        mine = [each.split(rows)[mesh.data.rank] for each in (x, y)]
        found = {}
        for name, objective in OBJECTIVES.items() if not compiled else (("behind", behind),):
            serial = made()
            models = [gingham.parallelize(copy.deepcopy(each), mesh) for each in serial]
            objective(serial, x, y).backward()
            objective([torch.compile(each, backend="aot_eager") for each in models] if compiled else models, *mine).backward()
            found[name] = apart(gradients(models), gradients(serial))
            if name == "behind" and not compiled:
                found["hessian"] = apart(hessian(models, *mine), hessian(serial, x, y))
                optimizers = [torch.optim.SGD([p for each in both for p in each.parameters()], 0.1) for both in (models, serial)]
                for optimizer in optimizers:
                    optimizer.step()
                found["step"] = max(apart(plain(model), plain(other)) for model, other in zip(models, serial, strict=True))
        return found
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["2 x 1d 2", *(pytest.param(each, marks=pytest.mark.matrix) for each in MESHES if each != "2 x 1d 2")])
def test_models_behind_one_another_and_second_gradients(ranks, name: str) -> None:
    size, config = MESHES[name]
    for found in ranks(size)(compared, config, ROWS, False):
        assert len(found) == 6 and all(error < 1e-11 for error in found.values()), found


def test_models_behind_one_another_in_compiled_graphs(ranks) -> None:
    size, config = MESHES["2 x 1d 2"]
    assert all(found["behind"] < 1e-11 for found in ranks(size)(compared, config, {2: (4, 4)}, True))
