"""The data axis: rows of activations cut over replicas in every mode, with weights whole or cut over it too, and one process's numbers."""

import contextlib
import copy
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import gingham
from gingham import nn
from gingham.mesh.layout import coordinates_of, members
from gingham.mesh.mesh import groups_of
from gingham.mesh.modes import axes_of
from grids import TENSOR
from pool import RankError

SHAPE = dict(layers=2, width=32, heads=4, context=16, dropout=0.1)
QUICK = {("none", None, 2), ("1d", "all", 2), ("1d sequence", "all", 2), ("2d", "all", 2), ("2.5d", None, 2), ("1x2x2", "all", 2)}
QUICK |= {("2x1x1", None, 3), ("none", "state", 2), ("2d", "state", 2), ("sequence", None, 2)}
CASES = [
    pytest.param(name, shard, data, marks=[] if (name, shard, data) in QUICK else [pytest.mark.matrix], id=f"{data} x {name}, {shard}")
    for name, (size, _) in TENSOR.items()
    for shard in (None, "all", "state")
    for data in (2, 3)
    if size * data <= 16
]


def parallel(name: str, shard: str | None, data: int) -> dict[str, Any]:
    return dict(data=dict(size=data, shard=shard), tensor=TENSOR[name][1])


def sample(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(256, (batch, SHAPE["context"] + 1), generator=torch.Generator().manual_seed(7))
    targets = tokens[:, 1:].contiguous()
    targets[batch // 2] = -100  # a row without a valid token
    return tokens[:, :-1].contiguous(), targets


def trained(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    """Losses of three steps, the first's gradients and the norms that were clipped."""
    optimizer, losses, norms = torch.optim.AdamW(model.parameters(), lr=1e-3), [], []
    gradients: dict[str, torch.Tensor] = {}
    on_mesh = any(isinstance(weight, DTensor) for weight in model.parameters())
    clip = gingham.clip_grad_norm_ if on_mesh else torch.nn.utils.clip_grad_norm_
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.loss(model(ids), targets)
        loss.backward()
        for name, weight in model.named_parameters() if not gradients else ():
            gradients[name] = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad.clone()
        norms.append(float(clip(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients, norms


def steps(rank: int, config: dict[str, Any], rows: tuple[int, ...] | None, batch: int) -> Any:
    """rows: of each data rank's own batch; None: every rank has the whole one."""
    from gingham.commands.gpt import GPT, Shape, parallel_kit

    mesh = gingham.init(parallel=config, timeout=30.0)
    torch.manual_seed(3)
    model = GPT(parallel_kit(mesh), Shape(**SHAPE))
    ids, targets = sample(batch)
    own = rows is not None
    if rows is not None:
        ids, targets = (each.split(list(rows))[mesh.data.rank] for each in (ids, targets))
    ids, targets = mesh.scatter(ids, own=own), mesh.scatter(targets, own=own) if mesh.inner.rows else targets
    found = trained(model, ids, targets)
    held = sum(weight.to_local().numel() for weight in model.parameters())
    return found, held / sum(weight.numel() for weight in model.parameters()), mesh.data, rank


def serial(rank: int, batch: int, dtype: torch.dtype) -> Any:
    """On a mesh of one rank, which draws the bits that ranks draw where they are a GPU's."""
    from gingham.commands.gpt import GPT, Shape, serial_kit

    gingham.init()
    torch.manual_seed(3)
    return trained(GPT(serial_kit(), Shape(**SHAPE)).to(dtype), *sample(batch))


def check(ranks: Any, answers: list[Any], batch: int) -> None:
    (losses, exact, norms), (_, single, _) = (ranks(1)(serial, batch, dtype)[0] for dtype in (torch.float64, torch.float32))
    for (found, *_), *_ in answers:
        assert found == pytest.approx(losses, rel=1e-5)
    _, gradients, clipped = answers[0][0]
    assert clipped == pytest.approx(norms, rel=1e-5)
    for name, truth in exact.items():
        # the key bias has no effect, so that its true gradient is 0: measured against the query bias's
        scale = exact[name.replace(".k.bias", ".q.bias")].norm()
        error, alone = ((each[name] - truth).norm() / scale for each in (gradients, single))
        assert error <= max(2e-6, 3 * alone), f"{name}: {error:.2e}, serial {alone:.2e}"


@pytest.mark.parametrize(("name", "shard", "data"), CASES)
def test_losses_gradients_and_norms_are_one_processs(ranks, name: str, shard: str | None, data: int) -> None:
    size = TENSOR[name][0] * data
    answers = ranks(size)(steps, parallel(name, shard, data), None, 7)
    check(ranks, answers, 7)
    places = [place.rank for *_, place, _ in answers]
    assert places == [rank * data // size for rank in range(size)]  # the ranks of one data rank are neighbours
    if shard:
        # biases, norms and what a mode replicates are small beside the rest; classic 1d holds its embeddings whole on tp
        assert max(held for _, held, *_ in answers) <= (0.7 if name == "1d" else 1.15) / data


OWN = {("none", "all"), ("1d", None), ("2d", "all")}
ALL = [(name, shard) for name in ("none", "1d", "2d", "1x2x2") for shard in (None, "all", "state")]


@pytest.mark.parametrize(("name", "shard"), [pytest.param(*each, marks=[] if each in OWN else [pytest.mark.matrix]) for each in ALL])
def test_each_data_rank_loads_its_own_rows(ranks, name: str, shard: str | None) -> None:
    """Uneven ones, with another number of valid tokens in each: the loss is the mean over all of the job's."""
    check(ranks, ranks(TENSOR[name][0] * 2)(steps, parallel(name, shard, 2), (5, 3), 8), 8)


def bytes_of_layers(rank: int, config: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(layer, bytes that this rank received forward and backward, what all should)."""
    mesh = gingham.init(parallel=config, timeout=30.0)
    batch, time_, width, found = 8, 4, 32, []
    for name, made, kind in (
        ("outer->inner", lambda: nn.Linear(width, 64, layout="outer->inner"), "x"),
        ("inner->outer", lambda: nn.Linear(width, 64, layout="inner->outer"), "inner"),
        ("outer->outer", lambda: nn.Linear(width, 64), "x"),
        ("MLP", lambda: nn.MLP(width, 64), "x"),
        ("SelfAttention", lambda: nn.SelfAttention(width, 4, causal=True), "x"),
        ("Embedding", lambda: nn.Embedding(50, width), "rows"),
        ("LayerNorm", lambda: nn.LayerNorm(width), "x"),
        ("RMSNorm", lambda: nn.RMSNorm(width), "x"),
    ):
        layer = made()
        x = mesh.scatter(torch.ones(batch, time_, dtype=torch.long) if kind == "rows" else torch.randn(batch, time_, width), operand=kind)
        mesh.traffic(reset=True)
        y = layer(x if kind == "rows" else x.requires_grad_())
        y.sum().backward()
        for weight in layer.parameters():
            weight.grad.to_local().sum()  # what is on its way over data is here
        found.append((name, sum(count["bytes_received"] for count in mesh.traffic(reset=True).values()), layer.received(batch, time_)))
    return found


@pytest.mark.parametrize(("name", "shard", "data"), [case for case in CASES if case.values[2] == 2])
def test_bytes_of_each_layer_are_its_formulas(ranks, name: str, shard: str | None, data: int) -> None:
    answers = ranks(TENSOR[name][0] * data)(bytes_of_layers, parallel(name, shard, data))
    for each in zip(*answers, strict=True):
        assert sum(received for _, received, _ in each) == each[0][2], each[0][0]


def accumulated(rank: int, shard: str | None, micro: int) -> tuple[list[int], int, float]:
    """Bytes of three steps of so many micro-batches, after each of which weights change; what one pass should move; the largest error."""
    mesh = gingham.init(parallel=dict(data=dict(size=2, shard=shard)), timeout=30.0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.Embedding(21, 16), nn.LayerNorm(16), nn.Linear(16, 24), nn.MLP(24, 32))
    torch.manual_seed(0)
    serial = torch.nn.Sequential(torch.nn.Embedding(21, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 24))
    serial.extend([torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 24)])
    pairs = list(zip(model.parameters(), serial.parameters(), strict=True))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01, foreach=True) for each in (model, serial)]
    ids = torch.randint(21, (4 * micro, 5), generator=torch.Generator().manual_seed(1))
    received, worst = [], 0.0
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=step != 1)
        mesh.traffic(reset=True)
        for at, part in enumerate(ids.split(4)):
            with gingham.no_sync(model) if at < micro - 1 else contextlib.nullcontext():
                model(mesh.scatter(part)).square().sum().backward()
            serial(part).square().sum().backward()
        received.append(sum(count["bytes_received"] for count in mesh.traffic().values()))
        worst = max(worst, *(float((ours.grad.full_tensor() - one.grad).norm() / one.grad.norm()) for ours, one in pairs))
        with torch.no_grad():  # neither counts up a version of the DTensor
            for each in model[2].weight, serial[2].weight:
                each.data.mul_(1.5)
            for each in model[0].weight, serial[0].weight:
                torch._foreach_mul_([each.data], 0.5)
        if step == 1:
            for optimizer in optimizers:
                optimizer.step()
        worst = max(worst, float((mesh.gather(model(mesh.scatter(part))) - serial(part)).norm() / serial(part).norm()))
    return received, sum(layer.received(4, 5) for layer in model), worst


@pytest.mark.parametrize("shard", [None, "all", "state"])
def test_micro_batches_pay_for_their_sums_once(ranks, shard: str | None) -> None:
    answers = ranks(2)(accumulated, shard, 3)
    assert max(worst for *_, worst in answers) <= 2e-6
    received = [sum(each) for each in zip(*(received for received, *_ in answers), strict=True)]  # of both ranks, step by step
    once = answers[0][1]
    vectors, weights = 4 * (2 * 16 + 24 + 32 + 24), 4 * (21 * 16 + 16 * 24 + 2 * 24 * 32)
    assert once == 2 * vectors + (3 * weights - 4 * 21 * 16 if shard == "all" else 2 * weights)  # a table has no gradient of X
    if shard == "all":
        assert received == [2 * vectors + 3 * (once - 2 * vectors)] * 3
    elif shard == "state":  # the check after a step has gathered the weights for the next one
        assert received == [once, once - weights, once - weights]
    else:
        assert received == [once] * 3


def twice(rank: int, config: dict[str, Any]) -> list[float]:
    """Relative errors of the gradient of all gradients' squares."""
    mesh = gingham.init(parallel=config, timeout=30.0)
    ids, squares, found = torch.randint(21, (8, 4), generator=torch.Generator().manual_seed(1)), [], []
    for kit, rows in ((nn, mesh.scatter(ids)), (torch.nn, ids)):
        torch.manual_seed(0)
        linear, table = kit.Linear(16, 24), kit.Embedding(21, 16)
        parameters = [linear.weight, linear.bias, table.weight]
        gradients = torch.autograd.grad(linear(table(rows)).tanh().square().sum(), parameters, create_graph=True)
        sum((each * each).sum() for each in gradients).backward()
        squares.append(parameters)
    for ours, one in zip(*squares, strict=True):
        found.append(float((ours.grad.full_tensor() - one.grad).norm() / one.grad.norm()))
    return found


SECOND = [(name, shard) for name in ("none", "1d", "2d", "2.5d") for shard in (None, "all", "state")]
QUICK_SECOND = {("none", "state"), ("1d", "all")}


@pytest.mark.parametrize(
    ("name", "shard"), [pytest.param(*each, marks=[] if each in QUICK_SECOND else [pytest.mark.matrix]) for each in SECOND]
)
def test_second_gradients_are_one_processs(ranks, name: str, shard: str | None) -> None:
    for errors in ranks(TENSOR[name][0] * 2)(twice, parallel(name, shard, 2)):
        assert max(errors) <= 2e-6


def copied(rank: int) -> tuple[float, ...]:
    mesh = gingham.init(parallel=dict(data=dict(size=2, shard="state")))
    model = nn.Linear(8, 8)
    x = torch.ones(4, 8, dtype=torch.float64)
    model(mesh.scatter(x.float())).sum().backward()
    model.zero_grad()
    model.double()
    return tuple(mesh.gather(each(mesh.scatter(x))).sum().item() for each in (model, copy.deepcopy(model), model.float().double()))


def test_state_a_model_goes_to_another_dtype_and_is_copied_after_a_step(ranks) -> None:
    for answer in ranks(2)(copied):
        assert len(set(answer)) == 1


def misused(rank: int) -> list[str]:
    mesh = gingham.init(parallel=dict(data=dict(size=2, shard="state")), timeout=30.0)
    layer, x, told = nn.Linear(8, 6), mesh.scatter(torch.ones(4, 8)), []
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError) as changed:
        y.sum().backward()
    told.append(str(changed.value))
    with gingham.no_sync(layer):
        layer(x).sum().backward()
    with pytest.raises(gingham.MeshError) as clipped:
        gingham.clip_grad_norm_(layer.parameters(), 1.0)
    told.append(str(clipped.value))
    layer.weight.grad.mul_(2)
    with pytest.raises(gingham.MeshError) as scaled:
        layer(x).sum().backward()
    told.append(str(scaled.value))
    return told


def test_state_what_is_changed_at_the_wrong_time_is_named(ranks) -> None:
    for changed, clipped, scaled in ranks(2)(misused):
        assert "modified by an inplace operation" in changed and "no_sync left out" in clipped
        assert "was changed while no_sync held parts of it back" in scaled


@pytest.mark.parametrize("shard", [None, "all", "state"])
@pytest.mark.parametrize("name", TENSOR)
def test_every_group_of_every_mesh(name: str, shard: str | None) -> None:
    """What the layers ask for has a communicator, whose members differ in those axes and no others; ranks of a data rank are neighbours."""
    axes = axes_of(**{"mode": None, **TENSOR[name][1]}, data=2, shard=shard)
    groups = groups_of(axes)
    for wanted in (
        axes.m,
        axes.depth,
        axes.kept,
        axes.gathered,
        axes.outer.rows,
        axes.inner.rows,
        axes.outer.features,
        axes.inner.features,
        axes.n,
        axes.k,
    ):
        kept = {axis for axis in wanted if axes.sizes[axis] > 1}
        assert not kept or any(kept == {axis for axis in names if axes.sizes[axis] > 1} for names in groups.values()), (wanted, groups)
    assert ("data" in axes.depth) == (shard is None) and axes.m[0] == axes.outer.rows[0] == axes.inner.rows[0] == "data"
    for names in groups.values():
        for index in range(axes.size):
            place = coordinates_of(index, axes.sizes)
            line = members(names, axes.sizes, place)
            same = [axis for axis in axes.sizes if axis not in names]
            others = [coordinates_of(other, axes.sizes) for other in range(axes.size)]
            assert sorted(line) == [other for other in range(axes.size) if all(others[other][axis] == place[axis] for axis in same)]


def saved(rank: int, config: dict[str, Any], folder: str, load: bool) -> dict[str, torch.Tensor]:
    mesh = gingham.init(parallel=config, timeout=30.0)
    torch.manual_seed(1 if load else 0)
    model = torch.nn.Sequential(nn.LayerNorm(24), nn.MLP(24, 48), nn.Linear(24, 24))
    optimizer = torch.optim.AdamW(model.parameters())
    if load:
        gingham.load(model, optimizer, folder)
    else:
        model(mesh.scatter(torch.ones(8, 24))).square().sum().backward()
        optimizer.step()
        gingham.save(model, optimizer, folder)
    found = {name: weight.full_tensor() for name, weight in model.named_parameters()}
    return found | {f"{name} moment": optimizer.state[weight]["exp_avg"].full_tensor() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (("2d", "all", 2), ("none", None, 2)),
        (("none", "all", 2), ("1d sequence", "all", 2)),
        (("1x2x2", None, 2), ("2x1x1", "all", 3)),
        (("1d", "all", 2), ("2.5d", None, 2)),
        (("2d", "state", 2), ("1d", "state", 3)),
    ],
)
def test_checkpoints_go_from_any_mesh_to_any_other(ranks, tmp_path: Path, source: Any, target: Any) -> None:
    first = ranks(TENSOR[source[0]][0] * source[2])(saved, parallel(*source), str(tmp_path / "c"), False)[0]
    second = ranks(TENSOR[target[0]][0] * target[2])(saved, parallel(*target), str(tmp_path / "c"), True)
    for each in second:
        assert all(torch.equal(each[name], tensor) for name, tensor in first.items())


def dies(rank: int, config: dict[str, Any]) -> Any:
    mesh = gingham.init(parallel=config, timeout=30.0)
    layer, x = nn.Linear(24, 24), mesh.scatter(torch.ones(8, 24))
    for step in range(1000):
        if rank == 5 and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            layer(x).sum().backward()
        except gingham.PeerDied as error:
            return error.rank, time.monotonic()
    return None


def test_a_death_in_one_replica_is_named_in_all(ranks) -> None:
    answers = ranks(8)(dies, parallel("2d", None, 2), outcomes=True)
    assert isinstance(answers[5], RankError)
    others = [answer for rank, answer in enumerate(answers) if rank != 5]
    assert [rank for rank, _ in others] == [5] * 7
    assert max(at for _, at in others) - min(at for _, at in others) < 1.0


def compared(rank: int, config: dict[str, Any]) -> Any:
    os.environ["GINGHAM_CHECK"] = "1"
    try:
        mesh = gingham.init(parallel=config, timeout=30.0)
        x = torch.full((3 + mesh.data.rank, 8), float(mesh.data.rank))
        mesh.scatter(x, own=True)
        x[0, 0] += rank == 3
        with pytest.raises(gingham.LayoutError) as error:
            mesh.scatter(x, own=True)
        return str(error.value)
    finally:
        del os.environ["GINGHAM_CHECK"]


def test_ranks_of_one_data_rank_that_load_other_rows_are_told_to_all(ranks) -> None:
    for told in ranks(4)(compared, parallel("1d", None, 2)):
        assert "on ranks [3] are not those of the others of their data rank" in told


def loaded(rank: int, config: dict[str, Any]) -> Any:
    mesh = gingham.init(parallel=config, timeout=30.0)
    sampler = mesh.sampler(range(10), seed=3)
    refused = []
    for call, kind in ((lambda: mesh.scatter(torch.ones(4, 4), operand="a", own=True), gingham.MeshError),):
        with pytest.raises(kind) as error:
            call()
        refused.append(str(error.value))
    full = torch.arange(12.0).view(3 + mesh.data.rank, -1)[:, :3].clone().requires_grad_()
    back = mesh.gather(mesh.scatter(full, own=True), own=True)
    back.square().sum().backward()
    assert torch.equal(back, full) and torch.equal(full.grad, 2 * full)
    return mesh.data.rank, sorted(sampler), refused


def test_the_sampler_deals_the_data_out_to_data_ranks(ranks) -> None:
    answers = ranks(4)(loaded, parallel("1d", None, 2))
    taken = {data: drawn for data, drawn, _ in answers}
    assert len(taken) == 2 and sorted(taken[0] + taken[1]) == list(range(10))
    assert all(drawn == taken[data] for data, drawn, _ in answers)
    assert "own=True" in answers[0][2][0]
