"""The first step is checked: programs that are wrong on blocks say so with their line, right ones pass (A9, A12, A13, A14; section E)."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gingham
from gingham import nn
from grids import GRIDS, ranks_of

W, ROWS = 24, 8
Program = Callable[[Any, torch.Tensor], Any]  # of the mesh and a block x in outer


class Plain:
    """Modules and parameters of torch that stand between layers of ours."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.head = torch.nn.Linear(W, 5)

    def norm(self, x: torch.Tensor) -> torch.nn.Module:
        return torch.nn.LayerNorm(x.shape[-1])


def labels(mesh: Any) -> torch.Tensor:
    return mesh.scatter(torch.zeros(ROWS, dtype=torch.long))


# by the meshes on which they are wrong; "cut": those that cut rows or features of outer, "features": that cut outer's features
WRONG: dict[str, tuple[str, Program]] = {
    "mean of a block": ("cut", lambda mesh, x: nn.Linear(W, W)(x).mean().backward()),
    "mse of a block": ("cut", lambda mesh, x: F.mse_loss(nn.Linear(W, W)(x), torch.zeros_like(x)).backward()),
    "l1 of a block": ("cut", lambda mesh, x: F.l1_loss(nn.Linear(W, W)(x), x)),
    "smooth l1 of a block": ("cut", lambda mesh, x: F.smooth_l1_loss(nn.Linear(W, W)(x), x)),
    "F.cross_entropy of a block": ("cut", lambda mesh, x: F.cross_entropy(nn.Linear(W, W)(x), labels(mesh))),
    "nll of a block": ("features", lambda mesh, x: F.nll_loss(nn.Linear(W, W)(x), labels(mesh))),
    "softmax of features": ("features", lambda mesh, x: x.softmax(-1)),
    "log_softmax of features": ("features", lambda mesh, x: F.log_softmax(x, -1)),
    "softmax of rows": ("cut", lambda mesh, x: torch.softmax(x, 0)),
    "mean of features": ("features", lambda mesh, x: x - x.mean(-1, keepdim=True)),
    "variance of features": ("features", lambda mesh, x: x.var(-1)),
    "mean of rows": ("cut", lambda mesh, x: x - x.mean(0)),
    "std of rows": ("cut", lambda mesh, x: x / x.std(0)),
    "cumsum of rows": ("cut", lambda mesh, x: x.cumsum(0)),
    "sort of rows": ("cut", lambda mesh, x: x.sort(0)),
    "roll of rows": ("cut", lambda mesh, x: x.roll(1, 0)),
    "flip of rows": ("cut", lambda mesh, x: x.flip(0)),
    "argmax of features": ("features", lambda mesh, x: x.argmax(-1)),
    "max of all": ("cut", lambda mesh, x: x.max()),
    "norm of features": ("features", lambda mesh, x: x.norm(dim=-1)),
    "F.normalize": ("features", lambda mesh, x: F.normalize(x, dim=-1)),
    "topk of features": ("features", lambda mesh, x: x.topk(2, -1)),
    "F.layer_norm": ("features", lambda mesh, x: F.layer_norm(x, (x.shape[-1],))),
    "torch.nn.LayerNorm": ("cut", lambda mesh, x: Plain().norm(x)(x)),
    "a scalar Parameter": ("cut", lambda mesh, x: nn.Linear(W, W)(x) * Plain().scale),
    "a Parameter added": ("cut", lambda mesh, x: x + torch.nn.Parameter(torch.zeros(x.shape[-1]))),
    "something made of a Parameter": ("cut", lambda mesh, x: x * F.softplus(Plain().scale)),
    "a head of torch on whole features": (
        "rows",
        lambda mesh, x: Plain().head(mesh.scatter(torch.randn(ROWS, W), "rows")),
    ),
    "F.linear over cut features": ("features", lambda mesh, x: F.linear(x, torch.randn(3, x.shape[-1]))),
    "y @ y.T": ("cut", lambda mesh, x: x @ x.T),
    "x.T @ x": ("rows", lambda mesh, x: x.T @ x),
    "item of a sum": ("cut", lambda mesh, x: x.sum().item()),
    "float of a sum": ("cut", lambda mesh, x: float(x.pow(2).sum())),
    "format of a sum": ("cut", lambda mesh, x: f"{x.sum():.3f}"),
    "square of a sum": ("cut", lambda mesh, x: x.sum() ** 2),
    "sqrt of a sum": ("cut", lambda mesh, x: x.pow(2).sum().sqrt()),
    "log of a sum": ("cut", lambda mesh, x: x.exp().sum().log()),
    "F.dropout": ("cut", lambda mesh, x: F.dropout(x, 0.5)),
    "torch.nn.Dropout": ("cut", lambda mesh, x: torch.nn.Dropout(0.1)(nn.Linear(W, W)(x))),
    "noise by randn_like": ("cut", lambda mesh, x: x + torch.randn_like(x)),
    "stochastic depth by bernoulli": ("cut", lambda mesh, x: x * torch.bernoulli(torch.full_like(x, 0.5))),
    "noise in place": ("cut", lambda mesh, x: x.clone().normal_()),
    "the first row": ("rows", lambda mesh, x: x[0]),
    "the last feature": ("features", lambda mesh, x: x[:, -1]),
    "some features": ("features", lambda mesh, x: x[..., : x.shape[-1] // 2]),
    "half of the features by chunk": ("features", lambda mesh, x: x.chunk(2, -1)),
    "features one after the other": ("features", lambda mesh, x: nn.Linear(2 * W, W)(torch.cat([x, x], -1))),
    "gather of inner as outer": ("differ", lambda mesh, x: mesh.gather(nn.Linear(W, W, layout="outer->inner")(x))),
    "x + l(x) across layouts": ("differ", lambda mesh, x: x + nn.Linear(W, W, layout="outer->inner")(x)),
    "an outer layer after an inner one": ("differ", lambda mesh, x: nn.Linear(W, W)(nn.Linear(W, W, layout="outer->inner")(x))),
    "an outer norm after an inner layer": ("differ", lambda mesh, x: nn.LayerNorm(W)(nn.Linear(W, W, layout="outer->inner")(x))),
    "an outer dropout after an inner layer": ("differ", lambda mesh, x: nn.Dropout(0.5)(nn.Linear(W, W, layout="outer->inner")(x))),
    "an inner layer after an outer one": ("differ", lambda mesh, x: nn.Linear(W, W, layout="inner->outer")(x)),
    "a loss of inner as outer": (
        "differ",
        lambda mesh, x: gingham.cross_entropy(nn.Linear(W, W, layout="outer->inner")(x), labels(mesh)),
    ),
    "scatter of a block": ("cut", lambda mesh, x: mesh.scatter(x)),
    "a layer on rows": ("features", lambda mesh, x: nn.Linear(W, W)(mesh.scatter(torch.randn(ROWS, W), "rows"))),
    "scores of rows with each other": ("cut", lambda mesh, x: torch.matmul(x, x.transpose(0, 1))),
    "gather of an operand by another name": ("operands", lambda mesh, x: mesh.gather(mesh.scatter(torch.randn(W, W), "a"), "b")),
}
KINDS = {
    "1d": ("differ",),
    "1d sequence": ("rows", "cut", "differ"),
    "2d": ("rows", "features", "cut"),
    "2.5d": ("rows", "features", "cut"),
    "3d": ("rows", "features", "cut", "differ", "operands"),
    "3x2x2": ("rows", "features", "cut", "differ", "operands"),
}


def told(rank: int, options: dict[str, Any], names: list[str]) -> dict[str, str]:
    """What each wrong program says, "" where nothing."""
    found = {}
    for name in names:
        mesh = gingham.init(**options)
        torch.manual_seed(0)
        program = WRONG[name][1]
        x = mesh.scatter(torch.randn(ROWS, W))
        try:
            program(mesh, x)
            found[name] = ""
        except gingham.LayoutError as error:
            found[name] = str(error)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        gingham.destroy()
    return found


def check_wrong(ranks: Any, name: str) -> None:
    names = [case for case, (kind, _) in WRONG.items() if kind in KINDS[name]]
    for rank, found in enumerate(ranks(ranks_of(name))(told, GRIDS[name], names)):
        silent = [case for case, text in found.items() if not text.startswith(f"rank {rank}: ")]
        assert not silent, {case: found[case] for case in silent}
        # the line of the program, how it is cut, what to write
        for case, text in found.items():
            first = inspect.getsourcelines(WRONG[case][1])[1]
            assert "cut" in text or "sum over" in text, (case, text)
            assert text.count(". ") >= 1 and text.endswith("."), (case, text)
            line = int(text.split(":")[2])
            assert abs(line - first) <= 3 or "Plain" in inspect.getsource(WRONG[case][1]) or "labels" in text, (case, line, first, text)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "2d" else [pytest.mark.matrix]) for name in KINDS])
