"""Whole programs on several hosts give the bits of one host: the GPT, a converted model, checkpoints, torch.compile, several meshes."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import families
import gingham
from gingham import nn
from gingham.commands import gpt
from grids import GRIDS
from virtual import ENGINES, on_host, split

Hosts = tuple[int, ...]
mostly_ucx = pytest.mark.parametrize("engine", ["ucx", pytest.param("gloo", marks=pytest.mark.matrix)])
TWO_OF_FOUR, FOUR_OF_TWO = split(4, 4), split(2, 2, 2, 2)


def gpt_losses(rank: int, grid: dict[str, Any], hosts: Hosts, engine: str) -> list[float]:
    with on_host(rank, hosts, engine):
        mesh = gingham.init(**grid, timeout=30.0)
    torch.manual_seed(3)
    model = gpt.GPT(gpt.parallel_kit(mesh), gpt.Shape(layers=2, width=64, heads=8, context=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        tokens = torch.randint(gpt.VOCABULARY, (7, 17))
        ids, target = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss = model.loss(model(mesh.scatter(ids)), mesh.scatter(target) if mesh.inner.rows else target)
        optimizer.zero_grad()
        loss.backward()
        gingham.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@mostly_ucx
@pytest.mark.parametrize("name", ["2.5d", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("2.5d sharded", "3d"))])
def test_the_gpt_trains_to_the_bit(ranks, name: str, engine: str) -> None:
    alone = ranks(8)(gpt_losses, GRIDS[name], (), "")
    hosts = TWO_OF_FOUR if engine == "ucx" else FOUR_OF_TWO
    assert ranks(8)(gpt_losses, GRIDS[name], hosts, engine) == alone


def converted(rank: int, family: str, grid: dict[str, Any], hosts: Hosts, engine: str) -> tuple[list[float], list[torch.Tensor]]:
    with on_host(rank, hosts, engine):
        mesh = gingham.init(**grid, timeout=30.0)
    torch.manual_seed(rank)  # parallelize sends rank 0's weights to all
    model = gingham.parallelize(families.build(family, dropout=0.1), mesh)
    losses = families.curve(model, family, 2)
    return losses, [weight.full_tensor() if hasattr(weight, "full_tensor") else weight for weight in model.parameters()]


@pytest.mark.parametrize("family", ["gpt2", *(pytest.param(each, marks=pytest.mark.matrix) for each in ("llama", "bert", "vit"))])
def test_a_converted_model_trains_to_the_bit(ranks, family: str) -> None:
    alone = ranks(8)(converted, family, GRIDS["2.5d"], (), "")
    for engine, hosts in zip(ENGINES, (TWO_OF_FOUR, FOUR_OF_TWO), strict=True):
        for (losses, weights), (right, expected) in zip(ranks(8)(converted, family, GRIDS["2.5d"], hosts, engine), alone, strict=True):
            assert losses == right
            assert all(torch.equal(one, other) for one, other in zip(weights, expected, strict=True))


def saved(rank: int, hosts: Hosts, engine: str, folder: str, then: str) -> list[torch.Tensor]:
    """Saves after a step, or loads; the weights and the optimizer's state, whole."""
    with on_host(rank, hosts, engine):
        mesh = gingham.init(**GRIDS["2.5d"], timeout=30.0)
    torch.manual_seed(1 if then == "save" else 2)
    model = torch.nn.Sequential(nn.MLP(24, 37), nn.LayerNorm(24), nn.Linear(24, 19))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if then == "save":
        model(mesh.scatter(torch.randn(8, 24))).square().sum().backward()
        optimizer.step()
        gingham.save(model, optimizer, folder)
    else:
        gingham.load(model, optimizer, folder)
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    return [x.full_tensor().detach() for x in (*model.parameters(), *moments)]


@mostly_ucx
@pytest.mark.parametrize(
    ("before", "after"),
    [((), TWO_OF_FOUR), (FOUR_OF_TWO, ()), pytest.param(split(5, 3), split(1, 7), marks=pytest.mark.matrix)],
    ids=str,
)
def test_checkpoints_open_on_other_hosts(ranks, tmp_path: Path, before: Hosts, after: Hosts, engine: str) -> None:
    written = ranks(8)(saved, before, engine, str(tmp_path / "checkpoint"), "save")
    read = ranks(8)(saved, after, engine, str(tmp_path / "checkpoint"), "load")
    assert all(torch.equal(one, other) for one, other in zip(written[0], read[0], strict=True))


