"""Plain parameters in an optimizer of a mesh's: the same gradients on every rank, or an error that names them."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gingham

DATA = dict(parallel=dict(data=2, tensor=dict(size=2, mode="1d")))
GRIDS: dict[str, dict[str, Any]] = {"1d": dict(mode="1d", size=4), "2d": dict(mode="2d", size=4), "data": DATA}


def trained(rank: int, name: str, how: str, kind: str = "SGD") -> Any:
    """A plain head behind a converted body; on a mesh with data each data rank has samples of its own."""
    torch.manual_seed(0)
    mesh = gingham.init(**GRIDS[name])
    original = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    serial = [original, nn.Sequential(nn.Linear(8, 3), *(nn.Linear(3, 3) for _ in range(4)))]
    models = [gingham.parallelize(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), mesh), copy.deepcopy(serial[1])]
    models[0].load_state_dict(original.state_dict())
    norms = []
    for (body, head), own in ((serial, False), (models, name == "data")):
        named = [*body.named_parameters(prefix="body"), *head.named_parameters(prefix="head")]
        optimizer = getattr(torch.optim, kind)(named, lr=0.5)
        for step in range(3):
            x, y = torch.randn(8, 8, generator=torch.Generator().manual_seed(step)), torch.arange(8) % 3
            if own:
                x, y = (each.chunk(2)[mesh.coordinates["data"]] for each in (x, y))
            optimizer.zero_grad()
            F.cross_entropy(head(body(x)), y).backward()
            if own and how == "averaged":
                for p in head.parameters():
                    p.grad = torch.stack(mesh.joint(("data",)).all_gather(p.grad.flatten())).mean(0).view(p.shape)
            try:
                optimizer.step()
            except gingham.MeshError as error:
                return str(error)
        norms.append(float(head[0].weight.detach().norm()))
    return abs(norms[0] - norms[1])


@pytest.mark.parametrize("name", ["1d", "2d"])
def test_behind_whole_outputs_they_train_as_in_one_process(ranks, name: str) -> None:
    assert all(found < 1e-5 for found in ranks(4)(trained, name, ""))


@pytest.mark.parametrize("kind", ["SGD", "Adafactor"])
def test_of_a_data_ranks_own_samples_they_are_named(ranks, kind: str) -> None:
    for said in ranks(4)(trained, "data", "", kind):
        assert said.startswith(f"{kind}.step: head.0.weight, a plain tensor of shape (3, 8)") and "on rank 0 and" in said, said


def test_averaged_by_the_caller_they_train_as_in_one_process(ranks) -> None:
    assert all(found < 1e-5 for found in ranks(4)(trained, "data", "averaged"))
