"""What two ranks can differ in: every option of every layer, seeds, order, skipped and repeated calls (A4, A5, A6).

Each kind is one rank of the job doing something else than the rest; every rank must be told, none may hang or use a value.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from grids import GRIDS, ranks_of

LIMIT = 1.0  # seconds
W, ROWS = 24, 8
Run = Callable[[gingham.Mesh], Any]


def x_of(mesh: gingham.Mesh, dtype: torch.dtype = torch.float32, rows: int = ROWS, operand: str = "x") -> torch.Tensor:
    full = torch.randn(rows, W, generator=torch.Generator().manual_seed(1)).to(dtype)
    return mesh.scatter(full, operand)


def layer(make: Callable[..., torch.nn.Module], *args: Any, **options: Any) -> Run:
    """One call of a layer and its backward pass."""

    def run(mesh: gingham.Mesh) -> Any:
        module = make(*args, **options)
        y = module(x_of(mesh).requires_grad_())
        y = y[0] if isinstance(y, tuple) else y
        y.float().sum().backward()
        return mesh.gather(x_of(mesh))

    return run


def sequence(**options: Any) -> Run:
    def run(mesh: gingham.Mesh) -> Any:
        full = torch.randn(ROWS, 3, W, generator=torch.Generator().manual_seed(1))
        nn.SelfAttention(W, 8, **options)(mesh.scatter(full))
        return mesh.gather(x_of(mesh))

    return run


def table(count: int = 32, width: int = W, **options: Any) -> Run:
    def run(mesh: gingham.Mesh) -> Any:
        nn.Embedding(count, width, **options)(mesh.scatter(torch.arange(ROWS)))
        return mesh.gather(x_of(mesh))

    return run


def loss(target: int = 3, **options: Any) -> Run:
    def run(mesh: gingham.Mesh) -> Any:
        gingham.cross_entropy(x_of(mesh), mesh.scatter(torch.full((ROWS,), target)), **options)
        return mesh.gather(x_of(mesh))

    return run


def accuracy(**options: Any) -> Run:
    return lambda mesh: (
        gingham.accuracy(x_of(mesh), mesh.scatter(torch.zeros(ROWS, dtype=torch.long)), **options),
        mesh.gather(x_of(mesh)),
    )


def dropout(p: float = 0.5, training: bool = True, times: int = 1, **options: Any) -> Run:
    def run(mesh: gingham.Mesh) -> Any:
        torch.manual_seed(0)
        module = nn.Dropout(p, **options).train(training)
        for _ in range(times):
            module(x_of(mesh))
        return mesh.gather(x_of(mesh))

    return run


def clip(max_norm: float = 1.0, **options: Any) -> Run:
    def run(mesh: gingham.Mesh) -> Any:
        module = nn.Linear(W, W)
        module(x_of(mesh)).sum().backward()
        return gingham.clip_grad_norm_(module.parameters(), max_norm, **options)

    return run


def clip_some(count: int) -> Run:
    def run(mesh: gingham.Mesh) -> Any:
        module = nn.Linear(W, W)
        module(x_of(mesh)).sum().backward()
        return gingham.clip_grad_norm_(list(module.parameters())[:count], 1.0)

    return run


def seeded(seed: int, make: Callable[[], torch.nn.Module]) -> Run:
    """A layer made under a seed of the rank's own (A4)."""

    def run(mesh: gingham.Mesh) -> Any:
        torch.manual_seed(seed)
        module = make()
        module(mesh.scatter(torch.arange(ROWS)) if isinstance(module, nn.Embedding) else x_of(mesh))
        return mesh.gather(x_of(mesh))

    return run


def given(value: float) -> Run:
    weight = torch.ones(W, W)
    weight[-1, -1] = value
    return layer(nn.Linear, W, W, bias=False, given={"weight": weight})


def several(*names: str) -> Run:
    """Calls of layers of one shape, in this order."""

    def run(mesh: gingham.Mesh) -> Any:
        torch.manual_seed(0)
        made = {"a": nn.Linear(W, W), "b": nn.Linear(W, W), "n": nn.LayerNorm(W), "m": nn.LayerNorm(W), "r": nn.RMSNorm(W)}
        x = x_of(mesh)
        for name in names:
            x = made[name](x)
        return mesh.gather(x)

    return run


