"""MLP, attention and LayerNorm in every mode against torch.nn in float64; initial bits; what attention refuses."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gingham
from gingham import nn
from gingham.commands.gpt import SerialAttention, SerialMLP
from grids import GRIDS, every_grid, ranks_of
from twins import compare, twins


def layers(rank: int, options: dict[str, Any]) -> dict[str, float]:
    mesh = gingham.init(**options)
    errors = {}
    for batch, width in ((7, 24), (8, 24), (7, 19), (3, 5)):
        cases: list[tuple[str, Any, Any, tuple[str, str]]] = [
            ("norm", lambda w=width: nn.LayerNorm(w), lambda w=width: torch.nn.LayerNorm(w), ("x", "x")),
            ("norm inner", lambda w=width: nn.LayerNorm(w, layout="inner"), lambda w=width: torch.nn.LayerNorm(w), ("inner", "inner")),
        ]
        for swapped in (None, "auto"):
            cases.append(
                (
                    f"mlp {swapped}",
                    lambda w=width, s=swapped: nn.MLP(w, 2 * w + 3, swapped=s),
                    lambda w=width: SerialMLP(w, 2 * w + 3),
                    ("x", "x"),
                )
            )
            if width == 24:
                cases.append(
                    (
                        f"attention {swapped}",
                        lambda s=swapped: nn.SelfAttention(24, 12, swapped=s),
                        lambda: SerialAttention(24, 12),
                        ("x", "x"),
                    )
                )
        for kind, make, reference, operands in cases:
            ours, theirs = twins(make, reference)
            found = compare(mesh, ours, theirs, (batch, 5, width), operands, residual=True)
            errors |= {f"{kind} {batch} {width} {name}": error for name, error in found.items()}
    return errors


@every_grid
def test_against_float64(ranks, name: str) -> None:
    errors = ranks(ranks_of(name))(layers, GRIDS[name])[0]
    assert max(errors.values()) <= 2e-6, {key: error for key, error in errors.items() if error > 2e-6}


def test_norm_keeps_its_digits_far_from_zero(ranks) -> None:
    def offset(rank: int) -> float:
        mesh = gingham.init(mode="2.5d", size=8, depth=2)
        torch.manual_seed(0)
        full = torch.randn(16, 64) + 1000
        got = mesh.gather(nn.LayerNorm(64)(mesh.scatter(full)))
        exact = F.layer_norm(full.double(), (64,))
        return float((got - exact).norm() / exact.norm())

    assert max(ranks(8)(offset)) <= 1e-6


def test_heads_that_do_not_divide_name_the_valid_counts(ranks) -> None:
    def refuse(rank: int) -> str:
        gingham.init(mode="2d", size=4)
        with pytest.raises(gingham.ShapeError) as caught:
            nn.SelfAttention(24, 3)
        return str(caught.value)

    assert "[2, 4, 6, 8, 12, 24]" in ranks(4)(refuse)[0]


def test_attention_with_dropout_has_serial_bits_of_mask(ranks) -> None:
    def attend(rank: int, options: dict[str, Any]) -> torch.Tensor:
        mesh = gingham.init(**options)
        torch.manual_seed(5)
        layer = nn.SelfAttention(24, 4, dropout=0.4, dtype=torch.float64)
        return mesh.gather(layer(mesh.scatter(torch.randn(6, 5, 24, dtype=torch.float64))))

    serial = ranks(1)(attend, {})[0]
    for name in ("2.5d", "3d"):
        for got in ranks(ranks_of(name))(attend, GRIDS[name]):
            torch.testing.assert_close(got, serial, rtol=1e-12, atol=1e-12)