def test_a9_a12_a13_wrong_programs_are_told(ranks, name: str) -> None:
    check_wrong(ranks, name)


RIGHT: dict[str, Program] = {
    "a sum and backward": lambda mesh, x: nn.Linear(W, W)(x).pow(2).sum().backward(),
    "a sum of parts": lambda mesh, x: (nn.Linear(W, W)(x).abs().sum() * 0.5 + x.sum() / 3).backward(),
    "gather and mean": lambda mesh, x: mesh.gather(nn.Linear(W, W)(x)).mean().backward(),
    "gather and item": lambda mesh, x: mesh.gather(x).sum().item(),
    "residual": lambda mesh, x: mesh.gather(x + nn.Linear(W, W)(nn.LayerNorm(W)(x))),
    "inner and back": lambda mesh, x: mesh.gather(
        nn.Linear(48, W, layout="inner->outer")(nn.Linear(W, 48, layout="outer->inner")(x).relu())
    ),
    "mlp": lambda mesh, x: mesh.gather(nn.MLP(W, 48, activation="silu", gated=True)(x)),
    "activations": lambda mesh, x: mesh.gather(F.gelu(F.silu(torch.relu(x)).tanh().sigmoid())),
    "arithmetic": lambda mesh, x: mesh.gather((x * 2 - 1) / 3 + x**2 - x.abs().sqrt()),
    "in place": lambda mesh, x: mesh.gather(nn.Linear(W, W)(x).mul_(2).add_(1).relu_()),
    "loss": lambda mesh, x: gingham.cross_entropy(nn.Linear(W, W)(x), labels(mesh)).backward(),
    "loss.item()": lambda mesh, x: gingham.cross_entropy(nn.Linear(W, W)(x), labels(mesh)).item(),
    "loss of inner": lambda mesh, x: gingham.cross_entropy(
        nn.Classifier(W, W)(x), mesh.scatter(torch.zeros(ROWS, dtype=torch.long)), layout="inner"
    ).item(),
    "losses": lambda mesh, x: gingham.cross_entropy(nn.Linear(W, W)(x), labels(mesh), reduction="none").sum().backward(),
    "accuracy": lambda mesh, x: float(gingham.accuracy(nn.Linear(W, W)(x), labels(mesh))),
    "dropout": lambda mesh, x: mesh.gather(nn.Dropout(0.5)(x)),
    "dropout in eval": lambda mesh, x: mesh.gather(F.dropout(x, 0.5, training=False)),
    "embedding": lambda mesh, x: mesh.gather(nn.Embedding(9, W)(labels(mesh))),
    "embedding and positions": lambda mesh, x: (
        nn.Embedding(9, W)(mesh.scatter(torch.zeros(ROWS, 3, dtype=torch.long))) + nn.Embedding(9, W)(torch.arange(3))
    ),
    "a constant added": lambda mesh, x: mesh.gather(x + torch.ones(x.shape[-1])),
    "a mask": lambda mesh, x: mesh.gather(x.masked_fill(x < 0, 0.0)),
    "where": lambda mesh, x: mesh.gather(torch.where(x > 0, x, -x)),
    "clamp": lambda mesh, x: mesh.gather(x.clamp(-1, 1).clamp_min(0)),
    "shape and size": lambda mesh, x: (x.shape, x.size(0), x.numel(), x.dtype, x.dim(), len(x)),
    "print": lambda mesh, x: repr(x),
    "numpy": lambda mesh, x: x.detach().numpy(),
    "clone and detach": lambda mesh, x: mesh.gather(x.clone().detach().contiguous()),
    "to another dtype": lambda mesh, x: mesh.gather(x.double().float()),
    "requires_grad_": lambda mesh, x: nn.Linear(W, W)(x.requires_grad_()).sum().backward(),
    "three dims": lambda mesh, x: mesh.gather(nn.Linear(W, W)(mesh.scatter(torch.randn(ROWS, 3, W)))),
    "mean over time": lambda mesh, x: mesh.gather(mesh.scatter(torch.randn(ROWS, 3, W)).mean(1)),
    "softmax over time": lambda mesh, x: mesh.gather(mesh.scatter(torch.randn(ROWS, 3, W)).softmax(1)),
    "the last of time": lambda mesh, x: mesh.gather(mesh.scatter(torch.randn(ROWS, 3, W))[:, -1]),
    "time turned": lambda mesh, x: mesh.gather(mesh.scatter(torch.randn(ROWS, 3, W)).flip(1)),
    "heads by unflatten": lambda mesh, x: mesh.scatter(torch.randn(ROWS, 3, W)).unflatten(-1, (-1, 2)).transpose(1, 2).flatten(-2),
    "rows and time as one": lambda mesh, x: nn.Linear(W, W)(mesh.scatter(torch.randn(ROWS, 3, W)).flatten(0, 1)).sum().backward(),
    "view": lambda mesh, x: mesh.gather(x.view(x.shape[0], 1, x.shape[1]).squeeze(1)),
    "unsqueeze": lambda mesh, x: mesh.gather(x.unsqueeze(1)),
    "transpose twice": lambda mesh, x: mesh.gather(x.t().t()),
    "permute": lambda mesh, x: mesh.scatter(torch.randn(ROWS, 3, W)).permute(1, 0, 2).permute(1, 0, 2) + 1,
    "attention": lambda mesh, x: mesh.gather(nn.SelfAttention(48, 8)(mesh.scatter(torch.randn(ROWS, 3, 48)))),
    "attention by hand": lambda mesh, x: by_hand(mesh),
    "sequence cut": lambda mesh, x: mesh.gather(nn.SelfAttention(48, 8, dim=1)(mesh.scatter(torch.randn(2, ROWS, 48), dim=1)), dim=1),
    "no_grad": lambda mesh, x: no_grad(mesh, x),
    "checkpoint": lambda mesh, x: checkpointed(x),
    "autocast": lambda mesh, x: autocast(mesh, x),
    "accumulation": lambda mesh, x: [nn.Linear(W, W)(part).sum().backward() for part in x.chunk(2)],
    "two batches in one": lambda mesh, x: nn.Linear(W, W)(torch.cat([x, x])).sum().backward(),
    "clip": lambda mesh, x: clipped(x),
    "an optimizer": lambda mesh, x: stepped(mesh, x),
    "gradient penalty": lambda mesh, x: penalty(mesh, x),
    "matmul of operands": lambda mesh, x: mesh.gather(
        gingham.matmul(mesh.scatter(torch.randn(W, W), "a"), mesh.scatter(torch.randn(W, W), "b")), "c"
    ),
    "relu then sum of operands": lambda mesh, x: (
        gingham.matmul(mesh.scatter(torch.randn(W, W), "a"), mesh.scatter(torch.randn(W, W), "b")).relu().sum()
    ),
    "torch.nn activations": lambda mesh, x: torch.nn.Sequential(nn.Linear(W, 48, layout="outer->inner"), torch.nn.GELU())(x),
    "sequential": lambda mesh, x: mesh.gather(torch.nn.Sequential(nn.Linear(W, W), torch.nn.ReLU(inplace=True), nn.LayerNorm(W))(x)),
    "hooks": lambda mesh, x: x.requires_grad_().mul(2).register_hook(lambda g: g) and None,
    "deepcopy": lambda mesh, x: __import__("copy").deepcopy(x),
    "stack": lambda mesh, x: torch.stack([x, x]).sum(0).add(1),
    "cat over time": lambda mesh, x: torch.cat([mesh.scatter(torch.randn(ROWS, 3, W))] * 2, 1) + 1,
    "rms norm": lambda mesh, x: mesh.gather(nn.RMSNorm(W)(x)),
    "isnan": lambda mesh, x: x.isnan() | x.isinf(),
    "patches": lambda mesh, x: nn.PatchEmbedding((8, 8), 4, 3, W)(mesh.scatter(torch.randn(ROWS, 3, 8, 8), "rows")),
    "skip_bias_add": lambda mesh, x: sum(nn.Linear(W, W, skip_bias_add=True)(x)).sum().backward(),
    "tied": lambda mesh, x: tied(mesh),
    "a list of blocks": lambda mesh, x: [each + 1 for each in (x, x * 2)],
    "kept for the next step": lambda mesh, x: [nn.Linear(W, W)(x).sum().backward() for _ in range(3)],
}


