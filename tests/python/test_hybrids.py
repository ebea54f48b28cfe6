"""Meshes of data, pipeline and tensor ranks together: gingham's GPT for 20 steps beside one process, and every group of every mesh."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

import gingham
import on_gpu
from gingham.commands.gpt import GPT, Shape, parallel_kit, serial_kit
from pool import RankError

SHAPE = Shape(layers=4, width=24, heads=12, context=7, dropout=0.1)
BATCH, STEPS = 9, 20
TENSOR: dict[str, dict[str, Any]] = {
    "-": dict(size=1),
    "1d of 2": dict(size=2, mode="1d"),
    "1d of 3": dict(size=3, mode="1d"),
    "1d sequence of 2": dict(size=2, mode="1d", sequence=True),
    "1d sequence of 3": dict(size=3, mode="1d", sequence=True),
    "2d": dict(size=4, mode="2d"),
    "2.5d of 4": dict(size=4, mode="2.5d", depth=4),
    "2.5d of 8": dict(size=8, mode="2.5d", depth=2),
    "2.5d sharded": dict(size=4, mode="2.5d", depth=4, shard_depth=True),
    "3d": dict(size=8, mode="3d"),
    "1x2x1": dict(grid=(1, 2, 1)),
    "1x2x2": dict(grid=(1, 2, 2)),
    "2x1x2": dict(grid=(2, 1, 2)),
    "3x2x1": dict(grid=(3, 2, 1)),
    "sequence of 2": dict(size=2, mode="sequence"),
    "sequence of 3": dict(size=3, mode="sequence"),
    "sequence of 4": dict(size=4, mode="sequence"),
}
# pipeline ranks, their schedule, data ranks, their shard, the tensor mesh of each
MESHES: list[tuple[int, str, int, str | None, str]] = [
    (1, "", 2, None, "-"),
    (1, "", 3, "all", "-"),
    (1, "", 2, "state", "-"),
    (2, "1f1b", 1, None, "-"),
    (3, "gpipe", 1, None, "-"),
    (2, "zbv", 2, None, "-"),
    (2, "1f1b", 3, "all", "-"),
    (3, "dual", 2, "state", "-"),
    (1, "", 1, None, "1d of 3"),
    (1, "", 2, "all", "1d of 2"),
    (2, "zero_bubble", 2, None, "1d of 2"),
    (2, "interleaved", 3, "state", "1d of 2"),
    (1, "", 2, "all", "1d sequence of 2"),
    (2, "1f1b", 1, None, "1d sequence of 3"),
    (2, "zbv", 2, "state", "1d sequence of 2"),
    (1, "", 1, None, "2d"),
    (1, "", 2, "state", "2d"),
    (1, "", 3, "all", "2d"),
    (2, "dual", 1, None, "2d"),
    (3, "gpipe", 1, None, "2d"),
    (1, "", 1, None, "2.5d of 8"),
    (1, "", 2, None, "2.5d of 4"),
    (3, "1f1b", 1, None, "2.5d of 4"),
    (2, "interleaved", 1, None, "2.5d sharded"),
    (1, "", 1, None, "3d"),
    (1, "", 2, "all", "1x2x2"),
    (2, "zero_bubble", 1, None, "2x1x2"),
    (1, "", 2, "state", "3x2x1"),
    (3, "gpipe", 2, "all", "1x2x1"),
    (1, "", 2, None, "sequence of 3"),
    (1, "", 2, "all", "sequence of 4"),
    (1, "", 2, "state", "sequence of 2"),
    (2, "zbv", 2, "all", "sequence of 2"),
    (2, "1f1b", 1, None, "sequence of 3"),
    (3, "interleaved", 1, None, "sequence of 4"),
]
QUICK = {(2, "zero_bubble", 2, None, "1d of 2")}


def name_of(mesh: Any) -> str:
    pipeline, schedule, data, shard, tensor = mesh
    return f"{pipeline} {schedule} x {data} {shard} x {tensor}"


CASES = [pytest.param(mesh, id=name_of(mesh), marks=[] if mesh in QUICK else [pytest.mark.matrix]) for mesh in MESHES]


def ranks_of(mesh: Any) -> tuple[int, int, int]:
    """(pipeline, data, tensor)"""
    pipeline, _, data, _, tensor = mesh
    given = TENSOR[tensor]
    return pipeline, data, prod(given["grid"]) if "grid" in given else given["size"]


def parts_of(mesh: Any) -> int:
    """Micro-batches; dual takes at least one for each stage."""
    return 1 if mesh[0] == 1 else 6 if mesh[:2] == (3, "dual") else 4


def config(mesh: Any) -> dict[str, Any]:
    pipeline, schedule, data, shard, tensor = mesh
    stages = dict(pipeline=dict(size=pipeline, schedule=schedule, microbatches=parts_of(mesh))) if pipeline > 1 else {}
    return stages | dict(data=dict(size=data, shard=shard), tensor=TENSOR[tensor])


def sample(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(256, (BATCH, SHAPE.context + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def trained(model: Any, step: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    gradients: dict[str, torch.Tensor] = {}
    for number in range(STEPS):
        optimizer.zero_grad()
        losses.append(float(step(*sample(number))))
        for name, weight in model.named_parameters() if number == 0 else ():
            gradients[name] = (weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad).clone()
        optimizer.step()
    return losses, gradients


def on_mesh(rank: int, chosen: Any) -> Any:
    mesh = gingham.init(parallel=config(chosen), timeout=30.0)
    torch.manual_seed(3)
    model: Any = GPT(parallel_kit(mesh), SHAPE)
    if mesh.pipeline.size > 1:
        model = gingham.pipeline(model, mesh)
        return trained(model, model.step)

    def step(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = model.loss(model(mesh.scatter(ids)), mesh.scatter(targets) if mesh.inner.rows else targets)
        loss.backward()
        return loss

    return trained(model, step)


def serial(rank: int, parts: int, dtype: torch.dtype) -> Any:
    """On a mesh of one rank, which draws the bits that ranks draw where they are a GPU's."""
    gingham.init()
    torch.manual_seed(3)
    model = GPT(serial_kit(), SHAPE).to(dtype)

    def step(ids: torch.Tensor, targets: torch.Tensor) -> float:
        total = 0.0
        for x, labels in zip(ids.tensor_split(parts), targets.tensor_split(parts), strict=True):
            loss = model.loss(model(x), labels) * (labels.numel() / targets.numel())
            loss.backward()
            total += loss.item()
        return total

    return trained(model, step)


