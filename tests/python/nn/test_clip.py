"""clip_grad_norm_ counts replicas once and scales as torch's does."""

from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from grids import GRIDS, ranks_of, relative, whole


def clipped(rank: int, options: dict[str, Any]) -> tuple[list[float], float]:
    mesh = gingham.init(**options)
    found, worst = [], 0.0
    for norm_type in (2.0, 3.0, torch.inf):
        torch.manual_seed(2)
        ours = torch.nn.Sequential(nn.Linear(19, 53), nn.LayerNorm(53))
        torch.manual_seed(2)
        theirs = torch.nn.Sequential(torch.nn.Linear(19, 53), torch.nn.LayerNorm(53)).double()
        x = torch.randn(7, 19)
        mesh.gather(ours(mesh.scatter(x))).pow(3).sum().backward()
        theirs(x.double()).pow(3).sum().backward()
        got = gingham.clip_grad_norm_(ours.parameters(), 0.7, norm_type)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.7, norm_type)
        found += [float(got)]
        worst = max(
            worst,
            relative(got, expected),
            *(relative(whole(a.grad), b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)),
        )
    return found, worst


@pytest.mark.parametrize("name", ["one", "1d", "2.5d", "2.5d sharded", "3x2x2"])
def test_equals_serial_and_is_the_same_number_everywhere(ranks, name: str) -> None:
    answers = ranks(ranks_of(name))(clipped, GRIDS[name])
    assert all(found == answers[0][0] and worst <= 2e-6 for found, worst in answers), answers


def torchs_arguments(rank: int, options: dict[str, Any]) -> dict[str, str]:
    """What torch's arguments give where a gradient is not finite, on one rank's block only."""
    mesh, said = gingham.init(**options), {}
    for value in (float("nan"), float("inf")):
        torch.manual_seed(2)
        layer = nn.Linear(8, 8, bias=False)
        layer(mesh.scatter(torch.ones(8, 8))).sum().backward()
        if rank == 1:
            layer.weight.grad.to_local()[0, 0] = value
        before = layer.weight.grad.to_local().clone()
        try:
            gingham.clip_grad_norm_(layer.parameters(), 1.0, 2.0, error_if_nonfinite=True, foreach=True)
        except RuntimeError as error:
            said[f"{value}"] = str(error)
        assert torch.equal(before, layer.weight.grad.to_local()) or rank == 1, "a refused clip changed a gradient"
        norm = gingham.clip_grad_norm_(layer.parameters(), 1.0, error_if_nonfinite=False, foreach=False)
        said[f"{value} norm"] = str(float(norm))
    with pytest.raises(ValueError, match="norm_type=0.0"):
        gingham.clip_grad_norm_(layer.parameters(), 1.0, 0.0)
    return said


def test_c8_error_if_nonfinite_and_foreach_are_torchs(ranks) -> None:
    for rank, said in enumerate(ranks(4)(torchs_arguments, GRIDS["2d"])):
        assert all("non-finite" in said[value] and f"rank {rank}" in said[value] for value in ("nan", "inf")), said
        assert said["nan norm"] == "nan" and said["inf norm"] == "inf", said
