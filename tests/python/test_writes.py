"""Parameters changed by hand, as torch code changes them: the values of one process (A14, C5, C7)."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from grids import GRIDS, ranks_of

ROWS, WIDTH = 9, 14

MASK = (torch.arange(ROWS * WIDTH) % 3 == 0).view(ROWS, WIDTH)
FULL = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
WRITES: dict[str, Callable[[Any], object]] = {
    "data[0].zero_()": lambda w: w.data[0].zero_(),
    "[8].fill_(3)": lambda w: w[8].fill_(3),
    "[:, 3].zero_()": lambda w: w[:, 3].zero_(),
    "[2][5].fill_(2)": lambda w: w[2][5].fill_(2),
    "[3:7] = 1": lambda w: w.__setitem__(slice(3, 7), 1),
    "[mask] = 0": lambda w: w.__setitem__(MASK, 0),
    "[7] = row": lambda w: w.__setitem__(7, torch.ones(WIDTH)),
    "[7].copy_(row)": lambda w: w[7].copy_(torch.ones(WIDTH)),
    "[1] *= 2": lambda w: w.__setitem__(1, w[1].mul_(2)),
    "copy_(full)": lambda w: w.copy_(FULL),
    "copy_(Parameter)": lambda w: w.copy_(torch.nn.Parameter(FULL)),
    "data.copy_(full)": lambda w: w.data.copy_(FULL),
    "mul_(mask)": lambda w: w.mul_(MASK),
    "add_(full, alpha)": lambda w: w.add_(FULL, alpha=0.5),
    "masked_fill_": lambda w: w.masked_fill_(MASK, 5.0),
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([1, 8]), 0.5),
    "fill_diagonal_": lambda w: w.fill_diagonal_(1.0),
    "data = full": lambda w: setattr(w, "data", FULL.clone()),
    "data = data * 2": lambda w: setattr(w, "data", w.data * 2),
    "data = double": lambda w: setattr(w, "data", w.data.double()),
    "vector_to_parameters": lambda w: torch.nn.utils.vector_to_parameters(FULL.flatten(), [w]),
    "orthogonal_": lambda w: torch.nn.init.orthogonal_(w, generator=torch.Generator().manual_seed(3)),
    "eye_": lambda w: torch.nn.init.eye_(w),
    "trunc_normal_": lambda w: torch.nn.init.trunc_normal_(w, a=-0.5, b=0.5, generator=torch.Generator().manual_seed(3)),
    "sparse_": lambda w: torch.manual_seed(3) and torch.nn.init.sparse_(w, 0.3),
}


def twins(make: Callable[[Any], torch.nn.Module]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    ours = make(nn)
    torch.manual_seed(0)
    return ours, make(torch.nn)


def written(rank: int, options: dict[str, Any]) -> dict[str, bool]:
    mesh = gingham.init(**options)
    ids, good = torch.arange(ROWS), {}
    for name, write in WRITES.items():
        ours, theirs = twins(lambda kind: kind.Embedding(ROWS, WIDTH))
        with torch.no_grad():
            write(ours.weight)
            write(theirs.weight)
        good[name] = torch.equal(ours.weight.full_tensor(), theirs.weight) and ours.weight.dtype == theirs.weight.dtype
        # what the layer multiplies by is what was written
        good[f"{name}, used"] = torch.equal(mesh.gather(ours(mesh.scatter(ids))), theirs(ids))
    ours, _ = twins(lambda kind: kind.Embedding(ROWS, WIDTH))
    mesh.gather(ours(mesh.scatter(ids))).sum().backward()
    ours.weight.grad[2] = 7
    good["grad[2] = 7"] = torch.equal(ours.weight.grad.full_tensor()[2], torch.full((WIDTH,), 7.0))
    return good


@pytest.mark.parametrize("name", ["2d", pytest.param("2.5d", marks=pytest.mark.matrix), pytest.param("3x2x2", marks=pytest.mark.matrix)])
def test_c5_parameters_written_by_hand_hold_one_process_values(ranks, name: str) -> None:
    for good in ranks(ranks_of(name))(written, GRIDS[name]):
        assert all(good.values()), [case for case, value in good.items() if not value]


def refused(rank: int) -> dict[str, str]:
    gingham.init(mode="2d", size=4)
    layer, said = nn.Linear(WIDTH, ROWS), {}

    def narrow() -> None:
        with torch.no_grad():
            layer.weight.narrow(0, 0, 2).zero_()

    def other_shape() -> None:
        layer.weight = torch.nn.Parameter(torch.zeros(3, WIDTH))

    def other_data() -> None:
        layer.weight.data = torch.zeros(3, WIDTH)

    def share() -> None:
        layer.share_memory()

    for call in (narrow, other_shape, other_data, share):
        with pytest.raises((gingham.MeshError, gingham.ShapeError)) as error:
            call()
        said[call.__name__] = str(error.value)
    return said


def test_c5_what_cannot_be_written_names_the_parameter_and_the_fix(ranks) -> None:
    said = ranks(4)(refused)[1]
    assert "rank 1" in said["narrow"] and "weight[start:stop]" in said["narrow"]
    assert "Linear(14, 9).weight" in said["other_shape"] and "(9, 14)" in said["other_shape"]
    assert "(9, 14)" in said["other_data"] and "full tensor" in said["other_data"]
    assert "full_tensor" in said["share"]


def tied(rank: int, options: dict[str, Any]) -> dict[str, float]:
    """A head that is given a table's weight, a linear another's, in either trade of axes; one full Parameter for two layers."""
    mesh = gingham.init(**options)
    ids, x, errors = torch.arange(16) % ROWS, torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(2)), {}

    def compared(name: str, pair: tuple[Any, Any], run: Callable[[Any], torch.Tensor]) -> None:
        ours, theirs = pair
        y, expected = run(ours), run(theirs)
        y.pow(2).sum().backward()
        expected.pow(2).sum().backward()
        errors[name] = float((y - expected).abs().max())
        assert len(list(ours.parameters())) == len(list(theirs.parameters()))
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            errors[name] = max(errors[name], float((mine.grad.full_tensor() - other.grad).abs().max() / other.grad.abs().max()))

    def head(kind: Any) -> torch.nn.Module:
        model = torch.nn.Sequential(kind.Embedding(ROWS, WIDTH), kind.Linear(WIDTH, ROWS, bias=False))
        model[1].weight = model[0].weight
        return model

    def trades(kind: Any) -> torch.nn.Module:
        model = torch.nn.Sequential(kind.Linear(WIDTH, WIDTH), kind.Linear(WIDTH, WIDTH, **({"swapped": True} if kind is nn else {})))
        model[1].weight, model[1].bias = model[0].weight, model[0].bias
        return model

    def given(kind: Any) -> torch.nn.Module:
        model = torch.nn.Sequential(kind.Linear(WIDTH, WIDTH, bias=False), kind.Linear(WIDTH, WIDTH, bias=False))
        model[0].weight = model[1].weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7)))
        return model

    def gathered(model: Any, full: torch.Tensor) -> torch.Tensor:
        layers = next(model.modules())
        return mesh.gather(model(mesh.scatter(full))) if isinstance(layers[0], nn.layer.Layer) else model(full)

    compared("head", twins(head), lambda model: gathered(model, ids))
    if mesh.outer == mesh.inner:
        compared("trades", twins(trades), lambda model: gathered(model, x))
    compared("given", twins(given), lambda model: gathered(model, x))
    for normal in (torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm):
        torch.manual_seed(1)
        ours = torch.nn.Sequential(normal(nn.Linear(WIDTH, ROWS)))
        torch.manual_seed(1)
        compared(normal.__name__, (ours, torch.nn.Sequential(normal(torch.nn.Linear(WIDTH, ROWS)))), lambda model: gathered(model, x))
    return errors


@pytest.mark.parametrize("name", ["2d", pytest.param("2.5d", marks=pytest.mark.matrix), pytest.param("3d", marks=pytest.mark.matrix)])
def test_c5_another_layers_parameter_is_cut_as_this_layer_needs_it(ranks, name: str) -> None:
    for errors in ranks(ranks_of(name))(tied, GRIDS[name]):
        assert max(errors.values()) < 3e-5, errors


def copies(rank: int) -> list[bool]:
    mesh = gingham.init(mode="2d", size=4)
    model = torch.nn.Sequential(nn.Linear(WIDTH, 16), nn.LayerNorm(16), nn.Linear(16, ROWS))
    x = mesh.scatter(torch.randn(8, WIDTH))
    gingham.cross_entropy(model(x), mesh.scatter(torch.arange(8))).backward()
    copied = copy.deepcopy(model)
    pairs = list(zip(model.parameters(), copied.parameters(), strict=True))
    same = [torch.equal(a.to_local(), b.to_local()) and torch.equal(a.grad.to_local(), b.grad.to_local()) for a, b in pairs]
    apart = [a.to_local().data_ptr() != b.to_local().data_ptr() and isinstance(b, torch.nn.Parameter) for a, b in pairs]
    return [*same, *apart, torch.equal(model(x), copied(x))]


def test_c7_a_model_is_copied_after_backward_with_its_gradients(ranks) -> None:
    assert all(all(good) for good in ranks(4)(copies))


def gradients(rank: int) -> dict[str, float]:
    """Gradients given whole, by each kind of step, and masks on parameters, beside one process; magnitudes of weight_norm too."""
    gingham.init(mode="2d", size=4)
    errors = {}
    full = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(full.numel()).view_as(full) % 3 > 0).float()
    for name, options in (("SGD", {}), ("AdamW", {"fused": True}), ("Adam", {"foreach": True}), ("Adafactor", {}), ("Muon", {})):
        made = []
        for kind in (nn, torch.nn):
            torch.manual_seed(0)
            layer = kind.Linear(WIDTH, ROWS, bias=False)
            layer.weight.grad = full.clone()
            layer.weight.grad = layer.weight.grad * mask
            getattr(torch.optim, name)(layer.parameters(), lr=0.1, **options).step()
            made.append(layer)
        errors[name] = float((made[0].weight.full_tensor() - made[1].weight).abs().max())
    torch.manual_seed(0)
    normed, serial = torch.nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, ROWS)), None
    torch.manual_seed(0)
    serial = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(WIDTH, ROWS))
    for layer in (normed, serial):
        layer.weight.square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
    errors["weight_norm"] = float((normed.weight.full_tensor() - serial.weight).abs().max())
    torch.manual_seed(0)
    with torch.device("meta"):
        drawn = nn.Linear(WIDTH, ROWS)
    torch.manual_seed(0)
    errors["under meta"] = float((drawn.weight.full_tensor() - torch.nn.Linear(WIDTH, ROWS).weight).abs().max())
    return errors


def test_a1_a_gradient_given_whole_is_cut_for_every_optimizer(ranks) -> None:
    for errors in ranks(4)(gradients):
        assert max(errors.values()) < 1e-5, errors


def strange(rank: int) -> dict[str, str]:
    gingham.init(mode="2d", size=4)
    layer, found = nn.Linear(WIDTH, ROWS), {}
    calls = {
        "in_features=16.0": lambda: nn.Linear(16.0, 8),
        "in_features=-16": lambda: nn.Linear(-16, 8),
        "num_embeddings=10.0": lambda: nn.Embedding(10.0, 8),
        "normalized_shape=16.0": lambda: nn.LayerNorm(16.0),
        "layer(x)": lambda: torch.ones(4, WIDTH) @ layer.weight.T,
        "full_tensor()": lambda: layer.weight.detach().numpy(),
        "full gradient": lambda: setattr(layer.weight, "grad", torch.ones(2, 2)),
    }
    for name, call in calls.items():
        with pytest.raises((TypeError, gingham.ShapeError, gingham.MeshError)) as raised:
            call()
        found[name] = str(raised.value)
    return found


def test_d_sizes_and_direct_uses_of_parameters_say_what_to_write(ranks) -> None:
    for name, message in ranks(4)(strange)[0].items():
        assert name in message, (name, message)
