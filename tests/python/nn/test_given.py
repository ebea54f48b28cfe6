"""Weights that are given instead of drawn: every layer, from tensors and from the meta device; initialisers; transposed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from grids import GRIDS, grids, ranks_of, relative, whole

LAYERS: dict[str, Callable[..., torch.nn.Module]] = {
    "Linear": lambda **k: nn.Linear(24, 36, **k),
    "Linear transposed": lambda **k: nn.Linear(24, 36, transposed=True, **k),
    "Linear skip_bias_add": lambda **k: nn.Linear(24, 36, skip_bias_add=True, **k),
    "Classifier": lambda **k: nn.Classifier(24, 29, True, **k),
    "Embedding": lambda **k: nn.Embedding(29, 24, padding_idx=1, **k),
    "PatchEmbedding": lambda **k: nn.PatchEmbedding(8, (4, 2), 3, 24, **k),
    "LayerNorm": lambda **k: nn.LayerNorm(24, **k),
    "RMSNorm": lambda **k: nn.RMSNorm(24, **k),
    "MLP": lambda **k: nn.MLP(24, 36, **k),
    "MLP gated": lambda **k: nn.MLP(24, 36, gated=True, **k),
    "SelfAttention": lambda **k: nn.SelfAttention(24, 24, kv_heads=12, **k),
}


def taken(rank: int, options: dict[str, Any]) -> list[str]:
    gingham.init(**options)
    wrong = []
    for name, make in LAYERS.items():
        shapes = {key: tuple(value.shape) for key, value in make().state_dict().items()}
        torch.manual_seed(7)
        full = {key: torch.randn(shape).to(torch.bfloat16) for key, shape in shapes.items()}
        before = torch.random.get_rng_state()
        layer = make(given=full)
        if not torch.equal(before, torch.random.get_rng_state()):
            wrong.append(f"{name} drew")
        wrong += [f"{name} {key}" for key, value in layer.state_dict().items() if not torch.equal(whole(value), full[key])]
        empty = {key: torch.nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False) for key, shape in shapes.items()}
        for key, value in make(given=empty).named_parameters():
            if value.requires_grad or value.to_local().is_meta or tuple(value.shape) != shapes[key]:
                wrong.append(f"{name} meta {key}")
        for short in ({}, {key: torch.ones(3, 5) for key in shapes}):
            with pytest.raises(gingham.ShapeError, match="given: rank"):
                make(given=short)
    return wrong


@grids("2d")
def test_every_layer_takes_given_weights(ranks, name: str) -> None:
    assert ranks(ranks_of(name))(taken, GRIDS[name]) == [[]] * ranks_of(name)


def drawn(rank: int, options: dict[str, Any]) -> list[bool]:
    """Initialisers see the full tensor; transposed and plain linears of one weight agree."""
    mesh = gingham.init(**options)
    torch.manual_seed(1)
    layer = nn.Linear(24, 36, init_weight=torch.nn.init.xavier_normal_, init_bias=torch.nn.init.ones_)
    torch.manual_seed(1)
    expected = torch.nn.init.xavier_normal_(torch.empty(36, 24))
    found = [torch.equal(whole(layer.weight.data), expected), torch.equal(whole(layer.bias.data), torch.ones(36))]
    weight, bias = torch.randn(36, 24, dtype=torch.float64), torch.randn(36, dtype=torch.float64)
    full, cotangent = torch.randn(7, 24, dtype=torch.float64), torch.randn(7, 36, dtype=torch.float64)
    results = []
    for transposed in (False, True):
        given = {"weight": torch.nn.Parameter(weight.T.contiguous() if transposed else weight), "bias": torch.nn.Parameter(bias)}
        layer = nn.Linear(24, 36, transposed=transposed, given=given)
        x = full.clone().requires_grad_()
        y = mesh.gather(layer(mesh.scatter(x)))
        y.backward(cotangent)
        gradient = whole(layer.weight.grad)
        results.append((y, x.grad, gradient.T if transposed else gradient, whole(layer.bias.grad)))
    return found + [relative(one, other) <= 1e-13 for one, other in zip(*results, strict=True)]


@grids("2.5d")
def test_initialisers_and_transposed_weights(ranks, name: str) -> None:
    assert all(all(found) for found in ranks(ranks_of(name))(drawn, GRIDS[name]))


def test_what_is_refused() -> None:
    gingham.init()
    try:
        with pytest.raises(NotImplementedError, match="max_norm"):
            nn.Embedding(4, 4, max_norm=1.0)
        with pytest.raises(gingham.ShapeError, match="padding_idx=9"):
            nn.Embedding(4, 4, padding_idx=9)
        with pytest.raises(gingham.MeshError, match="skip_bias_add"):
            nn.Linear(4, 4, skip_bias_add=True, epilogue="gelu")
        with pytest.raises(gingham.ShapeError, match="multiples"):
            nn.PatchEmbedding(10, 4, 3, 8)
        with pytest.raises(gingham.ShapeError, match="whole images"):
            nn.PatchEmbedding(8, 4, 3, 8)(torch.ones(2, 3, 8, 4))
        with pytest.raises(ValueError, match="gelu_tanh"):
            nn.MLP(4, 4, activation="tanh")
        with pytest.raises(gingham.ShapeError, match="RMSNorm"):
            nn.RMSNorm(4)(torch.ones(2, 5))
        plain = nn.LayerNorm(4, elementwise_affine=False)
        assert not list(plain.parameters())
        x = torch.randn(3, 4)
        torch.testing.assert_close(plain(x), torch.nn.functional.layer_norm(x, (4,)))
        y, bias = nn.Linear(4, 4, bias=False, skip_bias_add=True)(x)
        assert bias is None and y.shape == (3, 4)
    finally:
        gingham.destroy()


def stepped(rank: int, options: dict[str, Any]) -> list[str]:
    """Steps of an optimizer that holds the full parameter, the layer's own, and one whose layer has another by now."""
    mesh = gingham.init(**options)
    model, said = torch.nn.Sequential(nn.Linear(24, 36)), []
    full = torch.nn.Parameter(torch.ones(36, 24))
    model[0].weight = full
    for weight in (full, model[0].weight, full):
        before = model[0].weight.full_tensor()
        model(mesh.scatter(torch.ones(8, 24))).sum().backward()
        try:
            torch.optim.SGD([weight], lr=0.1).step()
            said.append("moved" if not torch.equal(before, model[0].weight.full_tensor()) else "")
        except gingham.MeshError as error:
            said.append(str(error))
        if len(said) == 2:
            model[0].weight = torch.nn.Parameter(torch.zeros(36, 24))
    return said


def test_an_optimizer_that_holds_the_full_parameter_is_told(ranks) -> None:
    for rank, (told, moved, left) in enumerate(ranks(4)(stepped, GRIDS["2d"])):
        assert moved == "moved" and left == ""
        assert told.startswith(f"SGD.step: rank {rank} got the full parameter (36, 24) that was given to 0.weight"), told