SERIAL: dict[tuple[int, torch.dtype], Any] = {}


def serially(ranks: Any, parts: int, dtype: torch.dtype) -> Any:
    """What `serial` gives, computed once."""
    if (parts, dtype) not in SERIAL:
        SERIAL[parts, dtype] = ranks(1)(serial, parts, dtype)[0]
    return SERIAL[parts, dtype]


def skip_pipelines_on_gpus(stages: int = 2) -> None:
    if stages > 1 and on_gpu.wanted():
        pytest.skip("gingham.pipeline refuses GPUs: messages between stages have tags, which NCCL ignores")


@pytest.mark.parametrize("mesh", CASES)
def test_twenty_steps_are_one_processs(ranks, mesh: Any) -> None:
    """Losses of each step within 1e-5, gradients of the first within 2e-6 of the largest element; masks of dropout are the serial ones."""
    skip_pipelines_on_gpus(mesh[0])
    answers = ranks(prod(ranks_of(mesh)))(on_mesh, mesh)
    parts = parts_of(mesh)
    losses, _ = serially(ranks, parts, torch.float32)
    _, truth = serially(ranks, parts, torch.float64)
    seen: set[str] = set()
    for found, gradients in answers:
        assert found == answers[0][0]
        assert found == pytest.approx(losses, rel=1e-5)
        for name, gradient in gradients.items():
            # the key bias has no effect, so that its true gradient is 0: measured against the query bias's
            largest = truth[name.replace(".k.bias", ".q.bias")].abs().max()
            assert float((gradient - truth[name]).abs().max() / largest) <= 2e-6, name
        seen |= gradients.keys()
    assert seen == truth.keys()


# axes of each tensor mesh, the first varying slowest, and what they cut: m rows, n and k features, in the order of outer and of inner
SHAPES: dict[str, Any] = {
    "1d": (("tp",), dict(m="", n="tp", k="", outer=("", ""), inner=("", "tp"))),
    "1d sequence": (("tp",), dict(m="", n="tp", k="", outer=("tp", ""), inner=("", "tp"))),
    "2d": (("row", "col"), dict(m="row", n="col", k="", outer=("row", "col"), inner=("row", "col"))),
    "2.5d": (("depth", "row", "col"), dict(m="depth row", n="col", k="", outer=("depth row", "col"), inner=("depth row", "col"))),
    "grid": (("k", "n", "m"), dict(m="m", n="n", k="k", outer=("m", "k n"), inner=("m", "n k"))),
    "sequence": (("m",), dict(m="m", n="", k="", outer=("m", ""), inner=("m", ""))),
}