def backwards(first: int) -> Run:
    """Of two losses, this one's backward pass first."""

    def run(mesh: gingham.Mesh) -> Any:
        torch.manual_seed(0)
        made = nn.Linear(W, W), nn.Linear(W, W)
        x = x_of(mesh).requires_grad_()
        ys = [each(x) for each in made]
        ys[first].sum().backward()
        ys[1 - first].sum().backward()
        return mesh.gather(x_of(mesh))

    return run


def frozen(which: str) -> Run:
    def run(mesh: gingham.Mesh) -> Any:
        module = nn.Linear(W, W)
        if which:
            module.get_parameter(which).requires_grad_(False)
        module(x_of(mesh).requires_grad_()).sum().backward()
        return mesh.gather(x_of(mesh))

    return run


def product(m: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> Run:
    def run(mesh: gingham.Mesh) -> Any:
        a, b = mesh.scatter(torch.ones(m, k, dtype=dtype), "a"), mesh.scatter(torch.ones(k, n, dtype=dtype), "b")
        gingham.matmul(a, b, shape=(m, k, n))
        return mesh.gather(x_of(mesh))

    return run


def gathers(times: int = 1, operand: str = "x", rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Run:
    def run(mesh: gingham.Mesh) -> Any:
        x = x_of(mesh, dtype, rows, operand)
        for _ in range(times):
            mesh.gather(x, operand)
        return mesh.gather(x_of(mesh).double()), mesh.gather(x_of(mesh))

    return run


def without_sync(inside: bool) -> Run:
    def run(mesh: gingham.Mesh) -> Any:
        module = nn.Linear(W, W, layout="outer->inner")
        if inside:
            with gingham.no_sync(module):
                module(x_of(mesh)).sum().backward()
        else:
            module(x_of(mesh)).sum().backward()
        return mesh.gather(x_of(mesh))

    return run


def autocast(on: bool) -> Run:
    def run(mesh: gingham.Mesh) -> Any:
        with torch.autocast("cpu", enabled=on):
            nn.Linear(W, W)(x_of(mesh))
        return mesh.gather(x_of(mesh))

    return run


linear = layer(nn.Linear, W, 16)
mlp = layer(nn.MLP, W, 48)
attention = sequence()

# what the others do, and what the odd rank does
CASES: dict[str, tuple[Run, Run]] = {
    "Linear out_features": (linear, layer(nn.Linear, W, 32)),
    "Linear bias": (linear, layer(nn.Linear, W, 16, bias=False)),
    "Linear epilogue": (linear, layer(nn.Linear, W, 16, epilogue="gelu")),
    "Linear dtype": (linear, lambda mesh: nn.Linear(W, 16, dtype=torch.float64)(x_of(mesh, torch.float64))),
    "Linear layout": (linear, layer(nn.Linear, W, 16, layout="outer->inner")),
    "Linear skip_bias_add": (linear, layer(nn.Linear, W, 16, skip_bias_add=True)),
    "Linear transposed": (linear, layer(nn.Linear, W, 16, transposed=True)),
    "Linear init_weight": (linear, layer(nn.Linear, W, 16, init_weight=torch.nn.init.ones_)),
    "Linear init_bias": (linear, layer(nn.Linear, W, 16, init_bias=torch.nn.init.ones_)),
    "Linear given": (given(1.0), given(2.0)),
    "Linear or MLP": (layer(nn.Linear, W, W), layer(nn.MLP, W, W)),
    "Linear seed": (seeded(0, lambda: nn.Linear(W, W)), seeded(1, lambda: nn.Linear(W, W))),
    "Embedding seed": (seeded(0, lambda: nn.Embedding(32, W)), seeded(1, lambda: nn.Embedding(32, W))),
    "MLP seed": (seeded(0, lambda: nn.MLP(W, W)), seeded(1, lambda: nn.MLP(W, W))),
    "a number drawn before a layer": (
        seeded(0, lambda: nn.Linear(W, W)),
        seeded(0, lambda: (torch.randn(1), nn.Linear(W, W))[1]),
    ),
    "Classifier bias": (layer(nn.Classifier, W, 16), layer(nn.Classifier, W, 16, bias=True)),
    "Classifier or Linear": (layer(nn.Classifier, W, 16), layer(nn.Linear, W, 16, layout="outer->inner", bias=False)),
    "Embedding num_embeddings": (table(), table(36)),
    "Embedding embedding_dim": (table(), table(width=48)),
    "Embedding padding_idx": (table(), table(padding_idx=1)),
    "Embedding padding_idx value": (table(padding_idx=2), table(padding_idx=1)),
    "Embedding dtype": (table(), table(dtype=torch.float64)),
    "LayerNorm eps": (layer(nn.LayerNorm, W), layer(nn.LayerNorm, W, eps=1e-3)),
    "LayerNorm bias": (layer(nn.LayerNorm, W), layer(nn.LayerNorm, W, bias=False)),
    "LayerNorm elementwise_affine": (layer(nn.LayerNorm, W), layer(nn.LayerNorm, W, elementwise_affine=False)),
    "RMSNorm eps": (layer(nn.RMSNorm, W), layer(nn.RMSNorm, W, eps=1e-3)),
    "RMSNorm elementwise_affine": (layer(nn.RMSNorm, W), layer(nn.RMSNorm, W, elementwise_affine=False)),
    "LayerNorm or RMSNorm": (layer(nn.LayerNorm, W, bias=False), layer(nn.RMSNorm, W)),
    "MLP hidden": (mlp, layer(nn.MLP, W, 96)),
    "MLP activation": (mlp, layer(nn.MLP, W, 48, activation="relu")),
    "MLP activation outside of the step": (layer(nn.MLP, W, 48, activation="silu"), layer(nn.MLP, W, 48, activation="relu")),
    "MLP gated": (mlp, layer(nn.MLP, W, 48, gated=True)),
    "MLP bias": (mlp, layer(nn.MLP, W, 48, bias=False)),
    "MLP dropout": (mlp, layer(nn.MLP, W, 48, dropout=0.5)),
    "MLP dropout value": (layer(nn.MLP, W, 48, dropout=0.1), layer(nn.MLP, W, 48, dropout=0.5)),
    "SelfAttention causal": (attention, sequence(causal=False)),
    "SelfAttention kv_heads": (attention, sequence(kv_heads=4)),
    "SelfAttention head_dim": (attention, sequence(head_dim=6)),
    "SelfAttention rotary": (sequence(head_dim=4), sequence(head_dim=4, rotary=1e4)),
    "SelfAttention rotary value": (sequence(head_dim=4, rotary=1e4), sequence(head_dim=4, rotary=5e5)),
    "SelfAttention scale": (attention, sequence(scale=0.1)),
    "SelfAttention bias": (attention, sequence(bias=False)),
    "SelfAttention out_bias": (attention, sequence(out_bias=False)),
    "SelfAttention dropout": (attention, sequence(dropout=0.1)),
    "SelfAttention dropout value": (sequence(dropout=0.2), sequence(dropout=0.1)),
    "cross_entropy label_smoothing": (loss(), loss(label_smoothing=0.1)),
    "cross_entropy ignore_index": (loss(), loss(ignore_index=0)),
    "cross_entropy reduction": (loss(), loss(reduction="sum")),
    "cross_entropy weight": (loss(weight=torch.arange(1.0, W + 1)), loss(weight=torch.arange(2.0, W + 2))),
    "cross_entropy weight or none": (loss(), loss(weight=torch.ones(W))),
    "cross_entropy weight, reduction": (loss(weight=torch.ones(W)), loss(weight=torch.ones(W), reduction="sum")),
    "accuracy top_k": (accuracy(), accuracy(top_k=2)),
    "accuracy ignore_index": (accuracy(), accuracy(ignore_index=5)),
    "Dropout p": (dropout(), dropout(0.25)),
    "Dropout name": (dropout(name="one"), dropout(name="other")),
    "Dropout in eval": (dropout(), dropout(training=False)),
    "Dropout off": (dropout(), dropout(0.0)),
    "Dropout called twice": (dropout(), dropout(times=2)),
    "clip_grad_norm_ max_norm": (clip(), clip(0.5)),
    "clip_grad_norm_ norm_type": (clip(), clip(norm_type=1.0)),
    "clip_grad_norm_ of fewer": (clip_some(2), clip_some(1)),
    "matmul K": (product(8, 24, 24), product(8, 48, 24)),
    "matmul N": (product(8, 24, 24), product(8, 24, 48)),
    "matmul dtype": (product(8, 24, 24), product(8, 24, 24, torch.float64)),
    "gather dtype": (gathers(), gathers(dtype=torch.float64)),
    "gather called twice": (gathers(), gathers(2)),
    "gather skipped": (gathers(2), gathers(1)),
    "order of linears": (several("a", "b"), several("b", "a")),
    "order of norms": (several("n", "m"), several("m", "n")),
    "order of kinds": (several("a", "n"), several("n", "a")),
    "a skipped linear": (several("a", "b"), several("b")),
    "a repeated linear": (several("a"), several("a", "a")),
    "another norm": (several("n"), several("r")),
    "order of backward passes": (backwards(0), backwards(1)),
    "frozen weight": (frozen(""), frozen("weight")),
    "frozen bias": (frozen(""), frozen("bias")),
    "autocast": (autocast(False), autocast(True)),
    "another layer or none": (several("a", "b"), gathers()),
}
TYPICAL = (
    *("Linear bias", "Linear epilogue", "Linear seed", "Embedding padding_idx", "LayerNorm eps", "MLP activation outside of the step"),
    *("SelfAttention causal", "SelfAttention rotary value", "cross_entropy label_smoothing", "cross_entropy weight", "Dropout p"),
    *("Dropout in eval", "clip_grad_norm_ max_norm", "clip_grad_norm_ of fewer", "order of linears", "order of norms"),
    *("a repeated linear", "order of backward passes"),
)
NAMES = ("1d", "2d", "2.5d", "3d")


def outcomes(rank: int, options: dict[str, Any], cases: list[str], odd: int) -> list[tuple[str, str, float]]:
    """For each case the kind of the error, its text and the seconds from the first call to it."""
    found = []
    for case in cases:
        mesh = gingham.init(**options)
        torch.manual_seed(0)
        usual, other = CASES[case]
        # one call that all make alike: processes are at one place when the clock starts
        mesh.gather(x_of(mesh))
        start = time.monotonic()
        try:
            (other if rank == odd else usual)(mesh)
            for _ in range(2):
                mesh.gather(x_of(mesh))
            found.append(("nothing", "", time.monotonic() - start))
        except Exception as error:
            found.append((type(error).__name__, str(error), time.monotonic() - start))
        gingham.destroy()
    return found


def check(ranks: Any, name: str, cases: list[str], odd: int) -> None:
    wrong = {}
    for rank, told in enumerate(ranks(ranks_of(name))(outcomes, GRIDS[name], cases, odd, timeout=250.0)):
        for case, (kind, text, took) in zip(cases, told, strict=True):
            named = f"rank {odd} " in text or f"ranks [{odd}]" in text
            if kind not in ("ShapeError", "MeshError") or not named or took > LIMIT:
                wrong[case, rank] = kind, text, took
    assert not wrong, wrong


def test_a6_the_odd_rank_is_named(ranks) -> None:
    check(ranks, "2d", list(TYPICAL), 2)


@pytest.mark.matrix
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a6_the_odd_rank_is_named_in_every_kind(ranks, name: str, last: bool) -> None:
    check(ranks, name, list(CASES), ranks_of(name) - 1 if last else 1)


def seeds(rank: int, options: dict[str, Any]) -> bool:
    """Dropout after torch.manual_seed(seed + rank): rank 0's masks on all (A5)."""
    mesh = gingham.init(**options)
    full = torch.ones(12, 24)
    torch.manual_seed(7 + rank)
    got = mesh.gather(nn.Dropout(0.5, name="d")(mesh.scatter(full)))
    replicas = nn.Dropout(0.5, name="e", layout="rows")(mesh.scatter(full, "rows"))
    gingham.destroy()
    torch.manual_seed(7)
    expected = nn.Dropout(0.5, name="d")(full)
    first = nn.Dropout(0.5, name="e")(full)
    start, length = mesh.interval(12, mesh.outer.rows)
    return torch.equal(got, expected) and torch.equal(replicas, first[start : start + length])


@pytest.mark.parametrize("name", ["1d", "2.5d"])
def test_a5_one_seed_for_the_masks_of_all_ranks(ranks, name: str) -> None:
    assert all(ranks(ranks_of(name))(seeds, GRIDS[name]))


def test_a4_a_layer_made_under_another_seed_names_its_parameters(ranks) -> None:
    for kind, text, took in [told[0] for told in ranks(4)(outcomes, GRIDS["2d"], ["Linear seed"], 3)]:
        assert kind == "MeshError" and "rank 3 got Linear #0" in text and "made of" in text and "torch.manual_seed" in text, text
        assert took <= LIMIT