def by_hand(mesh: Any) -> torch.Tensor:
    """Heads lie on inner's feature ranks, sequences are whole."""
    q = nn.Linear(48, 48, layout="outer->inner")(mesh.scatter(torch.randn(ROWS, 3, 48))).unflatten(-1, (-1, 2)).transpose(1, 2)
    scores = (q @ q.transpose(-2, -1) / 2).softmax(-1)
    return nn.Linear(48, 48, layout="inner->outer")((scores @ q).transpose(1, 2).flatten(-2))


def no_grad(mesh: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return mesh.gather(nn.Linear(W, W)(x))


def checkpointed(x: torch.Tensor) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = nn.Linear(W, W)
    checkpoint(lambda x: layer(x).relu(), x.requires_grad_(), use_reentrant=False).sum().backward()


def autocast(mesh: Any, x: torch.Tensor) -> None:
    with torch.autocast("cpu"):
        gingham.cross_entropy(nn.Linear(W, W)(x), labels(mesh)).backward()


def clipped(x: torch.Tensor) -> torch.Tensor:
    layer = nn.Linear(W, W)
    layer(x).sum().backward()
    return gingham.clip_grad_norm_(layer.parameters(), 1.0)


def stepped(mesh: Any, x: torch.Tensor) -> None:
    layer = nn.Linear(W, W)
    optimizer = torch.optim.AdamW(layer.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        gingham.cross_entropy(layer(x), labels(mesh)).backward()
        optimizer.step()


def penalty(mesh: Any, x: torch.Tensor) -> None:
    x = x.requires_grad_()
    y = mesh.gather(nn.Linear(W, W)(x)).sin().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    (y + gradient.pow(2).sum()).backward()


def tied(mesh: Any) -> torch.Tensor:
    table = nn.Embedding(32, W)
    return nn.Classifier(W, 32, tied=table)(table(labels(mesh)))


def passed(rank: int, options: dict[str, Any], names: list[str]) -> dict[str, str]:
    """What right programs said though they are right; and that tensors are plain after the first step."""
    wrong = {}
    for name in names:
        mesh = gingham.init(**options)
        torch.manual_seed(0)
        try:
            RIGHT[name](mesh, mesh.scatter(torch.randn(ROWS, W)))
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
        gingham.destroy()
    mesh = gingham.init(**options)
    layer = nn.Linear(W, W)
    layer(mesh.scatter(torch.randn(ROWS, W))).sum().backward()
    x = mesh.scatter(torch.randn(ROWS, W))
    if type(x) is not torch.Tensor or type(layer(x)) is not torch.Tensor or mesh.checks is not None:
        wrong["second step"] = f"{type(x)} {mesh.checks}"
    return wrong


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "2d" else [pytest.mark.matrix]) for name in KINDS])
def test_right_programs_pass(ranks, name: str) -> None:
    names = list(RIGHT) if name != "3x2x2" else [case for case in RIGHT if case != "attention by hand"]
    for found in ranks(ranks_of(name))(passed, GRIDS[name], names):
        assert not found, found


