"""The layers as a table: each with its serial twin, its input and where its output lies."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import gingham
import serial
from gingham import nn
from gingham.mesh import current

# batch, time, width, heads, kv heads, hidden, vocabulary
EVEN, UNEVEN = (12, 8, 96, 24, 12, 144, 96), (13, 5, 84, 12, 12, 101, 71)
Size = tuple[int, int, int, int, int, int, int]
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