def places(mesh: Any) -> tuple[list[dict[str, int]], Any]:
    """Of every rank of the job, its place on each axis, by (pipeline, data, tensor), outermost first; and what the tensor's axes cut."""
    pipeline, data, tensor = ranks_of(mesh)
    given = TENSOR[mesh[4]]
    mode = "grid" if "grid" in given or given.get("mode") == "3d" else given.get("mode", "1d")
    names, roles = SHAPES["1d sequence" if given.get("sequence") else mode]
    side, depth = round(tensor ** (1 / 3)), given.get("depth", 1)
    q = round((tensor / depth) ** 0.5)
    sizes = {"1d": (tensor,), "sequence": (tensor,), "2d": (q, q), "2.5d": (depth, q, q)}.get(mode)
    sizes = sizes or tuple(reversed(given.get("grid", (side,) * 3)))
    found = [
        {"pipeline": stage, "data": replica, **dict(zip(names, place, strict=True))}
        for stage, replica, place in product(range(pipeline), range(data), product(*map(range, sizes)))
    ]
    return found, roles


def groups(mesh: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(role, axes): who gathers or sums what with whom."""
    _, _, data, shard, tensor = mesh
    _, roles = places(mesh)
    rows = ("data",) if data > 1 else ()
    split = {role: tuple(roles[role].split()) for role in "mnk"} | {
        f"{layout} {kind}": tuple(roles[layout][at].split()) for layout in ("outer", "inner") for at, kind in ((0, "rows"), (1, "features"))
    }
    yield from ((role, rows + names if role == "m" or role.endswith("rows") else names) for role, names in split.items())
    replicated = ("depth",) if TENSOR[tensor].get("mode") == "2.5d" and not TENSOR[tensor].get("shard_depth") else ()
    yield "depth", (rows if shard is None else ()) + replicated
    yield "kept", rows if shard == "state" else ()
    yield "again", (() if shard is None else rows) + tuple(name for name in split["m"] if name not in replicated)
    yield "world", rows + SHAPES_OF[tensor]
    yield from ((name, (name,)) for name in rows + SHAPES_OF[tensor])


SHAPES_OF = {
    name: SHAPES["grid" if "grid" in given or given.get("mode") == "3d" else given.get("mode", "1d")][0] for name, given in TENSOR.items()
}


def enumerated(rank: int, chosen: Any) -> Any:
    """The ranks of each group that this one is in, as they tell each other over it, in the group's order."""
    mesh = gingham.init(parallel=config(chosen), timeout=30.0)
    axes = mesh.axes
    named = {"m": axes.m, "n": axes.n, "k": axes.k, "depth": axes.depth, "kept": axes.kept, "again": axes.again, "world": tuple(axes.sizes)}
    named |= {f"{name} {kind}": getattr(getattr(mesh, name), kind) for name in ("outer", "inner") for kind in ("rows", "features")}
    named |= {name: (name,) for name in axes.sizes}
    found = {}
    for role, names in named.items():
        lines = [[int(each) for (each,) in line.sizes([rank])] for line in mesh.axes_over(names)]
        found[role] = lines or [[rank]]
    if mesh.whole is not None:
        found["pipeline"] = [[int(each) for (each,) in mesh.whole.joint(("pipeline",)).sizes([rank])]]
        found["job"] = [[int(each) for (each,) in mesh.whole.world.sizes([rank])]]
    return found, mesh.pipeline, mesh.data


def line_of(place: dict[str, int], everyone: list[dict[str, int]], names: tuple[str, ...]) -> list[int]:
    return [rank for rank, other in enumerate(everyone) if all(other[name] == place[name] for name in place if name not in names)]


@pytest.mark.parametrize("mesh", CASES)
def test_every_group_of_every_mesh(ranks, mesh: Any) -> None:
    everyone, _ = places(mesh)
    answers = ranks(len(everyone))(enumerated, mesh)
    wanted = dict(groups(mesh))
    if mesh[0] > 1:
        wanted |= {"pipeline": ("pipeline",), "job": tuple(everyone[0])}
    for (found, stage, replica), place in zip(answers, everyone, strict=True):
        assert (stage.rank, replica.rank) == (place["pipeline"], place["data"])
        assert found.keys() - {"tp"} <= wanted.keys() <= found.keys() | set(SHAPES_OF[mesh[4]])
        for role in wanted.keys() & found.keys():
            expected = line_of(place, everyone, wanted[role])
            together: set[int] = set()
            for line in found[role]:
                together |= set(line)
                assert set(line) <= set(expected) and len(line) == len(set(line)), (role, line, expected)
            # several lines span the axes where no group has them all
            assert sorted(found[role][0]) == expected if len(found[role]) == 1 else prod(map(len, found[role])) == len(expected), role
            assert len(wanted[role]) != 1 or found[role][0] == expected, role


def short(rank: int, size: int) -> Any:
    """The loss of 4 tokens on 3 ranks, the last of which has none, and the gradient of a table; on one rank, the serial model's."""
    mesh = gingham.init("sequence", size=size)
    torch.manual_seed(3)
    model: Any = GPT(parallel_kit(mesh) if size > 1 else serial_kit(), SHAPE)
    ids, targets = (each[:1, :4] for each in sample(0))
    loss = model.loss(model(mesh.scatter(ids)), mesh.scatter(targets))
    loss.backward()
    gradient = model.position.weight.grad
    return loss.item(), gradient.full_tensor() if size > 1 else gradient


def test_a_rank_without_a_piece_of_a_short_sequence(ranks) -> None:
    loss, truth = ranks(1)(short, 1)[0]
    for found, gradient in ranks(3)(short, 3):
        assert found == pytest.approx(loss, rel=1e-6)
        assert float((gradient - truth).abs().max()) <= 2e-6 * float(truth.abs().max())


def one_feature(rank: int) -> Any:
    """A bias of one feature, which only some of the ranks that cut features have, summed once for two micro-batches."""
    mesh = gingham.init("2d", size=4)
    torch.manual_seed(3)
    layer = gingham.nn.Linear(8, 1, swapped=True)
    for _ in range(2):
        with gingham.no_sync(layer):
            layer(mesh.scatter(torch.ones(6, 8))).sum().backward()
    layer(mesh.scatter(torch.ones(6, 8))).sum().backward()
    return layer.bias.grad.full_tensor().tolist()


def test_a_bias_of_which_some_ranks_have_nothing_is_put_off_alike(ranks) -> None:
    assert ranks(4)(one_feature) == [[18.0]] * 4


RESUMED = [(1, "", 1, None, "2d"), (2, "zbv", 2, "all", "-"), (3, "gpipe", 1, None, "1d of 2"), (1, "", 3, "state", "1d of 2")]


def saving(rank: int, folder: str, save: int) -> None:
    """Steps on 2 x 2 x 2 with a save after each; killed inside the save after `save`, by whom this rank waits for in the last one."""
    mesh = gingham.init(parallel=config((2, "zero_bubble", 2, "state", "1d of 2")), timeout=30.0)
    torch.manual_seed(3)
    model = gingham.pipeline(GPT(parallel_kit(mesh), SHAPE), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number in range(save + 1):
        optimizer.zero_grad()
        model.step(*sample(number))
        optimizer.step()
        if number == save and rank == 5:
            threading.Thread(target=killed_while_writing, args=(folder,), daemon=True).start()
        gingham.save(model, optimizer, folder, step=number + 1)


def killed_while_writing(folder: str) -> None:
    while not list(Path(folder).glob(".writing-*")):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)


def resumed(rank: int, chosen: Any, folder: str) -> Any:
    mesh = gingham.init(parallel=config(chosen), timeout=30.0)
    model = gingham.pipeline(GPT(parallel_kit(mesh), SHAPE), mesh, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first, losses = gingham.load(model, optimizer, folder), []
    for number in range(first, STEPS):
        optimizer.zero_grad()
        losses.append(model.step(*sample(number)).item())
        optimizer.step()
    return first, losses


@pytest.mark.matrix
def test_killed_while_saving_and_resumed_on_another_hybrid(ranks, tmp_path: Path) -> None:
    skip_pipelines_on_gpus()
    folder = str(tmp_path / "run")
    outcomes = ranks(8)(saving, folder, 3, outcomes=True)
    # who had ended its part of the save before the kill has nothing to wait for
    assert isinstance(outcomes[5], RankError)
    assert all(
        outcome is None or isinstance(outcome.error, gingham.PeerDied) and outcome.error.rank == 5
        for outcome in outcomes
        if outcome is not outcomes[5]
    )
    losses, _ = serially(ranks, 4, torch.float32)
    for mesh in RESUMED:
        for first, found in ranks(prod(ranks_of(mesh)))(resumed, mesh, folder):
            assert first in (3, 4) and found == pytest.approx(losses[first:], rel=1e-5), mesh
