"""Every layer on every grid in fp32 and bf16: forward and all gradients against float64, beside serial torch's own error.

Bounds (Frobenius, relative): bf16 1.5 times the error of the serial layer in bf16; fp32 1e-6 for Linear, otherwise 2e-6 or
3 times the serial layer's error in fp32, whichever is larger. A key's bias, whose true gradient is 0, is measured against
the query's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import gingham
import serial
from gingham import nn
from gingham.mesh import current
from grids import GRIDS, ranks_of, relative, whole

# batch, time, width, heads, kv heads, hidden, vocabulary
EVEN, UNEVEN = (12, 8, 96, 24, 12, 144, 96), (13, 5, 84, 12, 12, 101, 71)
Size = tuple[int, int, int, int, int, int, int]
Errors = dict[tuple[str, str], tuple[float, float]]
ALL = ["1d", "1d sequence", "2d", "2.5d", "3d", "3x2x2"]


@dataclass
class Case:
    """One layer: constructors of (size, dtype), the full input, its operand and the output's, the dim of the rows."""

    ours: Callable[[Size, torch.dtype], torch.nn.Module]
    serial: Callable[[Size, torch.dtype], torch.nn.Module]
    operands: tuple[str, str] = ("x", "x")
    dim: int = 0
    x: Callable[[Size], torch.Tensor] = lambda s: torch.randn(s[:3])
    bound: float = 2e-6


class Tied(torch.nn.Module):
    def __init__(self, count: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width, dtype=dtype)
        self.head = nn.Classifier(width, count, tied=self.embedding)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


class Skipped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, bias = super().forward(x)
        return y + bias


class Loss(torch.nn.Module):
    def __init__(self, target: torch.Tensor, smoothing: float, layout: str) -> None:
        super().__init__()
        self.smoothing, self.layout = smoothing, layout
        self.target_here = current().scatter(target)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gingham.cross_entropy(x, self.target_here, layout=self.layout, label_smoothing=self.smoothing)


def target_of(size: Size) -> torch.Tensor:
    target = torch.randint(size[6], size[:2], generator=torch.Generator().manual_seed(5))
    target[0, 0] = target[-1, -1] = -100
    return target


def linear(name: str, operands: tuple[str, str] = ("x", "x"), **flags: Any) -> tuple[str, Case]:
    return name, Case(
        lambda s, dtype: nn.Linear(s[2], s[5], dtype=dtype, **flags),
        lambda s, dtype: torch.nn.Linear(s[2], s[5], dtype=dtype),
        operands,
        bound=1e-6,
    )


def mlp(activation: str, gated: bool = False, swapped: Any = None) -> tuple[str, Case]:
    return f"MLP {activation}{' gated' * gated}{' swapped' * bool(swapped)}", Case(
        lambda s, dtype: nn.MLP(s[2], s[5], dtype=dtype, activation=activation, gated=gated, swapped=swapped),
        lambda s, dtype: serial.MLP(s[2], s[5], activation, gated, dtype),
    )


def attention(name: str, grouped: bool = False, causal: bool = True, theta: float | None = None, dim: int = 0) -> tuple[str, Case]:
    def heads(s: Size) -> tuple[int, int, int | None]:
        return s[3], s[4] if grouped else s[3], 10 if grouped else None

    def ours(s: Size, dtype: torch.dtype) -> torch.nn.Module:
        count, kv, head = heads(s)
        return nn.SelfAttention(s[2], count, causal, dtype=dtype, dim=dim, kv_heads=kv, head_dim=head, rotary=theta)

    def reference(s: Size, dtype: torch.dtype) -> torch.nn.Module:
        return serial.Attention(s[2], *heads(s), causal, theta, dtype)

    shape = (lambda s: torch.randn(2, *s[:3:2])) if dim else (lambda s: torch.randn(s[:3]))
    return f"SelfAttention {name}", Case(ours, reference, dim=dim, x=shape)


def loss(layout: str, smoothing: float) -> tuple[str, Case]:
    return f"cross_entropy {layout} {smoothing}", Case(
        lambda s, _: Loss(target_of(s), smoothing, layout),
        lambda s, _: serial.Loss(target_of(s), smoothing),
        ("inner" if layout == "inner" else "x", ""),
        x=lambda s: 3 * torch.randn(*s[:2], s[6]),
    )


