"""Checked mode beyond its table of rules: operations that no rule names are tried, plain tensors and random numbers are compared with
the other ranks' (A8, A12, A13; A5 for generators)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gingham
from gingham import nn
from gingham.checks import Checks
from grids import GRIDS, ranks_of

W, ROWS, TIME = 24, 8, 4
Program = Callable[[Any, torch.Tensor], Any]  # of the mesh and a block x in outer


def first(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.shape[0], 1, dtype=torch.long)


def time(mesh: Any) -> torch.Tensor:
    return mesh.scatter(torch.randn(ROWS, TIME, W))


def rows(mesh: Any) -> torch.Tensor:
    return mesh.scatter(torch.randn(ROWS, W), "rows")


# wrong wherever rows and features are cut
WRONG: dict[str, Program] = {
    "a product of rows by einsum": lambda mesh, x: torch.einsum("id,jd->ij", x, x),
    "a sum of features by einsum": lambda mesh, x: torch.einsum("id->i", x),
    "tensordot": lambda mesh, x: torch.tensordot(x, x, dims=([1], [1])),
    "cdist": lambda mesh, x: torch.cdist(x, x),
    "cosine similarity": lambda mesh, x: F.cosine_similarity(x, x + 1),
    "pairwise distance": lambda mesh, x: F.pairwise_distance(x, x + 1),
    "vector norm": lambda mesh, x: torch.linalg.vector_norm(x, dim=-1),
    "distance": lambda mesh, x: torch.dist(x, x + 1),
    "a product with a bias": lambda mesh, x: torch.addmm(torch.zeros(3), x, torch.randn(x.shape[1], 3)),
    "inner": lambda mesh, x: torch.inner(x, x),
    "covariance": lambda mesh, x: torch.cov(x),
    "singular values": lambda mesh, x: torch.linalg.svdvals(x),
    "differences of features": lambda mesh, x: torch.diff(x),
    "cummax": lambda mesh, x: x.cummax(-1),
    "fourier transform": lambda mesh, x: torch.fft.rfft(x),
    "a triangle": lambda mesh, x: torch.tril(x),
    "pooling of features": lambda mesh, x: F.avg_pool1d(x[:, None], 2),
    "padding of features": lambda mesh, x: nn.Linear(W, W)(F.pad(x, (0, 1))[:, :-1]),
    "halves of features that gate": lambda mesh, x: nn.Linear(W // 2, W)(F.glu(x)),
    "features twice": lambda mesh, x: nn.Linear(2 * W, W)(x.repeat(1, 2)),
    "features by number": lambda mesh, x: x.gather(1, first(x)),
    "features by take_along_dim": lambda mesh, x: torch.take_along_dim(x, first(x), 1),
    "rows by number": lambda mesh, x: x[torch.tensor([1, 0])],
    "rows by a list": lambda mesh, x: x[[1, 0]],
    "a row's index filled": lambda mesh, x: x.index_fill(0, torch.tensor([0]), 0.0),
    "scatter_ into features": lambda mesh, x: x.clone().scatter_(1, first(x), 1.0),
    "the first feature set": lambda mesh, x: x.clone().__setitem__((slice(None), 0), 0.0),
    "the mean of a boolean mask": lambda mesh, x: x[x > 0].mean(),
    "the mean of masked_select": lambda mesh, x: x.masked_select(x > 0).mean(),
    "kl_div by batchmean": lambda mesh, x: F.kl_div(x, x.exp(), reduction="batchmean"),
    "triplet loss": lambda mesh, x: F.triplet_margin_loss(x, x + 1, x + 2),
    "triplet loss, summed": lambda mesh, x: F.triplet_margin_loss(x, x + 1, x + 2, reduction="sum"),
    "cosine embedding loss": lambda mesh, x: F.cosine_embedding_loss(x, x + 1, torch.ones(x.shape[0])),
    "margin ranking loss": lambda mesh, x: F.margin_ranking_loss(x, x + 1, torch.ones(x.shape)),
    "soft margin loss": lambda mesh, x: F.soft_margin_loss(x, torch.ones(x.shape)),
    "gumbel softmax": lambda mesh, x: F.gumbel_softmax(x),
    "noise by poisson": lambda mesh, x: torch.poisson(x.abs()),
    "a random slope": lambda mesh, x: F.rrelu(x, training=True),
    "stochastic depth by new_empty": lambda mesh, x: x * x.new_empty((x.shape[0], 1)).bernoulli_(0.5),
    "noise by new_zeros": lambda mesh, x: x + x.new_zeros(x.shape).normal_(),
    "one by a sum": lambda mesh, x: 1 / x.sum(),
    "a mean taken off by a sum": lambda mesh, x: x - x.sum(-1, keepdim=True) / W,
    "a plain row put to a block": lambda mesh, x: torch.cat([x, torch.zeros(1, x.shape[1])]),
    "a full tensor added": lambda mesh, x: x + torch.ones(ROWS, W),
    "an LSTM with weights": lambda mesh, x: torch.nn.LSTM(W, 3)(rows(mesh)),
}


def told(rank: int, options: dict[str, Any], programs: dict[str, Program]) -> dict[str, str]:
    mesh, found = gingham.init(**options), {}
    for name, program in programs.items():
        torch.manual_seed(0)
        mesh.checks = Checks(mesh)
        try:
            program(mesh, mesh.scatter(torch.randn(ROWS, W)))
            found[name] = ""
        except gingham.LayoutError as error:
            found[name] = str(error)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


MESHES = pytest.mark.parametrize("name", ["2d", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("2.5d", "3d", "3x2x2"))])


@MESHES
def test_a12_a13_wrong_operations_without_a_rule_are_told(ranks, name: str) -> None:
    for rank, found in enumerate(ranks(ranks_of(name))(told, GRIDS[name], WRONG)):
        assert not {case: text for case, text in found.items() if not text.startswith(f"rank {rank}: ") or not text.endswith(".")}


def dispatched(x: torch.Tensor) -> torch.Tensor:
    """As a mixture of experts takes its tokens."""
    index = (x.sum(1) > 0).nonzero(as_tuple=True)[0]
    return torch.zeros_like(x).index_add(0, index, x[index] * 2)


def by_einsum(mesh: Any) -> torch.Tensor:
    q = nn.Linear(48, 48, layout="outer->inner")(mesh.scatter(torch.randn(ROWS, TIME, 48))).unflatten(-1, (-1, 2))
    scores = torch.einsum("bihd,bjhd->bhij", q, q).tril().softmax(-1)
    return nn.Linear(48, 48, layout="inner->outer")(torch.einsum("bhij,bjhd->bihd", scores, q).flatten(-2))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


def summed_over_ranks(x: torch.Tensor) -> float:
    total = x.sum()
    torch.distributed.all_reduce(total)
    return total.item()


RIGHT: dict[str, Program] = {
    "a function of the user's own": lambda mesh, x: mesh.gather(Square.apply(layer_of(x))).sum().backward(),
    "a sum over ranks by torch.distributed": lambda mesh, x: summed_over_ranks(x),
    "attention by einsum": lambda mesh, x: by_einsum(mesh),
    "time padded": lambda mesh, x: nn.Linear(W, W)(F.pad(time(mesh), (0, 0, 1, 0))[:, :-1]),
    "differences of time": lambda mesh, x: nn.Linear(W, W)(torch.diff(time(mesh), dim=1)),
    "time by number": lambda mesh, x: nn.Linear(W, W)(time(mesh)[:, torch.tensor([2, 0])]),
    "time by index_select": lambda mesh, x: nn.Linear(W, W)(time(mesh).index_select(1, torch.tensor([2, 0]))),
    "cummax of time": lambda mesh, x: nn.Linear(W, W)(time(mesh).cummax(1).values),
    "time filled": lambda mesh, x: nn.Linear(W, W)(time(mesh).index_fill(1, torch.tensor([0]), 0.0)),
    "time set": lambda mesh, x: time(mesh).__setitem__((slice(None), 0), 0.0),
    "time pooled": lambda mesh, x: nn.Linear(W, W)(F.avg_pool1d(time(mesh).transpose(1, 2), 2).transpose(1, 2)),
    "time twice": lambda mesh, x: nn.Linear(W, W)(time(mesh).repeat_interleave(2, 1)),
    "fourier transform of time": lambda mesh, x: nn.Linear(W, W)(torch.fft.fft(time(mesh), dim=1).real),
    "rows by a mask": lambda mesh, x: layer_of(x[labels(mesh) > -1]),
    "tokens to an expert": lambda mesh, x: dispatched(rows(mesh)).sum().backward,
    "whole features compared": lambda mesh, x: F.cosine_similarity(rows(mesh), rows(mesh)).sum(),
    "whole features by number": lambda mesh, x: rows(mesh).gather(1, first(rows(mesh))).sum(),
    "summed triplet loss of whole features": lambda mesh, x: F.triplet_margin_loss(rows(mesh), rows(mesh), rows(mesh), reduction="sum"),
    "a mask of zeros and ones": lambda mesh, x: nn.Linear(W, W)(x * x.new_ones(x.shape)).sum().backward(),
    "lerp": lambda mesh, x: nn.Linear(W, W)(torch.lerp(x, x * 2, 0.5)),
    "ldexp": lambda mesh, x: nn.Linear(W, W)(torch.ldexp(x, torch.tensor(2))),
    "bessel": lambda mesh, x: nn.Linear(W, W)(torch.special.i0(x)),
    "a number by map_": lambda mesh, x: nn.Linear(W, W)(x.clone().map_(x, lambda a, b: a + b)),
    "repr of a sum": lambda mesh, x: repr(x.sum()),
}


@MESHES
def test_right_operations_without_a_rule_pass(ranks, name: str) -> None:
    programs = {case: program for case, program in RIGHT.items() if name != "3x2x2" or case != "attention by einsum"}
    for found in ranks(ranks_of(name))(told, GRIDS[name], programs):
        assert not {case: text for case, text in found.items() if text}


def layer_of(x: torch.Tensor) -> torch.Tensor:
    return nn.Linear(W, W)(x)


def labels(mesh: Any) -> torch.Tensor:
    return mesh.scatter(torch.zeros(ROWS, dtype=torch.long))


SAME: dict[str, Program] = {
    "stochastic depth": lambda mesh, x: (layer_of(x) * torch.rand(x.shape[0], 1)).sum().backward(),
    "noise": lambda mesh, x: gingham.cross_entropy(layer_of(x) + torch.randn(x.shape), labels(mesh)).backward(),
    "numbers of features": lambda mesh, x: layer_of(x * torch.arange(x.shape[-1])).sum().backward(),
    "noise without a backward pass": lambda mesh, x: [mesh.scatter(torch.ones(ROWS, W)) + torch.randn(x.shape) for _ in range(2)],
}
APART: dict[str, Program] = {
    "a constant": lambda mesh, x: layer_of(x * torch.full(x.shape, 3.0)).sum().backward(),
    "this rank's part": lambda mesh, x: layer_of(x * mesh.scatter(torch.randn(ROWS, W)).detach().numpy().tolist()[0][0]).sum().backward(),
    "numbers of time": lambda mesh, x: layer_of(time(mesh) * torch.arange(TIME)[:, None]).sum().backward(),
    "cut by hand": lambda mesh, x: layer_of(x * torch.arange(W)[mesh.interval(W, mesh.outer.features)[0] :][: x.shape[1]]).sum().backward(),
}


@MESHES
def test_a13_plain_tensors_that_are_the_same_on_every_rank_are_told(ranks, name: str) -> None:
    for rank, found in enumerate(ranks(ranks_of(name))(told, GRIDS[name], SAME | APART)):
        assert not {case: found[case] for case in APART if found[case]}
        told_of = ("numbers of features",) if name == "3x2x2" else SAME  # where blocks differ in size their random numbers do too
        assert all(found[case].startswith(f"rank {rank}: ") and "the same on every rank" in found[case] for case in told_of), found


def seeded(rank: int, options: dict[str, Any], apart: bool) -> str:
    """torch's dropout on what every rank of classic 1d holds, under one seed or several."""
    mesh = gingham.init(**options)
    torch.manual_seed(0)
    layer, x = nn.Linear(W, W), mesh.scatter(torch.randn(ROWS, W))
    torch.manual_seed(rank if apart else 1)
    try:
        F.dropout(layer(x)).sum().backward()
        return ""
    except gingham.LayoutError as error:
        return str(error)


