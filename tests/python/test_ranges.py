"""What torch.profiler sees of layers (C10), and swapped="auto" by counted bytes (A16)."""

from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from grids import GRIDS, ranks_of


def profiled(rank: int) -> tuple[list[str], int]:
    mesh = gingham.init(**GRIDS["2d"])
    model = torch.nn.Sequential()
    model.add_module("fc1", nn.Linear(16, 32))
    model.add_module("norm", nn.LayerNorm(32))
    mesh.traffic(reset=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(mesh.scatter(torch.randn(8, 16))).sum().backward()
    names = [event.name for event in profile.events() if event.name.startswith("gingham::")]
    return names, sum(axis["bytes_received"] for axis in mesh.traffic().values())


def test_c10_layers_have_ranges_with_their_name_and_bytes(ranks) -> None:
    for names, received in ranks(4)(profiled):
        for name in ("gingham::linear[fc1]", "gingham::linear.backward[fc1]", "gingham::layernorm[norm]"):
            assert name in names, names
        counted = [int(name.split()[1]) for name in names if name.startswith("gingham::received")]
        assert len(counted) == 3 and 0 < sum(counted) <= received and max(counted) > 0, (names, received)


def counted(rank: int, options: dict[str, Any], sizes: list[tuple[int, int]]) -> list[dict[str, int]]:
    """Bytes that all ranks receive in a step, by what swapped says."""
    mesh, found = gingham.init(**options), []
    for into, out in sizes:
        bytes_by = {}
        for swapped in (False, True, "auto"):
            layer = nn.Linear(into, out, bias=False, swapped=swapped)
            x = mesh.scatter(torch.randn(24, into)).requires_grad_()
            mesh.traffic(reset=True)
            layer(x).sum().backward()
            mine = sum(axis["bytes_received"] for axis in mesh.traffic().values())
            bytes_by[str(swapped)] = sum(each for (each,) in mesh.world.sizes([mine]))
        found.append(bytes_by)
    return found


@pytest.mark.parametrize(
    "name", ["1d", "2d", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("1d sequence", "2.5d", "3d", "3x2x2"))]
)
def test_a16_auto_takes_the_way_that_moves_less(ranks, name: str) -> None:
    sizes = [(4, 8), (8, 4), (8, 8), (24, 32), (24, 36), (36, 24), (12, 96), (96, 12)]
    for size, found in zip(sizes, ranks(ranks_of(name))(counted, GRIDS[name], sizes)[0], strict=True):
        assert found["auto"] == min(found["False"], found["True"]), (size, found)