def ids(size: Size) -> torch.Tensor:
    return torch.randint(size[6], size[:2])


CASES: dict[str, Case] = dict(
    [
        linear("Linear"),
        linear("Linear outer->inner", ("x", "inner"), layout="outer->inner"),
        linear("Linear inner->outer", ("inner", "x"), layout="inner->outer"),
        ("Linear skip_bias_add", Case(
            lambda s, dtype: Skipped(s[2], s[5], dtype=dtype, skip_bias_add=True),
            lambda s, dtype: torch.nn.Linear(s[2], s[5], dtype=dtype), bound=1e-6,
        )),
        ("Linear transposed", Case(
            lambda s, dtype: nn.Linear(s[2], s[5], dtype=dtype, transposed=True),
            lambda s, dtype: serial.Transposed(s[2], s[5], dtype), bound=1e-6,
        )),
        ("Classifier", Case(
            lambda s, dtype: nn.Classifier(s[2], s[6], True, dtype=dtype),
            lambda s, dtype: torch.nn.Linear(s[2], s[6], dtype=dtype), ("x", "inner"), bound=1e-6,
        )),
        ("Classifier tied", Case(
            lambda s, dtype: Tied(s[6], s[2], dtype), lambda s, dtype: serial.Tied(s[6], s[2], dtype), ("rows", "inner"), x=ids,
        )),
        ("Embedding", Case(
            lambda s, dtype: nn.Embedding(s[6], s[2], dtype=dtype, padding_idx=-3),
            lambda s, dtype: torch.nn.Embedding(s[6], s[2], padding_idx=-3, dtype=dtype), ("rows", "x"), x=ids,
        )),
        ("PatchEmbedding", Case(
            lambda s, dtype: nn.PatchEmbedding((8, 16), 4, 3, s[2], dtype=dtype),
            lambda s, dtype: serial.Patches(4, 3, s[2], dtype), ("rows", "x"), x=lambda s: torch.randn(s[0], 3, 8, 16),
        )),
        ("LayerNorm", Case(lambda s, dtype: nn.LayerNorm(s[2], dtype=dtype), lambda s, dtype: torch.nn.LayerNorm(s[2], dtype=dtype))),
        ("LayerNorm inner", Case(
            lambda s, dtype: nn.LayerNorm(s[2], layout="inner", dtype=dtype),
            lambda s, dtype: torch.nn.LayerNorm(s[2], dtype=dtype), ("inner", "inner"),
        )),
        ("RMSNorm", Case(lambda s, dtype: nn.RMSNorm(s[2], dtype=dtype), lambda s, dtype: torch.nn.RMSNorm(s[2], dtype=dtype))),
        mlp("gelu"),
        mlp("gelu", swapped="auto"),
        mlp("gelu_tanh"),
        mlp("relu"),
        mlp("silu"),
        mlp("silu", gated=True),
        attention("causal"),
        attention("whole", causal=False),
        attention("grouped rotary", grouped=True, theta=10000.0),
        attention("dim=1", dim=1),
        attention("dim=1 grouped rotary", grouped=True, theta=500.0, dim=1),
        loss("outer", 0.0),
        loss("inner", 0.1),
    ]
)  # fmt: skip


