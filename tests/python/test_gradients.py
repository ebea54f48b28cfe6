"""Weight gradients over depth: summed behind the backward pass or at once, always right, complete and equal on replicas."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gingham
from gingham.autograd import background
from grids import relative, whole

Pair = tuple[torch.nn.Linear, torch.nn.Linear]
OPTIONS = dict(mode="2.5d", size=8, depth=2)


def loss(layers: Pair, x: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return gather(layers[1](layers[0](x))).sin().sum()


def plain(layers: Pair, x: torch.Tensor, gather: Any) -> list[torch.Tensor]:
    loss(layers, x, gather).backward()
    return [layers[0].weight.grad, layers[1].weight.grad, layers[0].bias.grad]


def accumulated(layers: Pair, x: torch.Tensor, gather: Any) -> list[torch.Tensor]:
    plain(layers, x, gather)
    return plain(layers, x, gather)


def tied(layers: Pair, x: torch.Tensor, gather: Any) -> list[torch.Tensor]:
    gather(layers[0](layers[1](layers[0](layers[0](x))))).sin().sum().backward()
    return [layers[0].weight.grad, layers[1].weight.grad]


def hooked(layers: Pair, x: torch.Tensor, gather: Any) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    layers[0].weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    layers[1].weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    loss(layers, x, gather).backward()
    return seen


def functional(layers: Pair, x: torch.Tensor, gather: Any) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss(layers, x, gather), [layers[0].weight, layers[1].weight]))


def some_inputs(layers: Pair, x: torch.Tensor, gather: Any) -> list[torch.Tensor]:
    loss(layers, x, gather).backward(inputs=[layers[0].weight])
    assert layers[1].weight.grad is None
    return [layers[0].weight.grad]


def used_elsewhere(layers: Pair, x: torch.Tensor, gather: Any) -> list[torch.Tensor]:
    decay = layers[0].weight.square().sum()
    (loss(layers, x, gather) + whole(decay)).backward()
    return [layers[0].weight.grad, layers[1].weight.grad]


def frozen(layers: Pair, x: torch.Tensor, gather: Any) -> list[torch.Tensor]:
    layers[0].weight.requires_grad_(False)
    loss(layers, x, gather).backward()
    assert layers[0].weight.grad is None
    return [layers[1].weight.grad, layers[0].bias.grad]


def recomputed(layers: Pair, x: torch.Tensor, gather: Any) -> list[torch.Tensor]:
    x = x.requires_grad_()
    gather(checkpoint(lambda x: layers[1](layers[0](x)), x, use_reentrant=True)).sin().sum().backward()
    first = [layer.weight.grad.clone() for layer in layers]
    for layer in layers:
        layer.weight.grad = None
    gather(checkpoint(lambda x: layers[1](layers[0](x)), x, use_reentrant=False)).sin().sum().backward()
    return first + [layer.weight.grad for layer in layers]


def after_a_failure(layers: Pair, x: torch.Tensor, gather: Any) -> list[torch.Tensor]:
    def fail(gradient: torch.Tensor) -> None:
        raise KeyError("in backward")

    y = layers[0](x)
    y.register_hook(fail)
    with pytest.raises(KeyError):
        gather(layers[1](y)).sum().backward()
    layers[1].weight.grad = None
    return plain(layers, x, gather)


# case -> sums that wait for the end of the backward pass
CASES = {
    plain: 2,
    accumulated: 4,
    tied: 4,
    hooked: 0,
    functional: 0,
    some_inputs: 1,
    used_elsewhere: 2,
    frozen: 1,
    recomputed: 4,
    after_a_failure: 3,
}


def run(rank: int) -> dict[str, Any]:
    mesh = gingham.init(**OPTIONS)
    gc.collect()
    background._hooked.clear()  # of graphs that other tests have left in this process
    later: list[int] = []
    add = background.Sums.later
    background.Sums.later = lambda self, *arguments: (later.append(1), add(self, *arguments))[1]  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    try:
        for case, expected_later in CASES.items():
            later.clear()
            torch.manual_seed(0)
            wide = dict(dtype=torch.float64)
            ours = gingham.nn.Linear(24, 24, **wide), gingham.nn.Linear(24, 24, swapped=True, **wide)
            torch.manual_seed(0)
            theirs = torch.nn.Linear(24, 24, **wide), torch.nn.Linear(24, 24, **wide)
            full = torch.randn(9, 24, **wide)
            got, expected = case(ours, mesh.scatter(full), mesh.gather), case(theirs, full, lambda y: y)
            errors = [relative(whole(one), other) for one, other in zip(got, expected, strict=True)]
            copies = [mesh.axis(("depth",)).all_gather(one.to_local().contiguous(), counted=False) for one in got]
            equal = all(torch.equal(pair[0], pair[1]) for pair in copies)
            found[case.__name__] = max(errors) <= 1e-12, equal, len(later) == expected_later
    finally:
        background.Sums.later = add  # type: ignore[method-assign]
    return found


def test_every_case_is_right_and_equal_on_replicas(ranks) -> None:
    for found in ranks(8)(run):
        assert found == {case.__name__: (True, True, True) for case in CASES}


def trained(rank: int) -> list[torch.Tensor]:
    mesh = gingham.init(**OPTIONS)
    torch.manual_seed(1)
    model = torch.nn.Sequential(gingham.nn.LayerNorm(24), gingham.nn.MLP(24, 48, dropout=0.1), gingham.nn.Linear(24, 24, swapped=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(50):
        optimizer.zero_grad()
        mesh.gather(model(mesh.scatter(torch.randn(8, 24)))).square().mean().backward()
        optimizer.step()
    return [weight.to_local().clone() for weight in model.parameters()]


def test_replicas_keep_equal_bits_and_runs_repeat(ranks) -> None:
    first, second = ranks(8)(trained), ranks(8)(trained)
    for rank in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first[rank], first[rank + 4], strict=True))
    assert all(torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True))


def summed_gradients(rank: int, kind: str) -> bool:
    """A hook that reads weight.grad, or stands on one rank only, in a mesh with replicas over depth (A15, B10)."""
    mesh = gingham.init(**OPTIONS)
    torch.manual_seed(0)
    model = torch.nn.Sequential(gingham.nn.Linear(16, 16), gingham.nn.Linear(16, 16))
    seen = []

    def note(module: torch.nn.Module) -> None:
        if module.weight.grad is not None:  # torch too may call the hook first
            seen.append(module.weight.grad.to_local().clone())

    if kind == "module" or kind == "module on one rank" and rank == 3:
        model[1].register_full_backward_hook(lambda module, *_: note(module))
    if kind == "outer module":
        model.register_full_backward_hook(lambda module, *_: note(module[1]))
    if kind == "tensor on one rank" and rank == 3:
        model[1].weight.register_hook(lambda gradient: seen.append(gradient.to_local().clone()))
    if kind == "accumulated on one rank" and rank == 3:
        model[1].weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.to_local().clone()))
    x = mesh.scatter(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)))
    model(x).pow(2).sum().backward()
    torch.manual_seed(0)
    serial = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    serial(torch.randn(8, 16, generator=torch.Generator().manual_seed(1))).pow(2).sum().backward()
    exact = [relative(whole(a.grad), b.grad) <= 1e-6 for a, b in zip(model.parameters(), serial.parameters(), strict=True)]
    return all(exact) and all(torch.equal(each, model[1].weight.grad.to_local()) for each in seen)


@pytest.mark.parametrize("kind", ["module", "outer module", "module on one rank", "tensor on one rank", "accumulated on one rank"])
def test_a15_b10_hooks_read_whole_sums_and_may_differ_by_rank(ranks, kind: str) -> None:
    assert all(ranks(8)(summed_gradients, kind))


def apart(rank: int, recomputed: bool) -> dict[str, Any]:
    """Bytes received, by axis, of the gradients of x and of the parameters: asked for in one pass, and in one pass each."""
    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    found: dict[str, Any] = {"errors": []}
    for layer in (gingham.nn.Linear(16, 24, dtype=torch.float64), gingham.nn.LayerNorm(16, dtype=torch.float64)):
        x = mesh.scatter(torch.randn(8, 16, dtype=torch.float64)).requires_grad_()
        parameters, kind = list(layer.parameters()), type(layer).__name__

        def bytes_of(wanted: list[torch.Tensor], kind: str = kind, layer: Any = layer, x: torch.Tensor = x) -> list[torch.Tensor]:
            y = checkpoint(layer, x, use_reentrant=False) if recomputed else layer(x)
            mesh.traffic(reset=True)
            got = torch.autograd.grad(y.sin().sum(), wanted)
            part = "both" if len(wanted) == 3 else "x" if len(wanted) == 1 else "parameters"
            found[f"{kind} {part}"] = {axis: counts["bytes_received"] for axis, counts in mesh.traffic().items()}
            return [whole(each) for each in got]

        together, alone = bytes_of([x, *parameters]), bytes_of([x]) + bytes_of(parameters)
        found["errors"] += [relative(one, other) for one, other in zip(alone, together, strict=True)]
    gingham.destroy()
    return found


@pytest.mark.parametrize("recomputed", [False, True])
def test_what_a_backward_pass_is_not_asked_for_is_neither_made_nor_sent(ranks, recomputed: bool) -> None:
    for found in ranks(4)(apart, recomputed):
        assert max(found["errors"]) <= 1e-12
        if recomputed:
            continue
        for kind in ("Linear", "LayerNorm"):
            x, parameters, both = (found[f"{kind} {part}"] for part in ("x", "parameters", "both"))
            assert all(x[axis] + parameters[axis] == both[axis] for axis in both), found
        assert found["Linear x"]["row"] < found["Linear both"]["row"] and found["LayerNorm parameters"]["col"] == 0
