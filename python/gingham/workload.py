"""A model as the planner sees it: which products, norms and tables a training step runs, on how many tokens.

`gpt` describes the GPT of `python -m gingham train`; `describe` reads a description off a torch.nn, Hugging Face or gingham
model (also on the meta device). Example: one block of width 512 is q, k and v as Linears(512, (512, 512, 512)), o as
Linears(512, (512,)), and the pair Linears(512, (2048,)), Linears(2048, (512,)).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

SHARED = ({"q", "k", "v"}, {"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"gate_proj", "up_proj"}, {"w1", "w3"})
FUSED = {"c_attn": 3, "qkv": 3, "qkv_proj": 3, "query_key_value": 3}


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
    """What lies between the projections: keeps q, k and v; moves nothing. Heads must divide by inner's feature ranks."""

    width: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of logits in the inner layout."""

    vocabulary: int


Part = Linears | Table | Norm | Attention | Loss


@dataclass(frozen=True)
class Workload:
    """`parts`: (how often, what). A step trains on [batch, context] tokens in words of `item` bytes, with an optimizer that
    keeps `states` words a parameter (AdamW: 2)."""

    parts: tuple[tuple[int, Part], ...]
    batch: int
    context: int
    item: int = 4
    states: int = 2

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
    """The GPT of gingham.gpt."""
    parts: list[tuple[int, Part]] = [
        (1, Table(vocabulary, width)),
        (1, Table(context, width)),
        (2 * layers + 1, Norm(width)),
        (layers, Linears(width, (width,) * 3, "outer->inner")),
        (layers, Attention(width, heads, heads)),
        (layers, Linears(width, (width,), "inner->outer")),
        (layers, Linears(width, (4 * width,), "outer->inner", kept=1)),
        (layers, Linears(4 * width, (width,), "inner->outer")),
        (1, Linears(width, (vocabulary,), "outer->inner")),
        (1, Loss(vocabulary)),
    ]
    return Workload(tuple(parts), batch, context)


@dataclass(frozen=True)
class _Linear:
    owner: str
    name: str
    k: int
    n: tuple[int, ...]
    bias: bool


def describe(model: torch.nn.Module, batch: int, context: int, states: int = 2) -> Workload:
    """The workload of a model, read off its modules in the order in which it holds them.

    Linears called q, k, v (q_proj.., query..), gate and up share their X; a linear, or such a group, that the next one leads
    back to its width is a pair, outer->inner and inner->outer; the last one is the vocabulary's, if an embedding has as many
    rows. Others are outer->outer. What is no linear, embedding, LayerNorm or RMSNorm is not described: it moves nothing.
    """
    parts: list[tuple[int, Part]] = []
    counts: set[int] = set()
    first = next(model.parameters(), None)
    for module in model.modules():
        kind, weight = type(module).__name__, getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        if kind == "Embedding":
            parts.append((1, Table(weight.shape[0], weight.shape[1])))
            counts.add(weight.shape[0])
        elif kind.endswith(("LayerNorm", "RMSNorm")):
            tensors = 2 if getattr(module, "bias", None) is not None else 1
            parts.append((1, Norm(weight.shape[-1], 1 if kind.endswith("RMSNorm") else 2, tensors)))
    parts += _with_layouts(_groups(list(_linears(model))), counts, _heads(model))
    merged: dict[Part, int] = {}
    for times, part in parts:
        merged[part] = merged.get(part, 0) + times
    item = first.element_size() if first is not None else 4
    return Workload(tuple((times, part) for part, times in merged.items()), batch, context, item, states)


def _linears(model: torch.nn.Module) -> Iterator[_Linear]:
    for path, module in model.named_modules():
        owner, _, name = path.rpartition(".")
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None) is not None
        if isinstance(module, torch.nn.MultiheadAttention):
            yield _Linear(path, "in_proj", module.embed_dim, (module.embed_dim,) * 3, module.in_proj_bias is not None)
        elif isinstance(weight, torch.Tensor) and weight.dim() == 2:
            if isinstance(module, torch.nn.Linear) or hasattr(module, "in_features"):
                into, out = weight.shape[1], weight.shape[0]
            elif type(module).__name__ == "Conv1D":  # GPT-2's, which keeps [in, out]
                into, out = weight.shape
            else:
                continue
            pieces = FUSED.get(name, 1)
            yield _Linear(owner, name, into, (out // pieces,) * pieces if out % pieces == 0 else (out,), bias)


def _groups(linears: list[_Linear]) -> list[_Linear]:
    """Linears that share X made one."""
    found: list[_Linear] = []
    waiting: dict[tuple[str, int], int] = {}
    for linear in linears:
        group = next((index for index, names in enumerate(SHARED) if linear.name in names), None)
        key = (linear.owner, -1 if group is None else group)
        if group is not None and key in waiting:
            other = found[waiting[key]]
            found[waiting[key]] = _Linear(other.owner, other.name, other.k, other.n + linear.n, other.bias or linear.bias)
            continue
        if group is not None:
            waiting[key] = len(found)
        found.append(linear)
    return found


def _with_layouts(linears: list[_Linear], counts: set[int], heads: tuple[int, int]) -> list[tuple[int, Part]]:
    parts: list[tuple[int, Part]] = []
    index = 0
    while index < len(linears):
        linear = linears[index]
        following = linears[index + 1] if index + 1 < len(linears) else None
        if following is not None and following.n == (linear.k,) and following.k in linear.n:
            attention = len(linear.n) == 3
            kept = 0 if attention else 1
            parts.append((1, Linears(linear.k, linear.n, "outer->inner", linear.bias, kept)))
            if attention and heads[0]:
                parts.append((1, Attention(linear.n[0], *heads)))
            parts.append((1, Linears(following.k, following.n, "inner->outer", following.bias)))
            index += 2
            continue
        last = following is None and linear.n[0] in counts
        parts.append((1, Linears(linear.k, linear.n, "outer->inner" if last else "outer->outer", linear.bias)))
        if last:
            parts.append((1, Loss(linear.n[0])))
        index += 1
    return parts


def _heads(model: torch.nn.Module) -> tuple[int, int]:
    """(heads, heads of keys and values); (0, 0) where the model does not say."""
    config: Any = getattr(model, "config", None)
    for source in [config, *model.modules()]:
        for name in ("num_attention_heads", "num_heads", "n_head", "heads", "nhead"):
            count = getattr(source, name, None)
            if isinstance(count, int):
                kept = getattr(source, "num_key_value_heads", None) or getattr(source, "kv_heads", None)
                return count, kept if isinstance(kept, int) else count
    return 0, 0
