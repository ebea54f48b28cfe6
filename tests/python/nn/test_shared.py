"""share_input: one gather of x for several linears, and nothing wrong when their calls are not the usual ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gingham
import theory
from gingham import nn
from grids import GRIDS, grids, ranks_of, relative, whole

OUTS = (36, 12, 12)


def three(swapped: Any = None, layout: str = "outer->inner") -> list[nn.Linear]:
    torch.manual_seed(8)
    layers = [nn.Linear(24, out, swapped=swapped, layout=layout, dtype=torch.float64) for out in OUTS]
    nn.share_input(*layers)
    return layers


def results(rank: int, options: dict[str, Any], swapped: Any, layout: str) -> tuple[float, Any, bool]:
    """Worst error of outputs and gradients against torch.nn, the traffic, whether nothing is kept."""
    mesh = gingham.init(**options)
    ours = three(swapped, layout)
    torch.manual_seed(8)
    theirs = [torch.nn.Linear(24, out, dtype=torch.float64) for out in OUTS]
    full = torch.randn(13, 5, 24, dtype=torch.float64)
    weights = [torch.randn(13, 5, out, dtype=torch.float64) for out in OUTS]
    a, b = full.clone().requires_grad_(), full.clone().requires_grad_()
    x = mesh.scatter(a)
    mesh.traffic(reset=True)
    parts = [layer(x) for layer in ours]
    traffic = mesh.traffic(reset=True)
    gathered = [mesh.gather(part, "inner" if layout.endswith("inner") else "x") for part in parts]
    sum((part * weight).sum() for part, weight in zip(gathered, weights, strict=True)).backward()
    expected = [layer(b) for layer in theirs]
    sum((part * weight).sum() for part, weight in zip(expected, weights, strict=True)).backward()
    errors = [relative(one, other) for one, other in zip([*gathered, a.grad], [*expected, b.grad], strict=True)]
    for one, other in zip(ours, theirs, strict=True):
        errors += [relative(whole(p.grad), q.grad) for p, q in zip(one.parameters(), other.parameters(), strict=True)]
    return max(errors), traffic, not ours[0].group.kept


@pytest.mark.parametrize(("swapped", "layout"), [(None, "outer->inner"), ("auto", "outer->outer")])
@grids("2.5d")
def test_is_right_and_gathers_x_once(ranks, name: str, swapped: Any, layout: str) -> None:
    answers = ranks(ranks_of(name))(results, GRIDS[name], swapped, layout)
    assert all(error <= 1e-12 and nothing_kept for error, _, nothing_kept in answers), answers
    grid = theory.Grid.of(**GRIDS[name]) if GRIDS[name] else theory.Grid()
    cost = theory.linear(grid, 13 * 5, 24, list(OUTS), layout=layout, swapped=swapped or False, products={"y"}).bytes(8)
    for axis in answers[0][1]:
        assert sum(traffic[axis]["bytes_received"] for _, traffic, _ in answers) == cost.words[axis], axis


def unusual(rank: int, options: dict[str, Any]) -> dict[str, bool]:
    mesh = gingham.init(**options)
    q, k, v = layers = three()
    torch.manual_seed(8)
    alone = [nn.Linear(24, out, layout="outer->inner", dtype=torch.float64) for out in OUTS]
    x = mesh.scatter(torch.randn(8, 24, dtype=torch.float64))
    found = {}

    def gradients(use: Callable[[list[nn.Linear], torch.Tensor], torch.Tensor], of: list[nn.Linear]) -> list[torch.Tensor | None]:
        leaf = x.clone().requires_grad_()
        for layer in of:
            layer.zero_grad()
        use(of, leaf).backward()
        return [leaf.grad, *(None if p.grad is None else p.grad.to_local() for layer in of for p in layer.parameters())]

    def same(use: Callable[[list[nn.Linear], torch.Tensor], torch.Tensor]) -> bool:
        pairs = zip(gradients(use, layers), gradients(use, alone), strict=True)
        return all((a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-12, atol=1e-12)) for a, b in pairs)

    def product(parts: list[nn.Linear], x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x) for part in parts)
        return q.pow(2).sum() + (k * v).sum()

    def two_passes(parts: list[nn.Linear], x: torch.Tensor) -> torch.Tensor:
        parts[0](x).pow(2).sum().backward()
        return parts[1](x).pow(2).sum()

    found["only one"] = same(lambda parts, x: parts[1](x).pow(2).sum())
    found["all"] = same(product)
    found["twice"] = same(lambda parts, x: (parts[0](x) * parts[0](x)).sum() + parts[1](x).pow(3).sum())
    found["a backward pass between"] = same(two_passes)
    for reentrant in (False, True):
        found[f"recomputed, reentrant {reentrant}"] = same(lambda parts, x, r=reentrant: checkpoint(product, parts, x, use_reentrant=r))
        found[f"partly recomputed, reentrant {reentrant}"] = same(
            lambda parts, x, r=reentrant: checkpoint(lambda x: parts[0](x).pow(2), x, use_reentrant=r).sum() + parts[1](x).pow(2).sum()
        )
        found[f"recomputed after, reentrant {reentrant}"] = same(
            lambda parts, x, r=reentrant: parts[0](x).pow(2).sum() + checkpoint(lambda x: parts[1](x).pow(2), x, use_reentrant=r).sum()
        )
    y = x.clone()
    q(y)
    y.add_(1)
    found["x changed"] = torch.equal(k(y), alone[1](y))
    q(x)
    with torch.no_grad():
        for layer in (k, alone[1]):
            layer.weight.to_local().mul_(2)
    found["weight changed"] = torch.equal(k(x), alone[1](x))
    with torch.no_grad():
        q(x)
    found["other grad mode"] = k(x).requires_grad
    with torch.inference_mode():
        z = x + 1
        found["inference"] = torch.equal(q(z), alone[0](z)) and torch.equal(v(z), alone[2](z))
    return found


@grids("2.5d")
def test_unusual_calls(ranks, name: str) -> None:
    for found in ranks(ranks_of(name))(unusual, GRIDS[name]):
        assert all(found.values()), found


def test_auto_decides_on_the_sum(ranks) -> None:
    def choices(rank: int) -> list[bool]:
        gingham.init(mode="2d", size=4)
        layers = [nn.Linear(64, 64, swapped="auto") for _ in range(3)]
        before = [layer.plan.swapped for layer in layers]
        fulls = [whole(layer.weight) for layer in layers]
        nn.share_input(*layers)
        kept = all(torch.equal(whole(layer.weight), full) for layer, full in zip(layers, fulls, strict=True))
        return [*before, *(layer.plan.swapped for layer in layers), kept]

    assert ranks(4)(choices)[0] == [True] * 3 + [False] * 3 + [True]


def test_refuses_linears_that_cannot_share() -> None:
    gingham.init()
    try:
        with pytest.raises(gingham.MeshError, match="in_features 8 and 12"):
            nn.share_input(nn.Linear(8, 8), nn.Linear(12, 8))
        with pytest.raises(gingham.MeshError, match="epilogue"):
            nn.share_input(nn.Linear(8, 8), nn.Linear(8, 8, epilogue="gelu"))
    finally:
        gingham.destroy()
