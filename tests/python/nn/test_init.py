"""Parameters drawn again after construction: one process's bits on every grid, by nn.init, torch.nn.init and reset_parameters (A13)."""

from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from grids import GRIDS, ranks_of


def initialised(rank: int, options: dict[str, Any]) -> dict[str, bool]:
    """Parameters drawn again after construction, beside torch.nn's (A13)."""
    gingham.init(**options)
    good = {}
    functions = {
        "normal_": lambda init, w: init.normal_(w, std=0.02),
        "uniform_": lambda init, w: init.uniform_(w, -1, 2),
        "kaiming_uniform_": lambda init, w: init.kaiming_uniform_(w, a=2.0),
        "xavier_normal_": lambda init, w: init.xavier_normal_(w),
        "constant_": lambda init, w: init.constant_(w, 3.0),
    }
    whole_only = {
        "orthogonal_": lambda init, w: init.orthogonal_(w),
        "trunc_normal_": lambda init, w: init.trunc_normal_(w),
        "eye_": lambda init, w: init.eye_(w),
        "sparse_": lambda init, w: init.sparse_(w, 0.5),
    }
    ours, theirs = nn.Linear(13, 37), torch.nn.Linear(13, 37)
    for name, function in {**functions, **whole_only}.items():
        for inits in [nn.init] + [torch.nn.init] * (name in functions):
            torch.manual_seed(4)
            function(inits, ours.weight)
            torch.manual_seed(4)
            function(torch.nn.init, theirs.weight)
            good[f"{inits.__name__} {name}"] = torch.equal(ours.weight.full_tensor(), theirs.weight)
    pairs = [(nn.Linear(13, 37), torch.nn.Linear(13, 37)), (nn.Embedding(19, 13, padding_idx=3), torch.nn.Embedding(19, 13, padding_idx=3))]
    pairs += [(nn.LayerNorm(13), torch.nn.LayerNorm(13)), (nn.RMSNorm(13), torch.nn.RMSNorm(13))]
    for ours, theirs in pairs:
        torch.manual_seed(5)
        ours.reset_parameters()
        torch.manual_seed(5)
        theirs.reset_parameters()
        same = [torch.equal(a.full_tensor(), b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
        good[f"reset {type(ours).__name__}"] = all(same) and isinstance(ours, type(theirs))
    generator = torch.Generator().manual_seed(11)
    ours, theirs = nn.Linear(13, 37), torch.nn.Linear(13, 37)
    torch.nn.init.normal_(ours.weight, generator=generator)
    torch.nn.init.normal_(theirs.weight, generator=generator.manual_seed(11))
    good["generator="] = torch.equal(ours.weight.full_tensor(), theirs.weight)

    def initialise(module: torch.nn.Module) -> None:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, 0.0, 0.5)
            torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Embedding | torch.nn.LayerNorm):
            torch.nn.init.uniform_(module.weight)

    models = []
    for kind in (nn, torch.nn):
        torch.manual_seed(6)
        made = torch.nn.Sequential(kind.Embedding(19, 12), kind.LayerNorm(12), kind.Linear(12, 24), kind.Dropout(0.1))
        models.append(made.apply(initialise))
    same = [torch.equal(a.full_tensor(), b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)]
    good["model.apply"] = all(same)
    return good


@pytest.mark.parametrize(
    "name", ["2d", "3x2x2", pytest.param("1d", marks=pytest.mark.matrix), pytest.param("2.5d", marks=pytest.mark.matrix)]
)
def test_a13_parameters_drawn_after_construction_have_one_process_bits(ranks, name: str) -> None:
    for good in ranks(ranks_of(name))(initialised, GRIDS[name]):
        assert all(good.values()), [case for case, value in good.items() if not value]