def errors_of(module: torch.nn.Module, y: torch.Tensor, x: torch.Tensor, exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of the output, the input's gradient and every parameter's."""
    found = {"y": y.detach(), **{name: whole(each.grad) for name, each in module.named_parameters()}}
    if x.is_floating_point():
        found["dx"] = x.grad
    errors = {}
    for name, got in found.items():
        scale = exact[name.replace("k.bias", "q.bias")]
        got = got.double()
        assert got.shape == exact[name].shape
        errors[name] = float((got - exact[name]).norm() / scale.norm())
    return errors


def measured(mesh: Any, case: Case, size: Size, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Per tensor: our error and that of the serial layer in the same dtype."""
    torch.manual_seed(3)
    ours = case.ours(size, dtype)
    torch.manual_seed(3)
    plain = case.serial(size, dtype)
    for (name, weight), (other, expected) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and torch.equal(whole(weight.data), expected.data), f"initial {name}"
    torch.manual_seed(3)
    exact = case.serial(size, dtype).double()
    torch.manual_seed(9)
    full = case.x(size)
    full = full.to(dtype) if full.is_floating_point() else full
    shape = exact(full.double() if full.is_floating_point() else full).shape
    cotangent = torch.randn(shape).to(dtype)
    results = []
    for module in (exact, plain, ours):
        wide = torch.float64 if module is exact else dtype
        x = full.to(wide).clone().requires_grad_() if full.is_floating_point() else full
        if module is ours:
            y = ours(mesh.scatter(x, case.operands[0], case.dim))
            y = mesh.gather(y, case.operands[1], case.dim) if case.operands[1] else y
        else:
            y = module(x)
        y.backward(cotangent.to(wide))
        results.append((y.detach(), x))
    (y, x), truth = results[0], {name: each.grad for name, each in exact.named_parameters()}
    truth |= {"y": y, "dx": x.grad}
    theirs, mine = errors_of(plain, *results[1], truth), errors_of(ours, *results[2], truth)
    return {name: (error, theirs[name]) for name, error in mine.items()}


def every_layer(rank: int, options: dict[str, Any], dtype: torch.dtype, sizes: tuple[Size, ...]) -> Errors:
    mesh = gingham.init(**options)
    return {
        (case, f"{name} {size[:3]}"): errors
        for case in CASES
        for size in sizes
        for name, errors in measured(mesh, CASES[case], size, dtype).items()
    }


def allowed(case: str, dtype: torch.dtype, serial_error: float) -> float:
    if dtype == torch.bfloat16:
        return 1.5 * serial_error
    return CASES[case].bound if CASES[case].bound == 1e-6 else max(CASES[case].bound, 3 * serial_error)


def check(answers: list[Errors], dtype: torch.dtype) -> None:
    assert all(answer == answers[0] for answer in answers)
    wrong = {key: pair for key, pair in answers[0].items() if not pair[0] <= allowed(key[0], dtype, pair[1])}
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.matrix
def test_every_layer_on_every_grid(ranks, name: str, dtype: str) -> None:
    kind = getattr(torch, dtype)
    check(ranks(ranks_of(name))(every_layer, GRIDS[name], kind, (EVEN, UNEVEN)), kind)


@pytest.mark.parametrize(("name", "dtype"), [("2.5d", "bfloat16"), ("1d sequence", "float32")])
def test_every_layer(ranks, name: str, dtype: str) -> None:
    """The quick part of the matrix."""
    kind = getattr(torch, dtype)
    check(ranks(ranks_of(name))(every_layer, GRIDS[name], kind, (UNEVEN,)), kind)


def offset(rank: int, options: dict[str, Any]) -> dict[str, float]:
    """LayerNorm far from zero."""
    mesh, errors = gingham.init(**options), {}
    for batch, width in ((16, 64), (13, 37)):
        torch.manual_seed(0)
        theirs = torch.nn.LayerNorm(width).double()
        for layout, operand in (("outer", "x"), ("inner", "inner")):
            ours = nn.LayerNorm(width, layout=layout)
            full = torch.randn(batch, width) + 1000
            a, b, cotangent = full.clone().requires_grad_(), full.double().requires_grad_(), torch.randn(batch, width)
            got, expected = mesh.gather(ours(mesh.scatter(a, operand)), operand), theirs(b)
            theirs.zero_grad()
            got.backward(cotangent), expected.backward(cotangent.double())
            pairs = [
                (got, expected),
                (a.grad, b.grad),
                (whole(ours.weight.grad), theirs.weight.grad),
                (whole(ours.bias.grad), theirs.bias.grad),
            ]
            errors[f"{batch} {width} {layout}"] = max(relative(*pair) for pair in pairs)
    return errors


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "3x2x2" else [pytest.mark.matrix]) for name in ALL])
def test_layer_norm_a_thousand_away_from_zero(ranks, name: str) -> None:
    for errors in ranks(ranks_of(name))(offset, GRIDS[name]):
        assert max(errors.values()) <= 1e-5, errors
