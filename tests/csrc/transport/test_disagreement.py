"""One rank whose call differs: a typed error on every rank that names the odd one and both values, before the first wrong byte."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from grids import GRIDS, ranks_of

LIMIT = 1.0  # seconds


def product(m: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> Callable[[gingham.Mesh], Any]:
    """A matmul of global shape (m, k, n) from blocks scattered before the call."""

    def prepare(mesh: gingham.Mesh) -> Any:
        a, b = mesh.scatter(torch.ones(m, k, dtype=dtype), "a"), mesh.scatter(torch.ones(k, n, dtype=dtype), "b")
        return lambda: gingham.matmul(a, b, shape=(m, k, n))

    return prepare


def layer(width: int, out: int, rows: int = 8, dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[gingham.Mesh], Any]:
    def prepare(mesh: gingham.Mesh) -> Any:
        made, x = nn.Linear(width, out, dtype=dtype, **options), mesh.scatter(torch.ones(rows, width, dtype=dtype))
        return lambda: made(x)

    return prepare


def backward(out: int) -> Callable[[gingham.Mesh], Any]:
    def prepare(mesh: gingham.Mesh) -> Any:
        made = nn.Linear(8, 8, layout="outer->inner"), nn.Linear(8, 8, bias=False, layout="outer->inner")
        x = mesh.scatter(torch.ones(8, 8)).requires_grad_()
        y = made[0](x), made[1](x)
        return lambda: y[out].sum().backward()

    return prepare


def norm(width: int) -> Callable[[gingham.Mesh], Any]:
    def prepare(mesh: gingham.Mesh) -> Any:
        made, x = nn.LayerNorm(width), mesh.scatter(torch.ones(8, width))
        return lambda: made(x)

    return prepare


def gather(mesh: gingham.Mesh) -> Any:
    x = mesh.scatter(torch.ones(8, 8))
    return lambda: mesh.gather(x)


# what the others call, what the odd one calls, two words that the message must hold: both values
CASES: dict[str, tuple[Any, Any, tuple[str, str]]] = {
    "K": (product(8, 8, 8), product(8, 16, 8), ("K=8", "K=16")),
    "N": (product(8, 8, 8), product(8, 8, 12), ("N=8", "N=12")),
    "dtype": (product(8, 8, 8), product(8, 8, 8, torch.float64), ("float32", "float64")),
    "layer's out": (layer(8, 8), layer(8, 16), ("N=8", "N=16")),
    "layer's dtype": (layer(8, 8), layer(8, 8, dtype=torch.float64), ("float32", "float64")),
    "op": (product(8, 8, 8), gather, ("matmul", "all_gather")),
    "layer or matmul": (layer(8, 8), product(8, 8, 8), ("linear", "matmul")),
    "order": (norm(8), layer(8, 8), ("LayerNorm #0", "linear")),
    "swapped": (layer(8, 8), layer(8, 8, swapped=True), ("swapped=False", "swapped=True")),
    "which gradient": (backward(0), backward(1), ("input's gradient", "backward")),
}
TYPICAL = {"K", "dtype", "op", "which gradient"}
every_case = pytest.mark.parametrize("case", [pytest.param(case, marks=[] if case in TYPICAL else [pytest.mark.matrix]) for case in CASES])


def differ(rank: int, options: dict[str, Any], case: str, odd: int, source: str) -> tuple[str, str, float, int]:
    """Error type, message, seconds in the call, bytes received on the axes shared with the odd rank."""
    mesh = gingham.init(**options, source=source)
    usual, other, _ = CASES[case]
    call = (other if rank == odd else usual)(mesh)
    mesh.traffic(reset=True)
    start = time.monotonic()
    try:
        mesh.gather(mesh.scatter(torch.ones(8, 8)))
        start = time.monotonic()
        call()
        # a rank that exchanges nothing with the odd one in this call learns of it in the next
        for _ in range(2):
            mesh.gather(mesh.scatter(torch.ones(8, 8)))
    except Exception as error:
        took = time.monotonic() - start
        return type(error).__name__, str(error), took, bytes_beside(mesh, rank, odd)
    return "nothing", "", time.monotonic() - start, bytes_beside(mesh, rank, odd)


def bytes_beside(mesh: gingham.Mesh, rank: int, odd: int) -> int:
    """Bytes received on axes whose members of this rank include the odd one."""
    total = 0
    for key, count in mesh.traffic().items():
        names = {"m": mesh.axes.m, "world": tuple(mesh.sizes), "features": mesh.axes.n + mesh.axes.k}.get(key, (key,))
        place = {name: (odd // stride) % mesh.sizes[name] for name, stride in strides(mesh).items()}
        if all(place[name] == mesh.coordinates[name] for name in mesh.sizes if name not in names):
            total += count["bytes_received"]
    return total


def strides(mesh: gingham.Mesh) -> dict[str, int]:
    found, stride = {}, 1
    for name in reversed(list(mesh.sizes)):
        found[name], stride = stride, stride * mesh.sizes[name]
    return found


def check(ranks: Any, name: str, case: str, odd: int, source: str = "window") -> None:
    if case == "swapped" and name not in ("2d", "2.5d"):
        pytest.skip("elsewhere the layout decides")
    outcomes = ranks(ranks_of(name))(differ, GRIDS[name], case, odd, source, timeout=20.0)
    one, other = CASES[case][2]
    for rank, (kind, message, took, received) in enumerate(outcomes):
        assert kind in ("ShapeError", "MeshError"), (rank, kind, message)
        assert f"rank {odd} got" in message and one in message and other in message, message
        assert f"rank {rank}:" in message and "every rank" in message, message
        assert took <= LIMIT and received == 0, (rank, took, received, message)


@every_case
def test_the_odd_rank_is_named_by_all(ranks, case: str) -> None:
    check(ranks, "2d", case, 2)


@pytest.mark.matrix
@pytest.mark.parametrize("source", ["window", "ring"])
@pytest.mark.parametrize("name", ["1d", "1d sequence", "2.5d", "3d", "1x3x2"])
@pytest.mark.parametrize("case", CASES)
def test_the_odd_rank_in_every_mode(ranks, name: str, case: str, source: str) -> None:
    for odd in (0, ranks_of(name) - 1):
        check(ranks, name, case, odd, source)


def test_a_tie_names_both(ranks) -> None:
    outcomes = ranks(2)(differ, dict(grid=(1, 2, 1), size=2), "K", 1, "window", timeout=20.0)
    for kind, message, took, received in outcomes:
        assert kind == "ShapeError" and "rank 1 got" in message and "rank 0 got" in message, message
        assert "K=8" in message and "K=16" in message and took <= LIMIT and received == 0


def rows_differ(rank: int, name: str, odd: int) -> tuple[str, str, float, int]:
    mesh = gingham.init(**GRIDS[name])
    made = nn.Linear(8, 8, layout="inner->outer" if name == "1d" else "outer->inner")
    x = mesh.scatter(torch.ones(8, 8), "inner" if name == "1d" else "x")
    mesh.checks = None  # which would tell the rank itself first
    x = x if rank != odd else torch.cat([x, x])
    start = time.monotonic()
    try:
        made(x)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start, bytes_beside(mesh, rank, odd)
    return "nothing", "", 0.0, 0


# the axis over which rows are shared: of a gathered X (2d, 1x3x2), of a Y that is summed at the end of the step (1d)
@pytest.mark.parametrize("name", ["2d", "1x3x2", "1d"])
def test_rows_that_differ_among_ranks_that_share_them(ranks, name: str) -> None:
    odd = ranks_of(name) - 1
    outcomes = ranks(ranks_of(name))(rows_differ, name, odd, timeout=20.0)
    for kind, message, took, received in outcomes:
        assert kind == "ShapeError" and took <= LIMIT and received == 0, outcomes
        usual = 4 if name == "2d" else 8
        assert f"rank {odd} got" in message and f"rows={2 * usual}" in message and f"rows={usual}" in message, message


@pytest.mark.parametrize(
    "option", [dict(slices=2), dict(source="ring"), dict(timeout=5.0), dict(link=(1e-5, 1e9))], ids=lambda option: next(iter(option))
)
def test_configurations_that_differ_are_refused_by_init(ranks, option: dict[str, Any]) -> None:
    def start(rank: int) -> tuple[str, float]:
        began = time.monotonic()
        with pytest.raises(gingham.MeshError) as caught:
            gingham.init(mode="1d", size=3, **(option if rank == 1 else {}))
        gingham.init(mode="1d", size=3)
        return str(caught.value), time.monotonic() - began

    for message, _ in ranks(3)(start, timeout=20.0):
        assert "ranks [1] called init differently" in message and "the others" in message


def test_traffic_goes_on_after_a_new_init(ranks) -> None:
    def again(rank: int) -> bool:
        mesh = gingham.init(**GRIDS["2d"])
        x = mesh.scatter(torch.ones(8, 8), "a")
        with pytest.raises(gingham.ShapeError):
            gingham.matmul(x.double() if rank == 1 else x, mesh.scatter(torch.ones(8, 8), "b"))
        gingham.destroy()
        mesh = gingham.init(**GRIDS["2d"])
        c = gingham.matmul(mesh.scatter(torch.ones(8, 8), "a"), mesh.scatter(torch.ones(8, 8), "b"))
        return bool((mesh.gather(c, "c") == 8).all())

    assert all(ranks(4)(again))
