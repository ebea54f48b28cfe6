"""torch's ways to call or record a model as another: functional_call gives one process's values, traces are refused by name (C5, A2)."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import families
import gingham
from gingham import nn
from grids import GRIDS, ranks_of, relative

ROWS, WIDTH = 8, 8


class Tied(torch.nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.table = kind.Embedding(12, WIDTH)
        if kind is nn:
            self.head = nn.Classifier(WIDTH, 12, False, tied=self.table)
        else:
            self.head = torch.nn.Linear(WIDTH, 12, bias=False)
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def both(ours: Any, theirs: Any, run: Callable[[Any, bool], torch.Tensor]) -> float:
    """The largest relative difference of outputs and of gradients of full tensors that stand in for all parameters."""
    found = []
    for model in (ours, theirs):
        full = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in model.named_parameters()}
        given = {name: (p * 1.5 + 0.01).requires_grad_() for name, p in full.items()}
        y = run(lambda *args, model=model, given=given, **kwargs: torch.func.functional_call(model, given, args, kwargs), model is ours)
        (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y) / y.numel()).sum().backward()
        found.append([y.detach(), *(p.grad for p in given.values() if p.grad is not None)])
    assert len(found[0]) >= len(found[1])
    largest = max(float(b.abs().max()) for b in found[1])
    pairs = zip(*found, strict=True) if len(found[0]) == len(found[1]) else [(found[0][0], found[1][0])]  # c_attn is held as three
    return max(float((a - b).abs().max()) / largest for a, b in pairs)


def called(rank: int, options: dict[str, Any]) -> dict[str, float]:
    mesh = gingham.init(**options)
    x, ids = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)), torch.arange(ROWS)
    makes: dict[str, Callable[[Any], torch.nn.Module]] = {
        "layers": lambda kind: torch.nn.Sequential(kind.Linear(WIDTH, 16), torch.nn.GELU(), kind.LayerNorm(16), kind.Linear(16, WIDTH)),
        "rms": lambda kind: kind.RMSNorm(WIDTH),
        "tied": Tied,
    }
    errors = {}
    for name, make in makes.items():
        twins = []
        for kind in (nn, torch.nn):
            torch.manual_seed(0)
            twins.append(make(kind))
        given = ids if name == "tied" else x
        errors[name] = both(*twins, lambda call, ours, x=given: mesh.gather(call(mesh.scatter(x))) if ours else call(x))
    for family in ("gpt2", "llama", "vit"):
        serial = families.build(family).eval()
        model, batch = gingham.parallelize(copy.deepcopy(serial), mesh), families.batch(family)
        errors[family] = both(model, serial, lambda call, ours, batch=batch: call(**batch).logits)
    return errors


@pytest.mark.parametrize("name", ["2d", pytest.param("2.5d", marks=pytest.mark.matrix)])
def test_c5_functional_call_takes_full_tensors(ranks, name: str) -> None:
    for errors in ranks(ranks_of(name))(called, GRIDS[name]):
        assert max(errors.values()) < 1e-5, errors


def refused(rank: int) -> dict[str, str]:
    mesh = gingham.init(**GRIDS["2d"])
    x = torch.randn(ROWS, WIDTH)
    layers = torch.nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    converted = gingham.parallelize(torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, 2)), mesh)
    found = {}

    def say(name: str, call: Callable[[], Any], error: Any = NotImplementedError) -> None:
        with pytest.raises(error) as raised:
            call()
        found[name] = str(raised.value)

    for kind, model, given in (("layers", layers, mesh.scatter(x).as_subclass(torch.Tensor)), ("converted", converted, x)):
        say(f"torch.jit.script {kind}", lambda model=model: torch.jit.script(model))
        say(f"torch.jit.trace {kind}", lambda model=model, x=given: torch.jit.trace(model, (x,), check_trace=False))
        say(f"torch.export {kind}", lambda model=model, x=given: torch.export.export(model, (x,), strict=False))
        say(f"torch.fx.symbolic_trace {kind}", lambda model=model: torch.fx.symbolic_trace(model))
        say(f"make_fx {kind}", lambda model=model, x=given: torch.fx.experimental.proxy_tensor.make_fx(model)(x))
    wrong = {"0.weight": torch.ones(3, WIDTH)}
    say("functional_call", lambda: torch.func.functional_call(layers, wrong, (mesh.scatter(x),)), gingham.ShapeError)
    say("vmap", lambda: torch.vmap(converted)(x))
    return found


def test_c5_traces_of_layers_and_converted_models_are_refused_by_name(ranks) -> None:
    for rank, found in enumerate(ranks(4)(refused)):
        assert len(found) == 12
        wrong = found.pop("functional_call")
        assert "0 (Linear(8, 8))" in wrong and f"rank {rank} got a plain tensor (3, 8)" in wrong and "(8, 8), the same on every" in wrong, (
            wrong
        )
        assert "Sequential inside vmap" in found.pop("vmap")
        for name, message in found.items():
            tool, kind = name.split()
            assert f"in {tool}, which records" in message and "Use torch.compile(model)" in message, (name, message)
            assert "inear" in message if kind == "layers" else True, (name, message)


def test_c5_functional_call_takes_this_ranks_blocks_too(ranks) -> None:
    """A block put in a parameter's place is this rank's, as a layer's own functions take it."""

    def local(rank: int) -> float:
        mesh = gingham.init(**GRIDS["2d"])
        layer = nn.Linear(WIDTH, WIDTH)
        x = mesh.scatter(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)))
        block: Any = {name: p.to_local().detach() for name, p in layer.named_parameters()}
        return relative(mesh.gather(torch.func.functional_call(layer, block, (x,))), mesh.gather(layer(x)))

    assert max(ranks(4)(local)) == 0.0
