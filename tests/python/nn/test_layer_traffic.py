"""Bytes and messages of every layer but Linear equal theory.py on every grid, and torch.distributed moves nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

import gingham
import theory
import theory_layers
from gingham import nn
from grids import GRIDS, every_grid, ranks_of
from theory import Cost, Grid

# batch, time, width, heads, hidden, vocabulary
EVEN, UNEVEN = (12, 4, 24, 12, 48, 36), (7, 5, 36, 12, 53, 29)
Size = tuple[int, int, int, int, int, int]
Run = Callable[[gingham.Mesh, Size, Any], Callable[[], torch.Tensor]]


def block(mesh: gingham.Mesh, *shape: int, operand: str = "x") -> torch.Tensor:
    return mesh.scatter(torch.ones(*shape), operand).requires_grad_()


class Said:
    """A call of a model whose layers say what [rows, inner, ..] makes them receive."""

    def __init__(self, model: torch.nn.Module, x: torch.Tensor, rows: int, inner: int) -> None:
        self.model, self.x, self.rows, self.inner = model, x, rows, inner

    def __call__(self) -> torch.Tensor:
        y: Any = self.model(self.x)
        return torch.add(*y) if isinstance(y, tuple) else y  # a linear and its bias

    def received(self) -> int:
        parts: list[Any] = [self.model] if hasattr(self.model, "received") else list(self.model.children())
        return sum(part.received(self.rows, self.inner) for part in parts)


def through(make: Callable[[Size, Any], torch.nn.Module]) -> Run:
    """Forward and backward of a layer [batch, time, width] -> the same."""

    def prepare(mesh: gingham.Mesh, size: Size, swapped: Any) -> Callable[[], torch.Tensor]:
        return Said(make(size, swapped), block(mesh, *size[:3]), *size[:2])

    return prepare


def embed(mesh: gingham.Mesh, size: Size, swapped: Any) -> Callable[[], torch.Tensor]:
    return Said(nn.Embedding(size[5], size[2]), mesh.scatter(torch.zeros(size[:2], dtype=torch.int64)), *size[:2])


def lose(layout: str) -> Run:
    def prepare(mesh: gingham.Mesh, size: Size, swapped: Any) -> Callable[[], torch.Tensor]:
        logits = block(mesh, *size[:2], size[5], operand="inner" if layout == "inner" else "x")
        target = torch.zeros(size[:2], dtype=torch.int64)
        target = target if not mesh.layout(layout).rows else mesh.scatter(target)
        return lambda: gingham.cross_entropy(logits, target, layout=layout)

    return prepare


def clip(mesh: gingham.Mesh, size: Size, swapped: Any) -> Callable[[], torch.Tensor]:
    layer = nn.LayerNorm(size[2])
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    return lambda: gingham.clip_grad_norm_(layer.parameters(), 1.0).requires_grad_()


class Tied(torch.nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        self.head = nn.Classifier(width, count, tied=self.embedding)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


def tie(mesh: gingham.Mesh, size: Size, swapped: Any) -> Callable[[], torch.Tensor]:
    return Said(Tied(size[5], size[2]), mesh.scatter(torch.zeros(size[:2], dtype=torch.int64)), *size[:2])


def patch(mesh: gingham.Mesh, size: Size, swapped: Any) -> Callable[[], torch.Tensor]:
    return Said(nn.PatchEmbedding(None, 2, 5, size[2]), mesh.scatter(torch.ones(size[0], 5, 4, 6), "rows"), size[0], 6)


def along_the_sequence(mesh: gingham.Mesh, size: Size, swapped: Any) -> Callable[[], torch.Tensor]:
    layer = nn.SelfAttention(size[2], 2 * size[3] if size == EVEN else size[3], kv_heads=size[3], dim=1)
    x = mesh.scatter(torch.ones(size[:3]), "x", 1).requires_grad_()
    return lambda: layer(x)


def beside_its_bias(mesh: gingham.Mesh, size: Size, swapped: Any) -> Callable[[], torch.Tensor]:
    layer, x = nn.Linear(size[2], size[4], skip_bias_add=True, layout="inner->outer"), block(mesh, *size[:3], operand="inner")
    return Said(layer, x, *size[:2])


def score(mesh: gingham.Mesh, size: Size, swapped: Any) -> Callable[[], torch.Tensor]:
    logits, target = block(mesh, *size[:2], size[5]), mesh.scatter(torch.zeros(size[:2], dtype=torch.int64))
    return lambda: gingham.nn.accuracy(logits, target).requires_grad_()


def sequence_cost(grid: Grid, s: Size, _: Any, slices: int) -> Cost:
    heads = 2 * s[3] if s == EVEN else s[3]
    return theory_layers.sequence_attention(grid, s[0] * s[1], s[2], heads, s[3], slices).bytes(4)


def skipped_cost(grid: Grid, s: Size, _: Any, slices: int) -> Cost:
    cost = theory.linear(grid, s[0] * s[1], s[2], s[4], layout="inner->outer", bias=False, slices=slices)
    return (cost + theory_layers.skipped_bias(grid, s[4])).bytes(4)


Formula = Callable[[Grid, Size, Any, int], Cost]
# case -> how it runs, what it costs in bytes
CASES: dict[str, tuple[Run, Formula]] = {
    "LayerNorm": (through(lambda size, _: nn.LayerNorm(size[2])), lambda grid, s, _, __: theory.layer_norm(grid, s[0] * s[1], s[2])),
    "Embedding": (embed, lambda grid, s, _, __: theory.embedding(grid, s[5], s[2]).bytes(4)),
    "SelfAttention": (
        through(lambda size, swapped: nn.SelfAttention(size[2], size[3], swapped=swapped)),
        lambda grid, s, swapped, slices: theory.attention(grid, s[0] * s[1], s[2], swapped, slices).bytes(4),
    ),
    "MLP": (
        through(lambda size, swapped: nn.MLP(size[2], size[4], dropout=0.1, swapped=swapped)),
        lambda grid, s, swapped, slices: theory.mlp(grid, s[0] * s[1], s[2], s[4], swapped, slices).bytes(4),
    ),
    "MLP gated": (
        through(lambda size, swapped: nn.MLP(size[2], size[4], gated=True, activation="silu", swapped=swapped)),
        lambda grid, s, swapped, slices: theory.mlp(grid, s[0] * s[1], s[2], s[4], swapped, slices, True).bytes(4),
    ),
    "RMSNorm": (through(lambda size, _: nn.RMSNorm(size[2])), lambda grid, s, _, __: theory_layers.rms_norm(grid, s[0] * s[1], s[2])),
    "SelfAttention dim=1": (along_the_sequence, sequence_cost),
    "skip_bias_add": (beside_its_bias, skipped_cost),
    "PatchEmbedding": (patch, lambda grid, s, _, slices: theory_layers.patches(grid, s[0], 6, 20, s[2], slices).bytes(4)),
    "tied": (tie, lambda grid, s, _, slices: theory_layers.tied(grid, s[0] * s[1], s[5], s[2], slices).bytes(4)),
    "accuracy": (score, lambda grid, s, _, __: theory_layers.accuracy(grid, s[0] * s[1])),
    "Dropout": (through(lambda size, _: nn.Dropout(0.3)), lambda *_: Cost()),
    "cross_entropy": (lose("outer"), lambda grid, s, _, __: theory.cross_entropy(grid, s[0] * s[1])),
    "cross_entropy inner": (lose("inner"), lambda grid, s, _, __: theory.cross_entropy(grid, s[0] * s[1], "inner")),
    "clip_grad_norm_": (clip, lambda *_: Cost()),
}
CALLS = [(case, size, swapped) for case in CASES for size in (EVEN, UNEVEN) for swapped in (None, "auto")]


def counted(rank: int, options: dict[str, Any], source: str, slices: int) -> tuple[list[Any], int]:
    """Traffic of every call, forward and backward; how many collectives of torch.distributed were seen in all of them."""
    mesh, found, seen = gingham.init(**options, source=source, slices=slices), [], 0
    for case, size, swapped in CALLS:
        call = CASES[case][0](mesh, size, swapped)
        mesh.traffic(reset=True)
        with CommDebugMode() as watched:
            call().sum().backward()
        seen += watched.get_total_counts()
        found.append((mesh.traffic(reset=True), call.received() if isinstance(call, Said) else None))
    return found, seen


@pytest.mark.parametrize(("source", "slices"), [("window", 1), pytest.param("ring", 3, marks=pytest.mark.matrix)])
@every_grid
def test_layers_count_as_the_formulas(ranks, name: str, source: str, slices: int) -> None:
    answers = ranks(ranks_of(name))(counted, GRIDS[name], source, slices)
    grid = Grid.of(**GRIDS[name]) if GRIDS[name] else Grid.of(grid=(1, 1, 1))
    for index, (case, size, swapped) in enumerate(CALLS):
        cost, counts = CASES[case][1](grid, size, swapped or False, slices), [answer[0][index][0] for answer in answers]
        said = answers[0][0][index][1]
        assert said in (None, sum(axis["bytes_received"] for count in counts for axis in count.values())), (case, size, swapped)
        for axis in counts[0]:
            received = sum(count[axis]["bytes_received"] for count in counts)
            assert received == cost.words[axis], (case, size, swapped, axis, received, cost)
            assert received == sum(count[axis]["bytes_sent"] for count in counts), (case, size, swapped, axis)
            messages = [count[axis]["messages"] for count in counts]
            if cost.unlike[axis]:
                assert sum(messages) == len(counts) * cost.messages[axis] + cost.unlike[axis], (case, size, swapped, axis, counts, cost)
            else:
                assert set(messages) == {cost.messages[axis]}, (case, size, swapped, axis, counts, cost)
        assert {axis for axis, words in cost.words.items() if words} <= set(counts[0]), (case, cost)
    assert [seen for _, seen in answers] == [0] * ranks_of(name)
