"""A model as the planner sees it: which products, norms and tables a training step runs, on how many tokens.

`gpt` describes the GPT of `python -m gingham train`; launch/describe.py reads a description off a model.
Example: one block of width 512 is q, k and v as Linears(512, (512, 512, 512)), o as Linears(512, (512,)), and the pair
Linears(512, (2048,)), Linears(2048, (512,)).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Linears:
    """Linear maps k -> n_i that share X. layout: as gingham.nn.Linear's; kept: words a row and output feature that the
    epilogue keeps for its backward (GELU's input: 1)."""

    k: int
    n: tuple[int, ...]
    layout: str = "outer->outer"
    bias: bool = True
    kept: int = 0


@dataclass(frozen=True)
class Table:
    """An embedding."""

    count: int
    width: int


@dataclass(frozen=True)
class Norm:
    """A LayerNorm (sums=2) or an RMSNorm (sums=1) over outer's features, with `tensors` parameters."""

    features: int
    sums: int = 2
    tensors: int = 2


@dataclass(frozen=True)
class Attention:
    """What lies between the projections: keeps q, k and v; moves nothing but in mode "sequence", where keys and values come by. Heads must
    divide by inner's feature ranks."""

    width: int
    heads: int
    kv_heads: int
    causal: bool = False


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of logits in the inner layout."""

    vocabulary: int


Part = Linears | Table | Norm | Attention | Loss


@dataclass(frozen=True)
class Workload:
    """`parts`: (how often, what). A step trains on [batch, context] tokens in words of `item` bytes, with an optimizer that
    keeps `states` words a parameter (AdamW: 2). row: the same parts in the order in which gingham.pipeline may cut them into stages,
    () where the model is not known to be layers in a row. sequences: whether its code may see a part of each sequence (mode "sequence");
    samples: whether it must see whole samples alone (no 1d with sequence=True). ties: tables that several parts of the row have, an
    embedding that is also the head: (the table, the places in the row)."""

    parts: tuple[tuple[int, Part], ...]
    batch: int
    context: int
    item: int = 4
    states: int = 2
    row: tuple[tuple[tuple[int, Part], ...], ...] = ()
    sequences: bool = False
    samples: bool = False
    ties: tuple[tuple[Table, tuple[int, ...]], ...] = ()

    def parameters(self) -> int:
        """Words of the whole model."""
        return sum(times * _parameters(part) for times, part in self.parts)


def _parameters(part: Part) -> int:
    if isinstance(part, Linears):
        return sum(part.n) * (part.k + part.bias)
    if isinstance(part, Table):
        return part.count * part.width
    return part.features * part.tensors if isinstance(part, Norm) else 0


def gpt(layers: int, width: int, heads: int, batch: int, context: int, vocabulary: int = 256) -> Workload:
    """The GPT of commands/gpt.py."""
    block: tuple[tuple[int, Part], ...] = (
        (2, Norm(width)),
        (1, Linears(width, (width,) * 3, "outer->inner")),
        (1, Attention(width, heads, heads, True)),
        (1, Linears(width, (width,), "inner->outer")),
        (1, Linears(width, (4 * width,), "outer->inner", kept=1)),
        (1, Linears(4 * width, (width,), "inner->outer")),
    )
    first: tuple[tuple[int, Part], ...] = ((1, Table(vocabulary, width)), (1, Table(context, width)))
    last: tuple[tuple[int, Part], ...] = ((1, Linears(width, (vocabulary,), "outer->inner")), (1, Loss(vocabulary)))
    row = (first, *(block for _ in range(layers)), ((1, Norm(width)),), last)
    return Workload(merged(row), batch, context, row=row, sequences=True)


def merged(row: Iterable[Iterable[tuple[int, Part]]]) -> tuple[tuple[int, Part], ...]:
    """Equal parts counted together, in the order in which they come first."""
    found: dict[Part, int] = {}
    for parts in row:
        for times, part in parts:
            found[part] = found.get(part, 0) + times
    return tuple((times, part) for part, times in found.items())
