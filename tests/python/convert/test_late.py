"""Parameters that are put into a converted model after parallelize: refused by name where nobody would sum their gradients (A7), taken
where a module had one of that name."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gingham
from families import plain
from grids import GRIDS, ranks_of, relative

SCALAR = torch.tensor(0.5)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.g = nn.Linear(6, 8), nn.Linear(8, 3, bias=False), 1.0
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.zeros(8))
        self.several = nn.ParameterList([torch.ones(8)])
        self.named = nn.ParameterDict({"one": torch.ones(8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).relu() * self.scale + self.shift
        for each in (*self.several, *self.named.values()):
            y = y * each
        return self.b(y) * self.g


def put(model: Any) -> None:
    del model.g
    model.g = nn.Parameter(SCALAR.clone())


def replaced_buffer(model: Any) -> None:
    del model.shift
    model.shift = nn.Parameter(torch.zeros(8))


def replaced(model: Any, value: torch.Tensor) -> None:
    """Also by way of what is no parameter, under a name that the model's code reads."""
    del model.scale
    with pytest.raises(AttributeError, match="scale"):
        model.scale  # noqa: B018
    model.scale = 1.0
    assert model.scale == 1.0
    del model.scale
    assert not hasattr(model, "scale")
    model.scale = value


REFUSED: dict[str, Callable[[Any], Any]] = {
    "g of Gated": put,
    "gate of Gated": lambda model: model.register_parameter("gate", nn.Parameter(SCALAR.clone())),
    "shift of Gated": replaced_buffer,
    "b.bias of Linear": lambda model: setattr(model.b, "bias", nn.Parameter(torch.zeros(3))),
    "several.1 of ParameterList": lambda model: model.several.append(nn.Parameter(torch.ones(8))),
    "named.two of ParameterDict": lambda model: model.named.update({"two": nn.Parameter(torch.ones(8))}),
    "a.gate of Linear": lambda model: model.a.register_parameter("gate", nn.Parameter(SCALAR.clone())),
}
TAKEN: dict[str, Callable[[Any], Any]] = {
    "scale": lambda model: setattr(model, "scale", nn.Parameter(torch.full((8,), 0.5))),
    "scale, deleted": lambda model: replaced(model, nn.Parameter(torch.full((8,), 0.5))),
    "scale, no parameter": lambda model: replaced(model, torch.full((8,), 0.5)),
    "scale, a buffer": lambda model: (delattr(model, "scale"), model.register_buffer("scale", torch.full((8,), 0.5))),
    "a weight": lambda model: setattr(model.a, "weight", nn.Parameter(torch.full((8, 6), 0.1))),
    "an entry": lambda model: model.several.__setitem__(0, nn.Parameter(torch.full((8,), 0.5))),
    "weight_norm": lambda model: nn.utils.parametrizations.weight_norm(model.a),
    "old weight_norm": lambda model: nn.utils.weight_norm(model.a),
    "assigned": lambda model: model.load_state_dict(
        {name: torch.full(x.shape, 0.3) for name, x in model.state_dict().items()}, assign=True
    ),
    "taken away": lambda model: model.named.pop("one"),
}


def built() -> Gated:
    torch.manual_seed(0)
    return Gated()


def late(rank: int, options: dict[str, Any], called: bool) -> tuple[dict[str, str], dict[str, float]]:
    mesh = gingham.init(**options)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    refused, errors = {}, {}
    for name, change in REFUSED.items():
        model = gingham.parallelize(built(), mesh)
        if called:
            model(x)
        change(model)
        with pytest.raises(NotImplementedError) as raised:
            model(x)
        refused[name] = str(raised.value)
        with pytest.raises(NotImplementedError):
            copy.deepcopy(model)(x)
    for name, change in TAKEN.items():
        models: list[Any] = [gingham.parallelize(built(), mesh), built()]
        outputs = []
        for model in models:
            if called:
                model(x)
            change(model)
            outputs.append(model(x))
            outputs[-1].square().sum().backward()
        errors[name] = relative(*outputs)
        got, expected = (plain(model) for model in models)
        errors[name] = max(errors[name], *(relative(got[each], expected[each]) for each in expected))
    return refused, errors


@pytest.mark.parametrize("called", [False, True], ids=["before any call", "after a call"])
@pytest.mark.parametrize("name", ["2d", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("2.5d", "3d"))])
def test_a7_a_late_parameter_is_named_and_one_of_a_known_name_is_taken(ranks, name: str, called: bool) -> None:
    for refused, errors in ranks(ranks_of(name))(late, GRIDS[name], called):
        for what, message in refused.items():
            assert message.startswith(f"{what} was put into the model after parallelize") and "put it in before" in message, (what, message)
        assert max(errors.values()) < 1e-5, errors
