"""The workload of a torch.nn, Hugging Face or gingham model (also on the meta device), for the planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..plan.workload import Attention, Linears, Loss, Norm, Part, Table, Workload

SHARED = ({"q", "k", "v"}, {"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"gate_proj", "up_proj"}, {"w1", "w3"})
FUSED = {"c_attn": 3, "qkv": 3, "qkv_proj": 3, "query_key_value": 3}


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