def scattered(rank: int, options: dict[str, Any]) -> str:
    """Other values on one rank, with GINGHAM_CHECK=1."""
    import os

    os.environ["GINGHAM_CHECK"] = "1"
    try:
        mesh = gingham.init(**options)
        for _ in range(3):  # checked in every step
            assert type(mesh.scatter(torch.ones(ROWS, W))) is not torch.Tensor
        mesh.scatter(torch.full((ROWS, W), float(rank == 2)))
        return ""
    except gingham.LayoutError as error:
        return str(error)
    finally:
        del os.environ["GINGHAM_CHECK"]


def test_a6_other_values_given_to_scatter(ranks) -> None:
    assert all("values on ranks [2]" in text for text in ranks(4)(scattered, GRIDS["2d"]))


def scattered_twice(rank: int, options: dict[str, Any]) -> list[str]:
    """A wrong operation after a second scatter on the same line, in a helper, in a comprehension; and a loop without backward passes."""
    told = []
    for way in range(3):
        mesh = gingham.init(**options)
        torch.manual_seed(0)
        layer, full = nn.Linear(W, W), torch.randn(ROWS, W)

        def put(x: torch.Tensor, mesh: Any = mesh) -> torch.Tensor:
            return mesh.scatter(x)

        try:
            if way == 0:
                y, other = layer(mesh.scatter(full)), mesh.scatter(full)
            elif way == 1:
                y = layer(put(full))
                other = put(full)
            else:
                y, other = (layer(each) for each in [mesh.scatter(each) for each in (full, full)])
            (y + other).softmax(-1)
            told.append("")
        except gingham.LayoutError as error:
            told.append(str(error))
        gingham.destroy()
    mesh = gingham.init(**options)
    layer = nn.Linear(W, W)
    with torch.no_grad():
        kinds = [type(layer(mesh.scatter(torch.randn(ROWS, W)))) is torch.Tensor for _ in range(3)]
    return [*told, str(kinds)]


