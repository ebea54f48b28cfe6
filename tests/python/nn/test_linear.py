"""Linear in every mode, layout, swap and source: initial bits, outputs and gradients; the published shapes."""

from typing import Any

import pytest
import torch

import gingham
from grids import GRIDS, every_grid, ranks_of
from twins import compare, twins

SHAPES = [((37, 19), 53), ((8, 3, 24), 36), ((2, 5), 3)]
LAYOUTS = ["outer->outer", "outer->inner", "inner->outer"]


def every_way(rank: int, options: dict[str, Any], dtype: torch.dtype, source: str, slices: int) -> dict[str, float]:
    mesh = gingham.init(**options, source=source, slices=slices)
    errors = {}
    for layout in LAYOUTS:
        for swapped in (False, True):
            for shape, out in SHAPES:
                try:
                    ours, theirs = twins(
                        lambda shape=shape, out=out, layout=layout, swapped=swapped: gingham.nn.Linear(
                            shape[-1], out, layout=layout, swapped=swapped, dtype=dtype
                        ),
                        lambda shape=shape, out=out: torch.nn.Linear(shape[-1], out, dtype=dtype),
                    )
                except gingham.MeshError:
                    assert mesh.outer != mesh.inner and swapped != (layout == "inner->outer")
                    continue
                operands = tuple("inner" if end == "inner" else "x" for end in layout.split("->"))
                found = compare(mesh, ours, theirs, shape, operands, dtype)  # type: ignore[arg-type]
                errors |= {f"{name} {layout} {swapped} {shape}": error for name, error in found.items()}
    return errors


@pytest.mark.parametrize(
    ("dtype", "source", "slices", "limit"),
    [
        pytest.param(torch.float32, "window", 1, 1e-6, id="fp32-window"),
        pytest.param(torch.float64, "ring", 3, 1e-12, id="fp64-ring"),
    ],
)
@every_grid
def test_against_float64(ranks, name: str, dtype: torch.dtype, source: str, slices: int, limit: float) -> None:
    errors = ranks(ranks_of(name))(every_way, GRIDS[name], dtype, source, slices)[0]
    assert max(errors.values()) <= limit, {key: error for key, error in errors.items() if error > limit}


def residuals(rank: int, options: dict[str, Any]) -> float:
    mesh = gingham.init(**options)
    ours, theirs = twins(lambda: gingham.nn.Linear(19, 19, dtype=torch.float64), lambda: torch.nn.Linear(19, 19, dtype=torch.float64))
    return max(compare(mesh, ours, theirs, (13, 19), dtype=torch.float64, residual=True).values())


@every_grid
def test_x_plus_layer_of_x(ranks, name: str) -> None:
    assert max(ranks(ranks_of(name))(residuals, GRIDS[name])) <= 1e-12


@pytest.mark.parametrize("swapped", [False, True])
def test_published_shapes(ranks, swapped: bool) -> None:
    def shapes(rank: int) -> list[tuple[int, ...]]:
        mesh = gingham.init(parallel=dict(tensor=dict(size=8, mode="2.5d", depth=2)))
        first, second = gingham.nn.Linear(256, 1024), gingham.nn.Linear(1024, 256, swapped=swapped)
        x = mesh.scatter(torch.ones(16, 256))
        y = first(x)
        blocks = first.weight.to_local(), second.weight.to_local()
        return [tuple(each.shape) for each in (x, blocks[0], y, blocks[1], second(y), first.weight, second.weight)]

    expected = [(4, 128), (512, 128), (4, 512), (128, 512), (4, 128), (1024, 256), (256, 1024)]
    assert ranks(8)(shapes) == [expected] * 8


def test_auto_swaps_where_it_is_cheaper(ranks) -> None:
    def choices(rank: int) -> list[bool]:
        gingham.init(mode="2d", size=4)
        return [gingham.nn.Linear(64, out, swapped="auto").plan.swapped for out in (64, 95, 96, 256)]

    assert ranks(4)(choices)[0] == [True, True, False, False]


def frozen(rank: int, options: dict[str, Any]) -> list[int]:
    """Bytes received backward: with everything wanted, with W frozen, with X frozen."""
    mesh = gingham.init(**options)
    layer = gingham.nn.Linear(24, 24, bias=False)
    counts = []
    for need_x, need_w in ((True, True), (True, False), (False, True)):
        x = mesh.scatter(torch.ones(8, 24)).requires_grad_(need_x)
        layer.weight.requires_grad_(need_w)
        y = layer(x)
        mesh.traffic(reset=True)
        y.sum().backward()
        assert (x.grad is not None) == need_x and (layer.weight.grad is not None) == need_w
        layer.weight.grad = None
        counts.append(sum(axis["bytes_received"] for axis in mesh.traffic().values()))
    return counts


@pytest.mark.parametrize("name", ["2d", "2.5d"])
def test_frozen_operands_skip_their_traffic(ranks, name: str) -> None:
    both, only_x, only_w = ranks(ranks_of(name))(frozen, GRIDS[name])[0]
    assert 0 < only_x < both and 0 < only_w < both and both == only_x + only_w


def test_state_dict_and_dtype_changes_are_seen(ranks) -> None:
    def reloaded(rank: int) -> tuple[bool, bool]:
        mesh = gingham.init(mode="2d", size=4)
        layer, other = gingham.nn.Linear(8, 8), gingham.nn.Linear(8, 8)
        x = mesh.scatter(torch.ones(4, 8))
        other.load_state_dict(layer.state_dict(), assign=True)
        same = torch.equal(layer(x), other(x))
        wide = layer.double()(x.double())
        return same, wide.dtype == torch.float64 and torch.allclose(wide.float(), other(x), atol=1e-6)

    assert all(all(answer) for answer in ranks(4)(reloaded))
