"""Every optimizer's step on a mesh is the serial one, or is refused by name; what users add to a step beside it."""

import warnings
from typing import Any

import pytest
import torch

import gingham
from grids import GRIDS, grids, ranks_of, relative, whole
from optimizers import outcomes


def check(found: list[dict[str, Any]]) -> None:
    assert len(found[0]) > 8
    for results in found:
        for case, outcome in results.items():
            if "SparseAdam" in case:
                assert "MeshError: SparseAdam" in outcome and "expected torch.optim.Adam" in outcome
            else:
                assert isinstance(outcome, float) and outcome < 1e-6, (case, outcome)


@pytest.mark.parametrize("name", ["2d"])
def test_c4_optimizers_that_dtensor_does_not_serve_are_serial_or_refused(ranks, name: str) -> None:
    check(ranks(ranks_of(name))(outcomes, GRIDS[name], True, timeout=200))


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["2d", "2.5d", "3d"])
def test_c4_every_optimizer_is_serial_or_refused(ranks, name: str) -> None:
    check(ranks(ranks_of(name))(outcomes, GRIDS[name], False, timeout=400))


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.LayerNorm(20), torch.nn.Linear(20, 10))


X, T = torch.randn(8, 12, generator=torch.Generator().manual_seed(1)), torch.arange(8)
BY_HAND: list[Any] = [
    lambda model: model(X).square().mean() + 1e-2 * sum(p.square().sum() for p in model.parameters()),
    lambda model: torch.nn.functional.cross_entropy(model(X), T) + 1e-2 * sum(p.norm() for p in model.parameters()),
    lambda model: 1e-2 * sum(p.abs().sum() for p in model.parameters()) + model(X).square().mean(),
    lambda model: model(X).square().mean() - 1e-2 * sum((p**2).sum() for p in model.parameters() if p.dim() > 1),
    lambda model: model(X).square().mean() * (1 + sum(p.square().mean() for p in model.parameters())),
]


def decayed(rank: int, options: dict[str, Any]) -> list[float]:
    """Errors of the gradients of losses with a penalty written by hand, in a converted model and in layers."""
    mesh = gingham.init(**options)
    found = []
    for loss in BY_HAND:
        ours, serial = gingham.parallelize(model_of(), mesh), model_of()
        for model in (ours, serial):
            loss(model).backward()
        found.append(max(relative(whole(p.grad), q.grad) for p, q in zip(ours.parameters(), serial.parameters(), strict=True)))
    for kit in (gingham.nn, torch.nn):
        torch.manual_seed(0)
        layer = kit.Linear(12, 10)
        if kit is gingham.nn:
            loss = gingham.cross_entropy(layer(mesh.scatter(X)), mesh.scatter(T), mesh=mesh)
        else:
            loss = torch.nn.functional.cross_entropy(layer(X), T)
        (loss + sum(p.square().sum() for p in layer.parameters())).backward()
        ours, serial = (layer, serial) if kit is gingham.nn else (ours, layer)
    return [*found, max(relative(whole(p.grad), q.grad) for p, q in zip(ours.parameters(), serial.parameters(), strict=True))]


@grids("2d", "2.5d")
def test_c4_weight_decay_by_hand_has_the_serial_gradients(ranks, name: str) -> None:
    for errors in ranks(ranks_of(name))(decayed, GRIDS[name]):
        assert max(errors) < 1e-5, errors


def anomaly(rank: int) -> tuple[float, bool, int]:
    """The error under set_detect_anomaly, whether a nan is found where it arises, and bins of a histogram of a full tensor."""
    mesh = gingham.init(mode="2d", size=4)
    ours, serial = gingham.parallelize(model_of(), mesh), model_of()
    with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (ours, serial):
            model(X).square().mean().backward()
        error = max(relative(whole(p.grad), q.grad) for p, q in zip(ours.parameters(), serial.parameters(), strict=True))
        with pytest.raises(RuntimeError, match="nan"):
            (ours(X).mean() + torch.sqrt(ours[0].weight.full_tensor().sum() * 0)).backward()
    return error, True, len(torch.histc(ours[0].weight.full_tensor().detach(), 10))


def test_c4_detect_anomaly_and_histograms(ranks) -> None:
    for error, found, bins in ranks(4)(anomaly):
        assert error < 1e-5 and found and bins == 10


def read(rank: int) -> tuple[list[str], list[str]]:
    """Warnings of reading numbers off parameters, and of what is right: full tensors and DTensors of others."""
    from torch.distributed.tensor import distribute_tensor

    mesh = gingham.init(mode="2d", size=4)
    weight = gingham.nn.Linear(8, 8).weight
    found: list[list[str]] = []
    for ask in (
        [
            lambda: weight.abs().mean().item(),
            lambda: float(weight.sum()),
            lambda: bool((weight > 9).any()),
            lambda: int(weight.sum()),
        ],
        [lambda: weight.full_tensor().mean().item(), lambda: float(weight.sum().full_tensor())],
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for each in ask:
                for _ in range(2):
                    each()
        found.append([str(warning.message) for warning in caught if "this rank's part" in str(warning.message)])
    other = torch.distributed.device_mesh.init_device_mesh("cpu", (4,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        foreign = distribute_tensor(torch.ones(8), other, [torch.distributed.tensor.Shard(0)])
        assert foreign.sum().item() == 2.0 and bool((foreign > 0).any()) and mesh.size == 4
    return found[0], found[1]


def test_a14_a_number_read_off_a_part_is_warned_of_once(ranks) -> None:
    for parts, fulls in ranks(4)(read):
        assert len(parts) == 4 and all(".full_tensor()" in message for message in parts)
        assert fulls == []


def searched(model: torch.nn.Module, x: torch.Tensor, target: torch.Tensor, search: str | None, mesh: Any = None) -> list[torch.Tensor]:
    """Weights after LBFGS, whose closure returns the mean over x, or with a mesh over the x of all data ranks."""
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn=search)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.cross_entropy(model(x), target, reduction="none")
        losses.mean().backward()
        return losses.mean() if mesh is None else mesh.gather(mesh.scatter(losses.detach(), "rows", own=True), "rows").mean()

    for _ in range(2):
        optimizer.step(closure)
    return [whole(p).detach() for p in model.parameters()]


def searched_over_data(rank: int, search: str | None, job: bool) -> Any:
    mesh = gingham.init(parallel=dict(data=2, tensor=dict(size=1, mode="1d")))
    mine = slice(0, 3) if mesh.data.rank == 0 else slice(3, 8)
    try:
        return searched(gingham.parallelize(model_of(), mesh), X[mine], T[mine], search, mesh if job else None)
    except gingham.MeshError as error:
        return str(error)


@pytest.mark.parametrize(("search", "job"), [(None, False), ("strong_wolfe", True), ("strong_wolfe", False)])
def test_lbfgs_over_data_goes_by_one_loss_or_is_told(ranks, search: str | None, job: bool) -> None:
    found, expected = ranks(2)(searched_over_data, search, job), searched(model_of(), X, T, search)
    for rank, weights in enumerate(found):
        if search and not job:
            assert f"on rank {rank}" in weights and "expected the job's loss, the same on every rank" in weights
        else:
            assert max(relative(ours, serial) for ours, serial in zip(weights, expected, strict=True)) < 1e-4
