"""Numbers made of parameters in two steps, of which ranks hold parts after the first: one process's numbers and gradients in every mode."""

from collections.abc import Callable, Iterator
from itertools import product
from math import prod
from typing import Any

import pytest
import torch

import gingham
from gingham import nn

INF = float("inf")
Made = Callable[..., Any]
FIRST: dict[str, Made] = {
    "sum": lambda w, **how: w.sum(**how),
    "mean": lambda w, **how: w.mean(**how),
    "norm": lambda w, **how: w.norm(2, **how),
    "norm 3": lambda w, **how: torch.linalg.vector_norm(w, 3, **how),
    "norm inf": lambda w, **how: torch.linalg.vector_norm(w, INF, **how),
    "norm -inf": lambda w, **how: torch.linalg.vector_norm(w, -INF, **how),
    "amax": lambda w, **how: w.amax(**how),
    "amin": lambda w, **how: w.amin(**how),
    "std": lambda w, **how: w.std(**how),
    "logsumexp": lambda w, **how: w.logsumexp(**how),
}
DIMS: tuple[Any, ...] = (0, 1, (0, 1))
THEN: dict[str, Made] = {
    "itself": lambda v: v,
    "neg": lambda v: -v,
    "times": lambda v: v * -2,
    "plus": lambda v: v + 1,
    "square": lambda v: v * v,
    "exp": lambda v: v.exp(),
    "over": lambda v: 1 / (v + 7),
    "cast": lambda v: v.float().double(),
    "own detached": lambda v: v * v.detach(),
    "added": lambda v: torch.add(v, v, alpha=-3),
    "where": lambda v: torch.where(v > 0.2, v, v * 2),
    "clamped in place": lambda v: (v * 1.0).clamp_(min=0.1),
    "changed in place": lambda v: (v * 1.0).mul_(-2).add_(3),
    "stacked": lambda v: torch.stack([v, v]),
    "piece": lambda v: v.reshape(-1)[:2],
}
LAST: dict[str, Made] = {
    "sum": lambda v: v.sum(),
    "norm": lambda v: v.norm(),
    "norm inf": lambda v: v.norm(INF),
    "max": lambda v: v.max(),
    "amin": lambda v: v.amin(),
}
MASK = torch.arange(77).view(11, 7) % 3 == 0
WHOLE: dict[str, Made] = {
    "standardised": lambda w: ((w - w.mean()) / w.std()).pow(3).sum(),
    "rows standardised": lambda w: ((w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5)).pow(3).sum(),
    "rows of length one": lambda w: (w / w.norm(dim=1, keepdim=True).clamp_min(1e-6)).pow(3).sum(),
    "any as a number": lambda w: w.sum() * (w > 0).any().float() + (w > 0).any().int() + (w > -9).any().int(),
    "all as a number": lambda w: w.sum() * (w > -9).all().double(),
    "a mask": lambda w: (w * MASK).sum() ** 2 + (MASK.int() * w).square().sum(),
    "norms of a list": lambda w: torch._foreach_norm([w, w * 2], INF)[1],
    "distance": lambda w: torch.dist(w, w * 2, INF),
    "prod": lambda w: (w + 1).prod(1).sum(),
    "chunk": lambda w: w.chunk(3)[1].square().sum(),
    "unbind": lambda w: w.unbind(0)[1].square().sum(),
    "cummax": lambda w: w.cummax(0).values.sum(),
}


def functions() -> Iterator[tuple[str, Made]]:
    for (first, make), dim, (then, change), (last, end) in product(FIRST.items(), DIMS, THEN.items(), LAST.items()):
        if then == "itself" or (last == "sum" and dim != 0) or (then == "neg" and dim == 0):
            yield f"{first} over {dim}, {then}, {last}", lambda w, make=make, dim=dim, change=change, end=end: end(change(make(w, dim=dim)))


def wrong(rank: int, options: dict[str, Any], step: int) -> tuple[int, list[str]]:
    """How many were tried, each step-th and all of WHOLE, and those whose number or gradient is not torch's own."""
    gingham.init(**options)
    twins = []
    for kind in (nn, torch.nn):
        torch.manual_seed(0)
        twins.append(kind.Linear(7, 11, dtype=torch.float64).weight)
    tried, found = 0, []
    for name, function in [*list(functions())[::step], *WHOLE.items()]:
        seen = []
        for weight in twins:
            value = function(weight)
            value = value.full_tensor() if isinstance(value, torch.distributed.tensor.DTensor) else value
            (gradient,) = torch.autograd.grad(value, weight)
            whole = gradient.full_tensor() if isinstance(gradient, torch.distributed.tensor.DTensor) else gradient
            seen.append((value.detach(), whole))
        tried += 1
        # a cast to float32 and back is what it says
        near = [torch.allclose(a, b, rtol=1e-6 if "cast" in name else 1e-9, atol=1e-10) for a, b in zip(*seen, strict=True)]
        if not all(near):
            found.append(name)
    return tried, found


GRIDS = [{"mode": "2d", "size": 4}]
MORE = [
    {"grid": (1, 5, 1)},
    {"mode": "2.5d", "size": 8, "depth": 2},
    {"mode": "3d", "size": 8},
    {"mode": "1d", "size": 8},
    {"grid": (1, 1, 3)},
]


@pytest.mark.parametrize("options", [*GRIDS, *(pytest.param(each, marks=pytest.mark.matrix) for each in MORE)], ids=str)
def test_parts_are_made_whole_before_what_is_not_linear(ranks: Any, options: dict[str, Any]) -> None:
    """Blocks are uneven, and vectors of 7 or 11 leave ranks of some grids with nothing."""
    size = options.get("size", prod(options.get("grid", (1,))))
    step = 4 if options in GRIDS else 1
    for tried, found in ranks(size)(wrong, options, step):
        assert found == [] and tried > 450 // step


def test_a_sum_of_parts_stays_one(ranks: Any) -> None:
    """Sums of squares are added up once, not one by one; a number read without full_tensor() is this rank's, with a warning."""

    def places(rank: int) -> list[str]:
        gingham.init("2d", size=4)
        first, second = nn.Linear(7, 11).weight, nn.Linear(7, 11).weight
        with pytest.warns(UserWarning, match="reads this rank's part only"):
            first.norm().item()
        with pytest.warns(UserWarning, match="reads this rank's part only"):
            assert f"{first.norm():.2f}" != f"{first.norm().full_tensor():.2f}" == f"{first.norm() + 0.0:.2f}"  # type: ignore[attr-defined]
        total: Any = (first.square().sum() + second.square().sum()) / 2
        return [type(place).__name__ for place in total.placements]

    assert ranks(4)(places) == [["Partial", "Partial"]] * 4
