"""gingham.check beside the original model, and gingham.check_replicas over the ranks (A6, A8)."""

import copy
from typing import Any

import pytest
import torch

import gingham
from families import batch, build
from grids import GRIDS


def families(rank: int, options: dict[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    mesh = gingham.init(**options)
    worst = {}
    for family in names:
        model = gingham.parallelize(build(family, dropout=0.1), mesh)
        model.train()
        before = {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}
        report = gingham.check(model, **batch(family))
        assert model.training and all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(parameter.full_tensor(), before[name]) for name, parameter in model.named_parameters())
        assert "loss" in report and "logits" in report and sum(name.startswith("gradient") for name in report) >= 20
        worst[family] = max(report.values())
    return worst


def test_converted_models_are_their_originals(ranks) -> None:
    for worst in ranks(4)(families, GRIDS["2d"], ("gpt2", "llama", "bert", "vit")):
        assert max(worst.values()) <= 1e-5, worst


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def differing(rank: int) -> tuple[str, str, dict[str, float], str]:
    mesh = gingham.init(**GRIDS["2d"])
    torch.manual_seed(0)
    original = Net()
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    good = gingham.check(model, torch.randn(8, 8), original=original)
    # another formula behind the weights that both have
    model.second.register_forward_hook(lambda module, args, y: y * 1.5)
    with pytest.raises(gingham.MeshError) as caught:
        gingham.check(model, torch.randn(8, 8), original=original)
    with pytest.raises(ValueError, match="original=") as missing:
        gingham.check(model, torch.randn(8, 8))
    return caught.value.where, str(caught.value), good, str(missing.value)


def test_the_first_module_that_differs_is_named(ranks) -> None:
    for where, text, good, _ in ranks(4)(differing):
        assert where == "second" and "'second'" in text and "output by 0.5" in text, text
        assert max(good.values()) <= 1e-6


KINDS = ("nothing", "weight", "bias", "buffer", "state", "learning rate", "skipped step", "other optimizer")


def replicas(rank: int, kind: str) -> str:
    mesh = gingham.init(**GRIDS["2.5d"])
    torch.manual_seed(0)
    model = torch.nn.Sequential(gingham.nn.Linear(8, 8), gingham.nn.LayerNorm(8))
    model.register_buffer("mean", torch.zeros(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    odd = rank == 6
    for step in range(2):
        optimizer.zero_grad()
        model(mesh.scatter(torch.randn(8, 8, generator=torch.Generator().manual_seed(step)))).sum().backward()
        if kind == "learning rate" and odd:
            optimizer.param_groups[0]["lr"] = 0.2
        if not (kind == "skipped step" and odd and step == 1):
            optimizer.step()
    with torch.no_grad():
        if odd and kind in ("weight", "bias"):
            getattr(model[0], kind).to_local().view(-1)[0] += 1e-6
        if odd and kind == "buffer":
            model.mean[1] = 1
        if odd and kind == "state":
            optimizer.state[model[1].weight]["exp_avg"].to_local()[0] += 1
    if odd and kind == "other optimizer":
        optimizer = None
    try:
        gingham.check_replicas(model, optimizer)
        return ""
    except gingham.MeshError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_a6_copies_that_differ_name_the_rank(ranks, kind: str) -> None:
    for text in ranks(8)(replicas, kind):
        assert (text == "") == (kind == "nothing") and (kind == "nothing" or "ranks [6]" in text), text
