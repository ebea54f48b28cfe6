"""Meshes: what modes mean, what is refused, scatter and gather on every grid, init after destroy."""

from typing import Any

import pytest
import torch

import gingham
from gingham.mesh import axes_of
from grids import GRIDS, every_grid, ranks_of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mode="2d", size=8), "nearest valid sizes: 1, 4, 9"),
        (dict(mode="2.5d", size=12, depth=2), "2, 8, 18"),
        (dict(mode="3d", size=9), "1, 8, 27"),
        (dict(mode="4d", size=9), "unknown mode"),
        (dict(mode="1d"), "needs size="),
        (dict(mode="1d", size=4, depth=2), "belongs to mode"),
        (dict(mode="2d", size=4, sequence=True), "belongs to mode"),
        (dict(mode=None, size=4), "without a mode"),
        (dict(mode=None, grid=(2, 2)), "three numbers"),
        (dict(mode=None, grid=(2, 2, 1), size=8), "has 4 ranks"),
        (dict(mode="2d", grid=(2, 2, 1), size=4), "exclude each other"),
    ],
)
def test_bad_numbers_are_refused_with_the_fix(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(gingham.MeshError, match=message):
        axes_of(**arguments)


def test_sequence_cuts_time_and_data_samples() -> None:
    axes = axes_of("sequence", 4, data=2)
    assert axes.sizes == {"data": 2, "m": 4} and axes.m == ("data", "m") and not axes.n and not axes.k
    assert axes.outer.cuts(3) == axes.outer.cuts(2, ids=True) + ((),) == (("data",), ("m",), ())
    assert axes.outer.cuts(2) == (("data", "m"), ()) and axes.outer.cuts(4, 2) == (("data",), (), ("m",), ())


def test_a_wrong_world_size_starts_nothing() -> None:
    with pytest.raises(gingham.MeshError, match="start 4 processes"):
        gingham.init(mode="2d", size=4)
    assert not torch.distributed.is_initialized()


def round_trips(rank: int, options: dict[str, Any]) -> list[str]:
    mesh = gingham.init(**options)
    wrong = []
    for rows, columns in ((37, 19), (16, 24), (2, 3)):
        full = torch.arange(rows * columns * 3.0).view(rows, 3, columns)
        for operand in ("x", "inner", "rows"):
            for dim in (0, 1):
                block = mesh.scatter(full, operand, dim)
                wrong += [f"{operand} {dim} {rows}"] if not torch.equal(mesh.gather(block, operand, dim), full) else []
        for operand in ("a", "b", "c"):
            block = mesh.scatter(full[:, 0], operand)
            wrong += [operand] if not torch.equal(mesh.gather(block, operand), full[:, 0]) else []
        ids = torch.arange(rows)
        wrong += ["ids"] if not torch.equal(mesh.gather(mesh.scatter(ids)), ids) else []
        x = full.clone().requires_grad_()
        (mesh.gather(mesh.scatter(x)) * full).sum().backward()
        wrong += ["gradient"] if not torch.equal(x.grad, full) else []
    own = torch.full((rank + 1, 2), float(rank))
    if not mesh.outer.features and mesh.outer.rows:
        # sizes that no rule gives: learned from the ranks
        expected = torch.cat([torch.full((other + 1, 2), float(other)) for other in range(mesh.size)])
        wrong += ["learned"] if not torch.equal(mesh.gather(own), expected) else []
    with pytest.raises(gingham.ShapeError, match=f"rank {rank} got features=3, but .* make 2"):
        mesh.gather(mesh.scatter(torch.ones(12, 2), "rows"), "rows", features=3)
    wrong += ["traffic"] if any(count for axis in mesh.traffic().values() for count in axis.values()) else []
    return wrong


@every_grid
def test_scatter_and_gather(ranks, name: str) -> None:
    assert ranks(ranks_of(name))(round_trips, GRIDS[name]) == [[]] * ranks_of(name)


def test_init_after_destroy_and_twice(ranks) -> None:
    def lives(rank: int) -> list[float]:
        sums = []
        for options in (dict(mode="2d", size=4), dict(mode="1d", size=4), dict(grid=(1, 2, 2))):
            mesh = gingham.init(**options)
            with pytest.raises(gingham.MeshError, match="twice"):
                gingham.init(**options)
            sums.append(mesh.gather(mesh.scatter(torch.ones(8, 8))).sum().item())
            gingham.destroy()
            with pytest.raises(gingham.MeshError, match="after destroy"):
                mesh.scatter(torch.ones(8, 8))
        gingham.destroy()
        return sums

    assert ranks(4)(lives) == [[64.0] * 3] * 4


def test_ranks_that_ask_for_different_meshes_all_raise(ranks) -> None:
    def differ(rank: int) -> str:
        with pytest.raises(gingham.MeshError) as caught:
            gingham.init(mode="1d", size=4, sequence=rank == 2)
        return str(caught.value)

    assert all("ranks [2]" in message for message in ranks(4)(differ))


def test_from_a_device_mesh(ranks) -> None:
    def make(rank: int) -> tuple[Any, ...]:
        from torch.distributed.device_mesh import init_device_mesh

        from gingham.launch import rendezvous

        rendezvous.make_process_group()
        mesh = gingham.init(init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("depth", "row", "col")))
        found = mesh.grid, mesh.coordinates, torch.equal(mesh.gather(mesh.scatter(torch.eye(8))), torch.eye(8))
        gingham.destroy()
        rendezvous.destroy_process_group()
        return found

    answers = ranks(8)(make)
    assert answers[5] == ((4, 2, 1), {"depth": 1, "row": 0, "col": 1}, True)


def test_scatter_refuses_what_is_not_a_local_tensor() -> None:
    mesh = gingham.init()
    try:
        layer = gingham.nn.Linear(4, 4)
        for bad in (layer.weight, torch.empty(2, 4, device="meta"), torch.ones(2, 4, dtype=torch.complex64)):
            with pytest.raises(TypeError, match="expected"):
                mesh.scatter(bad)
            with pytest.raises(TypeError, match="expected"):
                layer(bad)
        with pytest.raises(gingham.ShapeError):
            mesh.scatter(torch.ones(2, 4), operand="d")
    finally:
        gingham.destroy()
