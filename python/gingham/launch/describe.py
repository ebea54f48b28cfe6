"""The workload of a torch.nn, Hugging Face or gingham model (also on the meta device), for the planner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..plan.workload import Attention, Linears, Loss, Norm, Part, Table, Workload, merged

SHARED = ({"q", "k", "v"}, {"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"gate_proj", "up_proj"}, {"w1", "w3"})
FUSED = {"c_attn": 3, "qkv": 3, "qkv_proj": 3, "query_key_value": 3}
# Hugging Face models that gingham.pipeline knows as layers in a row, by the paths of their modules: a list of modules is a part each
ROWS = {
    "GPT2LMHeadModel": (("transformer.wte", "transformer.wpe"), "transformer.h", ("transformer.ln_f",), ("lm_head",)),
    "LlamaForCausalLM": (("model.embed_tokens",), "model.layers", ("model.norm",), ("lm_head",)),
    "BertForMaskedLM": (("bert.embeddings",), "bert.encoder.layer", ("cls",)),
    "BertForTokenClassification": (("bert.embeddings",), "bert.encoder.layer", ("dropout",), ("classifier",)),
    "BertForSequenceClassification": (("bert.embeddings",), "bert.encoder.layer", ("bert.pooler",), ("dropout",), ("classifier",)),
    "ViTForImageClassification": (("vit.embeddings",), "vit.layers", ("vit.layernorm",), ("classifier",)),
}
# those that gingham.parallelize takes in mode "sequence"; others are refused there (convert/sequence.py)
SEQUENCES = (
    *("GPT2Model", "GPT2LMHeadModel", "LlamaModel", "LlamaForCausalLM", "ViTModel", "ViTForImageClassification"),
    *("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"),
    *("BertForTokenClassification", "BertForQuestionAnswering"),
)


@dataclass(frozen=True)
class _Linear:
    owner: str
    name: str
    k: int
    n: tuple[int, ...]
    bias: bool
    at: int = -1  # of the row of layers
    causal: bool = False


Found = tuple[int, int, Part]  # place in the row of layers, times, part


def describe(model: torch.nn.Module, batch: int, context: int, states: int = 2) -> Workload:
    """The workload of a model, read off its modules in the order in which it holds them.

    Linears called q, k, v (q_proj.., query..), gate and up share their X; a linear, or such a group, that the next one leads
    back to its width is a pair, outer->inner and inner->outer; the last one is the vocabulary's, if an embedding has as many
    rows. Others are outer->outer. What is no linear, embedding, LayerNorm or RMSNorm is not described: it moves nothing.
    """
    found: list[Found] = []
    counts: set[int] = set()
    first = next(model.parameters(), None)
    row = _row(model)
    places = {id(module): at for at, modules in reversed(list(enumerate(row))) for outer in modules for module in outer.modules()}
    for module in model.modules():
        kind, weight, at = type(module).__name__, getattr(module, "weight", None), places.get(id(module), -1)
        if not isinstance(weight, torch.Tensor):
            continue
        if kind == "Embedding":
            found.append((at, 1, Table(weight.shape[0], weight.shape[1])))
            counts.add(weight.shape[0])
        elif kind.endswith(("LayerNorm", "RMSNorm")):
            tensors = 2 if getattr(module, "bias", None) is not None else 1
            found.append((at, 1, Norm(weight.shape[-1], 1 if kind.endswith("RMSNorm") else 2, tensors)))
    found += _with_layouts(_groups(list(_linears(model, places))), counts, _heads(model))
    item = first.element_size() if first is not None else 4
    known = bool(row) and all(at >= 0 for at, *_ in found)
    ordered = tuple(merged([[(times, part) for place, times, part in found if place == at]]) for at in range(len(row))) if known else ()
    return Workload(
        merged([[(times, part) for _, times, part in found]]),
        batch,
        context,
        item,
        states,
        ordered,
        cuts_sequences(model),
        hasattr(model, "base_model_prefix"),
        _ties(row) if known else (),
    )


def _ties(row: list[list[torch.nn.Module]]) -> tuple[tuple[Table, tuple[int, ...]], ...]:
    users: dict[int, tuple[torch.Tensor, list[int]]] = {}
    for at, modules in enumerate(row):
        for parameter in {id(each): each for module in modules for each in module.parameters()}.values():
            users.setdefault(id(parameter), (parameter, []))[1].append(at)
    shared = [(parameter, places) for parameter, places in users.values() if len(places) > 1 and parameter.dim() == 2]
    return tuple((Table(parameter.shape[0], parameter.shape[1]), tuple(places)) for parameter, places in shared)


def cuts_sequences(model: Any) -> bool:
    """Whether a model may see a part of each sequence on each rank: Hugging Face's that parallelize takes in mode "sequence", and one of
    gingham's layers that says so by an attribute `cuts_sequences`, since its code asks for its positions (gingham.nn's attention does)."""
    if getattr(model, "cuts_sequences", False) is True:
        return True
    config = getattr(model, "config", None)
    name = next((kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")), "")
    decodes = getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False)
    return name in SEQUENCES and not decodes


def _row(model: Any) -> list[list[torch.nn.Module]]:
    """The modules of each part of a model of layers in a row (pipeline/cut.py says which those are); [] where it is not known as one."""
    if callable(getattr(model, "in_a_row", None)):
        return [list(modules) for _, modules in model.in_a_row()]
    if isinstance(model, torch.nn.Sequential):
        return [[child] for child in model]
    found: list[list[torch.nn.Module]] = []
    for paths in ROWS.get(next((name for name in ROWS if name in {kind.__name__ for kind in type(model).__mro__}), ""), ()):
        found += [[layer] for layer in model.get_submodule(paths)] if isinstance(paths, str) else [[*map(model.get_submodule, paths)]]
    return found


def _linears(model: torch.nn.Module, places: Mapping[int, int]) -> Iterator[_Linear]:
    for path, module in model.named_modules():
        owner, _, name = path.rpartition(".")
        weight, bias, at = getattr(module, "weight", None), getattr(module, "bias", None) is not None, places.get(id(module), -1)
        if isinstance(module, torch.nn.MultiheadAttention):
            yield _Linear(path, "in_proj", module.embed_dim, (module.embed_dim,) * 3, module.in_proj_bias is not None, at)
        elif isinstance(weight, torch.Tensor) and weight.dim() == 2:
            if isinstance(module, torch.nn.Linear) or hasattr(module, "in_features"):
                into, out = weight.shape[1], weight.shape[0]
            elif type(module).__name__ == "Conv1D":  # GPT-2's, which keeps [in, out]
                into, out = weight.shape
            else:
                continue
            pieces, holder = FUSED.get(name, 1), model.get_submodule(owner)
            causal = getattr(holder, "causal", getattr(holder, "is_causal", False)) is True
            yield _Linear(owner, name, into, (out // pieces,) * pieces if out % pieces == 0 else (out,), bias, at, causal)


def _groups(linears: list[_Linear]) -> list[_Linear]:
    """Linears that share X made one."""
    found: list[_Linear] = []
    waiting: dict[tuple[str, int], int] = {}
    for linear in linears:
        group = next((index for index, names in enumerate(SHARED) if linear.name in names), None)
        key = (linear.owner, -1 if group is None else group)
        if group is not None and key in waiting:
            other = found[waiting[key]]
            found[waiting[key]] = replace(other, n=other.n + linear.n, bias=other.bias or linear.bias)
            continue
        if group is not None:
            waiting[key] = len(found)
        found.append(linear)
    return found


def _with_layouts(linears: list[_Linear], counts: set[int], heads: tuple[int, int]) -> list[Found]:
    parts: list[Found] = []
    index = 0
    while index < len(linears):
        linear = linears[index]
        following = linears[index + 1] if index + 1 < len(linears) else None
        if following is not None and following.n == (linear.k,) and following.k in linear.n:
            attention = len(linear.n) == 3
            kept = 0 if attention else 1
            parts.append((linear.at, 1, Linears(linear.k, linear.n, "outer->inner", linear.bias, kept)))
            if attention and heads[0]:
                parts.append((linear.at, 1, Attention(linear.n[0], *heads, linear.causal)))
            parts.append((following.at, 1, Linears(following.k, following.n, "inner->outer", following.bias)))
            index += 2
            continue
        last = following is None and linear.n[0] in counts
        parts.append((linear.at, 1, Linears(linear.k, linear.n, "outer->inner" if last else "outer->outer", linear.bias)))
        if last:
            parts.append((linear.at, 1, Loss(linear.n[0])))
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
