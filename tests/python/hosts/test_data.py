"""Data, or stages, across hosts and tensor ranks inside: what crosses is what the planner says, to the byte, and all of it over data, or
behind stages."""

from typing import Any

import pytest
import torch

import gingham
from gingham.mesh.layout import coordinates_of
from gingham.mesh.modes import GridShape, axes_of
from gingham.plan.hosts import crossed_by_stages, crossed_words
from virtual import on_host, split

M, K, N = 48, 32, 64
TENSOR: dict[str, tuple[int, dict[str, Any]]] = {
    "none": (1, dict(size=1)),
    "1d": (2, dict(size=2, mode="1d")),
    "1d sequence": (2, dict(size=2, mode="1d", sequence=True)),
    "2d": (4, dict(size=4, mode="2d")),
    "1x2x2": (4, dict(grid=(1, 2, 2))),
}
QUICK = {("1d", None), ("2d", "state")}
CASES = [
    pytest.param(name, shard, marks=[] if (name, shard) in QUICK else [pytest.mark.matrix])
    for name in TENSOR
    for shard in (None, "state", "all")
]


def crossed(rank: int, config: dict[str, Any], hosts: tuple[int, ...], engine: str) -> dict[str, int]:
    """Bytes by axis of a pair of linear maps, forward and backward."""
    with on_host(rank, hosts, engine):
        mesh = gingham.init(parallel=config, timeout=30.0)
    pair = [gingham.nn.Linear(K, N, bias=False, layout="outer->inner"), gingham.nn.Linear(N, K, bias=False, layout="inner->outer")]
    x = mesh.scatter(torch.ones(M, K)).requires_grad_()
    mesh.traffic(reset=True)
    pair[1](pair[0](x)).sum().backward()
    for layer in pair:
        layer.weight.grad.to_local().sum()
    return {axis: counts["bytes_crossed"] for axis, counts in mesh.traffic().items() if counts.get("bytes_crossed")}