def test_a12_the_check_ends_with_the_step_and_not_with_a_second_scatter(ranks) -> None:
    for *told, kinds in ranks(4)(scattered_twice, GRIDS["2d"]):
        assert all("softmax" in text for text in told), told
        assert kinds == "[False, True, True]"


def evaluated_first(rank: int, options: dict[str, Any]) -> list[Any]:
    """Kinds of blocks while only evaluations run, with no_grad around scatter too or around the layer alone; then a wrong loss trains."""
    found: list[Any] = []
    for around in (True, False):
        mesh, layer = gingham.init(**options), nn.Linear(W, W)
        for _ in range(3):
            with torch.set_grad_enabled(not around):
                x = mesh.scatter(torch.ones(ROWS, W))
            with torch.no_grad():
                found.append(type(layer(x)) is torch.Tensor)
        found.append(mesh.checks.on)
        with pytest.raises(gingham.LayoutError, match="mean over a dim that ranks cut"):
            layer(mesh.scatter(torch.ones(ROWS, W))).mean().backward()
        gingham.destroy()
    return found


def test_an_evaluation_before_training_leaves_the_first_step_checked(ranks) -> None:
    assert all(found == [False, True, True, False] * 2 for found in ranks(4)(evaluated_first, GRIDS["2d"]))


def compiled_alone(rank: int) -> None:
    """Rank 0 alone calls torch.compile, which ends the check there."""
    mesh = gingham.init("1d", size=2, sequence=True, timeout=10.0)
    if rank == 0:
        torch.compile(torch.nn.Identity())
    layer = nn.Linear(W, W)
    for _ in range(3):
        layer(mesh.scatter(torch.ones(ROWS, W)))


def test_a_check_that_ended_on_one_rank_only_is_told_with_the_fix(ranks) -> None:
    for outcome in ranks(2)(compiled_alone, outcomes=True):
        assert isinstance(outcome, Exception), outcome
        assert "MeshError" in str(outcome) and "which torch.compile ends, to be called on every rank or none" in str(outcome), outcome
