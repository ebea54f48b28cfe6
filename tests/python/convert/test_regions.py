"""Chains and stacks inside of a user's own model: called whole, in parts, layer by layer, or with modules around them that only hand on."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import gingham
from families import Around, errors, plain
from grids import GRIDS, ranks_of, relative

SEQUENCE = dict(mode="1d", size=4, sequence=True)


def chain() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))


def encoder(batch_first: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = chain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * 1.5


class Loop(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.net:
            x = layer(x)
        return x * 1.5


class Parts(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net[2](self.net[:2](x).sigmoid())
        return self.net[3](y) + self.net(x)


class Samples(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.net(each) for each in x])


class Checkpointed(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_sequential(self.net, 2, x, use_reentrant=False) * 1.5


class TimeFirst(nn.Module):
    """torch's default: the batch is the second dim."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = encoder(False), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.encoder(x.transpose(0, 1), mask=mask).mean(0))


class Translated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = nn.Transformer(8, 4, 1, 1, 16, 0.0), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.both(x.transpose(0, 1), 0.5 * x[:, 1:].transpose(0, 1)).transpose(0, 1))


class Layers(nn.Module):
    """What stands between the layers of a stack."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.encoder, self.head, self.first = encoder(batch_first), nn.Linear(8, 3), batch_first

    def forward(self, x: torch.Tensor) -> Any:
        x, seen = x if self.first else x.transpose(0, 1), []
        for layer in self.encoder.layers:
            x = layer(x)
            seen.append((x if self.first else x.transpose(0, 1)) * 0.5)
        return self.head(seen[-1].mean(1)), seen


KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "a wrapper of a chain": (lambda: Around(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))), (5, 6)),
    "two wrappers": (lambda: Around(Around(chain())), (5, 6)),
    "a wrapper of a stack": (lambda: Around(encoder(True)), (5, 7, 8)),
    "a wrapper, time first": (lambda: Around(encoder(False)), (7, 5, 8)),
    "called whole": (Chain, (5, 6)),
    "a loop": (Loop, (5, 6)),
    "a loop, three dims": (Loop, (5, 2, 6)),
    "parts": (Parts, (5, 6)),
    "samples": (Samples, (4, 6)),  # not where rows are cut before a layer and gathered in it
    "checkpointed": (Checkpointed, (5, 6)),
    "time first": (TimeFirst, (5, 7, 8)),
    "two stacks, time first": (Translated, (5, 7, 8)),
    "layers of a stack": (Layers, (5, 7, 8)),
    "layers, time first": (lambda: Layers(False), (5, 7, 8)),
}


def flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [x for each in value for x in flat(each)]


def loss(value: Any) -> torch.Tensor:
    """No layer's norm leaves it as it is."""
    return sum((x.square() * torch.linspace(0.1, 2.0, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in flat(value))  # type: ignore[return-value]


def beside(rank: int, options: dict[str, Any]) -> dict[str, float]:
    torch.set_default_dtype(torch.float64)
    try:
        mesh, found = gingham.init(**options), {}
        for name, (make, shape) in KINDS.items():
            if name == "samples" and options.get("sequence"):
                with pytest.raises(gingham.ShapeError, match="without a dim of rows"):
                    gingham.parallelize(make(), mesh)(torch.randn(*shape))
                continue
            torch.manual_seed(0)
            original = make()
            model = gingham.parallelize(copy.deepcopy(original), mesh)
            copied = copy.deepcopy(model)
            x = torch.randn(*shape)
            expected = original(x)
            loss(expected).backward()
            errors_ = []
            for each in (model, copied):
                output = each(x)
                loss(output).backward()
                errors_ += [relative(a, b) for a, b in zip(flat(output), flat(expected), strict=True)]
                errors_ += errors(plain(each), plain(original)).values()
            found[name] = max(errors_)
        return found
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["2d", "1d", "sequence", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("2.5d", "3d"))])
def test_parts_of_a_model_as_one_process(ranks, name: str) -> None:
    for found in ranks(4 if name == "sequence" else ranks_of(name))(beside, SEQUENCE if name == "sequence" else GRIDS[name]):
        assert max(found.values()) <= 1e-12, {name: error for name, error in found.items() if error > 1e-12}


class Failing(Chain):
    fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.repeat(1, 2) if self.fails else x)


def after_an_error(rank: int) -> tuple[str, float]:
    mesh = gingham.init(**GRIDS["2d"])
    torch.manual_seed(0)
    original = Failing()
    model, x = gingham.parallelize(copy.deepcopy(original), mesh), torch.randn(4, 6)
    model.fails = True
    with pytest.raises(gingham.ShapeError) as caught:
        model(x)
    model.fails = False
    return str(caught.value), relative(model(x), original(x))


def test_a_call_that_fails_leaves_nothing(ranks) -> None:
    for said, error in ranks(4)(after_an_error):
        assert error <= 2e-6 and said.startswith("net.0 (LayerNorm(6))"), said


class Indexed(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[3](self.net[2](self.net[1](x))) + self.net(x)


def compiled(rank: int) -> float:
    mesh = gingham.init(**GRIDS["2d"])
    torch.manual_seed(0)
    original, x = Indexed(), torch.randn(4, 6)
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    program = torch.compile(model, backend="aot_eager", fullgraph=True)
    return max(relative(each(x), original(x)) for each in (program, model, program))


def test_a_compiled_model_calls_parts(ranks) -> None:
    assert all(error <= 2e-6 for error in ranks(4)(compiled))


def dropping(rank: int) -> list[torch.Tensor]:
    """Dropout between layers that are called one by one: of global indices, as in the chain called whole."""
    mesh, found = gingham.init(**GRIDS["2d"]), []
    for kind in (Chain, Loop):
        torch.manual_seed(0)
        model = kind()
        model.net.insert(2, nn.Dropout(0.5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(3)
            found.append(gingham.parallelize(model, mesh)(torch.ones(5, 6)).detach())
    return found


def test_dropout_of_a_layer_called_alone(ranks) -> None:
    outputs = ranks(4)(dropping)
    for whole, alone in outputs:
        assert torch.equal(whole, outputs[0][0]) and relative(alone, whole) <= 2e-6, (whole, alone)


def lazy(rank: int) -> str:
    with pytest.raises(ValueError) as caught:
        gingham.parallelize(nn.Sequential(nn.LazyLinear(4), nn.ReLU()), gingham.init(**GRIDS["2d"]))
    return str(caught.value)


def test_a_layer_without_a_shape_is_refused(ranks) -> None:
    assert all("0.weight has no shape yet: call the model once" in said for said in ranks(4)(lazy))