@pytest.mark.parametrize(("name", "shard"), CASES)
@pytest.mark.parametrize("engine", ["ucx", pytest.param("gloo", marks=pytest.mark.matrix)])
def test_crossed_bytes_of_data_across_hosts(ranks, name: str, shard: str | None, engine: str) -> None:
    size, tensor = TENSOR[name]
    answers = ranks(2 * size)(crossed, dict(data=dict(size=2, shard=shard), tensor=tensor), split(size, size), engine)
    grid = GridShape(axes_of(**{"mode": None, **tensor}, data=2, shard=shard))
    hosts = [coordinates_of(index, grid.sizes)["data"] for index in range(grid.size)]  # by place in the mesh
    words = crossed_words(grid, hosts, (M * K // grid.size, M * N // grid.size, K * N // grid.size))
    assert sum(sum(each.values()) for each in answers) == 4 * words > 0
    assert all(axis in ("data", "replicas", "again", "m", "rows") for each in answers for axis in each), answers


def waits(rank: int, config: dict[str, Any], hosts: tuple[int, ...], engine: str) -> tuple[dict[str, dict[str, int]], float]:
    """How often this rank's main thread waits for ranks of other hosts in each part of a training step, by axis; and the loss."""
    from gingham.commands.gpt import GPT, Shape, parallel_kit

    with on_host(rank, hosts, engine):
        mesh = gingham.init(parallel=config, timeout=30.0)
    torch.manual_seed(0)
    model = GPT(parallel_kit(mesh), Shape(layers=2, width=32, heads=4, context=16, dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(256, (6, 17), generator=torch.Generator().manual_seed(7))
    axes = {**mesh._keys, "world": mesh.world}
    before: dict[str, int] = {}
    counts: dict[str, dict[str, int]] = {}

    def note(part: str) -> None:
        now = {name: axis.calls for name, axis in axes.items() if axis.crosses}
        counts[part] = {name: number - before.get(name, 0) for name, number in now.items() if number != before.get(name, 0)}
        before.update(now)

    for _ in range(3):
        optimizer.zero_grad()
        ids, targets = mesh.scatter(tokens[:, :-1].contiguous()), mesh.scatter(tokens[:, 1:].contiguous())
        note("between")
        logits = model(ids)
        note("forward")
        loss = model.loss(logits, targets)
        note("loss")
        loss.backward()
        note("backward")
        optimizer.step()
        note("step")
    return counts, loss.item()


@pytest.mark.parametrize(("name", "shard"), CASES)
@pytest.mark.parametrize("engine", ["ucx", pytest.param("gloo", marks=pytest.mark.matrix)])
def test_no_layer_waits_for_another_host(ranks, name: str, shard: str | None, engine: str) -> None:
    """But for sizes, once a forward pass, the sum that is the loss, and weights that are gathered as they are used."""
    size, tensor = TENSOR[name]
    serial = serial_loss()
    answers = ranks(2 * size)(waits, dict(data=dict(size=2, shard=shard), tensor=tensor), split(size, size), engine)
    for counts, loss in answers:
        assert abs(loss - serial) < 1e-5
        assert counts["between"] == counts["step"] == {}
        assert sum(counts["loss"].values()) == 1
        if shard is None:
            assert (counts["forward"], counts["backward"]) == ({"world": 1}, {}), counts
        if shard == "state":
            assert counts["backward"] == {}, counts


def serial_loss() -> float:
    from gingham.commands.gpt import GPT, Shape, serial_kit

    torch.manual_seed(0)
    model = GPT(serial_kit(), Shape(layers=2, width=32, heads=4, context=16, dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(256, (6, 17), generator=torch.Generator().manual_seed(7))
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.loss(model(tokens[:, :-1].contiguous()), tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
    return loss.item()


def staged(rank: int, config: dict[str, Any], schedule: str, hosts: tuple[int, ...]) -> tuple[int, int, int]:
    """(bytes that crossed inside stages, and behind them, bytes received behind them) of a step of two micro-batches through four pairs of
    linear maps."""
    with on_host(rank, hosts, "ucx"):
        mesh = gingham.init(parallel=config, timeout=30.0)
    model = torch.nn.Sequential(*(gingham.nn.MLP(K, N, bias=False) for _ in range(4)))
    model = gingham.pipeline(model, mesh, 2, schedule, loss=lambda y, target: y.square().mean(), layout="outer")
    mesh.traffic(reset=True)
    model.step(torch.ones(M, K), torch.zeros(M, K))
    counts = mesh.traffic()
    behind = counts.pop("pipeline")
    return sum(each.get("bytes_crossed", 0) for each in counts.values()), behind["bytes_crossed"], behind["bytes_received"]


STAGED = [
    pytest.param(shard, by, schedule, marks=[] if (shard, by, schedule) == (None, "stage", "zbv") else [pytest.mark.matrix])
    for shard in (None, "all", "state")
    for by in ("stage", "data", "mixed")
    for schedule in ("1f1b", "zbv")
]


@pytest.mark.parametrize(("shard", "by", "schedule"), STAGED)
def test_crossed_bytes_of_stages(ranks, shard: str | None, by: str, schedule: str) -> None:
    """Each host has a stage, or each a data rank of every stage; mixed: one data rank of the last stage lies on a host of
    its own."""
    config = dict(pipeline=2, data=dict(size=2, shard=shard), tensor=dict(size=2, mode="1d"))
    hosts = {"stage": split(4, 4), "data": (0, 0, 1, 1, 0, 0, 1, 1), "mixed": split(6, 2)}[by]
    answers = ranks(8)(staged, config, schedule, hosts)
    grid = GridShape(axes_of(mode="1d", size=2, data=2, shard=shard))
    stages = 2 if schedule == "1f1b" else 4
    pairs = 4 // stages
    sizes = (pairs * M * K // grid.size, pairs * M * N // grid.size, pairs * K * N // grid.size)
    passed = [M // 2 * K] * stages  # 1d's ranks have all features each
    words = crossed_by_stages(grid, 2, schedule, hosts, [sizes] * stages, passed, 2)
    inside, crossed, behind = (sum(answer[at] for answer in answers) for at in range(3))
    # the model's input needs no gradient: the first weight is not gathered for it, in neither micro-batch
    words -= 2 * K * N if shard == "all" and by == "data" else 0
    assert 4 * words == inside + crossed > 0
    assert behind > 0 and crossed == {"stage": behind, "data": 0, "mixed": behind // 2}[by]
    assert inside == 0 or by != "stage"