def test_a5_dropout_of_torch_under_other_seeds_is_told(ranks) -> None:
    assert all("ranks [1, 2, 3]" in text for text in ranks(4)(seeded, GRIDS["1d"], True))
    assert ranks(4)(seeded, GRIDS["1d"], False) == [""] * 4


def own_rows(rank: int, way: str) -> Any:
    """The gradient of a loss of each data rank's own rows, 3 and 5, over all 8; or one through own rows that are scattered again."""
    config: dict[str, Any] = dict(data=2, tensor=dict(size=2, mode="1d"))
    mesh = gingham.init(parallel=config)
    torch.manual_seed(0)
    layer, x, target = nn.Linear(W, W), torch.randn(ROWS, W), torch.randn(ROWS, W)
    mine = slice(0, 3) if mesh.data.rank == 0 else slice(3, ROWS)
    y = mesh.gather(layer(mesh.scatter(x[mine], own=True)), own=True)
    if way == "again":
        y = mesh.gather(mesh.scatter(y.softmax(-1), own=True), own=True)
    error = y - target[mine]
    try:
        (error.square().mean() if way == "mean" else error.square().sum() / target.numel()).backward()
    except gingham.LayoutError as told:
        return str(told)
    return layer.weight.grad.full_tensor()


def test_a_mean_of_a_data_ranks_own_rows_is_told_and_a_part_of_a_sum_is_right(ranks) -> None:
    torch.manual_seed(0)
    twin, x, target = torch.nn.Linear(W, W), torch.randn(ROWS, W), torch.randn(ROWS, W)
    for text in ranks(4)(own_rows, "mean"):
        assert "mean over a dim that ranks cut" in text and "dim 0 over data" in text
    for way in ("sum", "again"):
        y = twin(x).softmax(-1) if way == "again" else twin(x)
        (expected,) = torch.autograd.grad((y - target).square().mean(), twin.weight)
        for found in ranks(4)(own_rows, way):
            torch.testing.assert_close(found, expected)