def compiled(rank: int, hosts: Hosts, engine: str) -> bool:
    with on_host(rank, hosts, engine):
        mesh = gingham.init(**GRIDS["2d"], timeout=60.0)
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 24, epilogue="gelu"), mesh.scatter(torch.randn(8, 16))
    eager = layer(x)
    eager.sum().backward()
    gradient = layer.weight.grad.to_local().clone()
    layer.zero_grad()
    fused = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    fused.sum().backward()
    return torch.equal(eager, fused) and torch.equal(gradient, layer.weight.grad.to_local())


@pytest.mark.matrix
@pytest.mark.parametrize("engine", ENGINES)
def test_a_compiled_layer_has_the_bits_of_eager(ranks, engine: str) -> None:
    assert all(ranks(4)(compiled, split(2, 2), engine))
    ranks(4).stop()  # dynamo's guards hold copies of meshes


def checked(rank: int, hosts: Hosts, engine: str) -> list[Any]:
    """Under GINGHAM_CHECK=1: a right step, then full tensors that differ between ranks, then a mean of a block."""
    os.environ["GINGHAM_CHECK"] = "1"
    try:
        with on_host(rank, hosts, engine):
            mesh = gingham.init(**GRIDS["2d"], timeout=30.0)
    finally:
        del os.environ["GINGHAM_CHECK"]
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    for _ in range(3):
        layer(mesh.scatter(torch.ones(8, 16))).sum().backward()
    said: list[Any] = []
    for wrong in (
        lambda: layer(mesh.scatter(torch.ones(8, 16))).mean().backward(),
        lambda: mesh.scatter(torch.full((8, 16), float(rank == 3))),
    ):
        try:
            wrong()
            said.append("nothing")
        except gingham.LayoutError as error:
            said.append(str(error))
    return said


@mostly_ucx
def test_the_check_works_on_several_hosts(ranks, engine: str) -> None:
    for rank, (block, other) in enumerate(ranks(4)(checked, split(2, 2), engine)):
        assert "mean" in block, (rank, block)
        assert "ranks [3]" in other, (rank, other)


def two_meshes(rank: int, hosts: Hosts, engine: str) -> list[Any]:
    """Ranks 0, 1 | 2, 3 are inside a host, 0, 2 | 1, 3 across hosts; then one of all."""
    row = rank // 2 * 2
    with on_host(rank, hosts, engine):
        inside = gingham.init(mode="1d", size=2, ranks=(row, row + 1), timeout=30.0)
        across = gingham.init(mode="1d", size=2, ranks=(rank % 2, rank % 2 + 2), default=False, timeout=30.0)
        both = gingham.init(mode="2.5d", size=4, depth=4, default=False, timeout=30.0)
    found: list[Any] = []
    for seed, mesh in enumerate((inside, across, both, inside)):
        torch.manual_seed(seed)
        first = nn.Linear(16, 32, mesh=mesh, layout="outer->inner")
        second = nn.Linear(32, 16, mesh=mesh, layout="inner->outer")
        y = mesh.gather(second(first(mesh.scatter(torch.randn(8, 16)))))
        y.square().sum().backward()
        found += [y.detach(), first.weight.grad.full_tensor(), second.weight.grad.full_tensor()]
    crossed = [mesh.traffic().get("tp", {}).get("bytes_crossed", 0) for mesh in (inside, across)]
    assert not hosts or (crossed[0] == 0 and crossed[1] > 0), crossed
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_meshes_inside_a_host_and_across(ranks, engine: str) -> None:
    alone = ranks(4)(two_meshes, (), "")
    for one, other in zip(alone, ranks(4)(two_meshes, split(2, 2), engine), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def lives(rank: int, hosts: Hosts, engine: str, count: int) -> tuple[list[tuple[int, int]], float]:
    """Descriptors and threads of this process after each life, and the seconds of the last ones."""
    seen, start = [], 0.0
    for number in range(count):
        if number == 3:
            start = time.monotonic()
        with on_host(rank, hosts, engine):
            mesh = gingham.init(**GRIDS["2d"], timeout=30.0)
        nn.Linear(8, 8)(mesh.scatter(torch.ones(4, 8))).sum().backward()
        gingham.destroy()
        seen.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    return seen, (time.monotonic() - start) / max(1, count - 3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.matrix)])
def test_many_lives_leave_nothing_behind(ranks, engine: str, count: int) -> None:
    before = sorted(os.listdir("/dev/shm"))
    for rank, (seen, seconds) in enumerate(ranks(4)(lives, split(2, 2), engine, count)):
        print(f"{engine}: rank {rank}, descriptors and threads {seen[0]} to {seen[-1]}, {seconds:.2f} s a life")
        assert seen[-1][0] <= seen[2][0] and seen[-1][1] <= seen[2][1], (rank, seen)
    assert sorted(os.listdir("/dev/shm")) == before
