"""Converted models in mode "sequence": a rank has a piece of every sequence, and attention's keys and values come by on a ring.

GPT-2 and Llama, whose layers but attention see one token at a time: the border cuts ids, labels (shifted first) and positions along the
sequence, and leaves masks of keys whole. All other models are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..autograd.ring import CutSequence, Way
from ..errors import ShapeError
from ..mesh import Mesh
from ..mesh.layout import chunks
from ..nn.sequence import asked_way, attend_sequence, lengths_of, way_of

NAME = "gingham_ring"  # under which transformers finds the attention function and the mask
FAMILIES = ("gpt2", "llama")
KEYS = "attention_mask"


def check_model(model: Any, mesh: Mesh, family: str | None, loss: str | None, base: Any) -> None:
    """Raises NotImplementedError for a model that has no form here."""
    if not mesh.outer.time:
        return
    if family not in FAMILIES or base is not None and loss != "causal":
        raise NotImplementedError(
            f"{type(model).__name__} on {mesh}: mode 'sequence' converts GPT-2 and Llama, as bases and for causal language modelling;"
            " choose a mode that keeps samples whole, or build the model of gingham.nn's layers"
        )


def is_prepared(mesh: Mesh, name: str) -> bool:
    """Whether an argument is as the model takes it."""
    return bool(mesh.outer.time) and name in (KEYS, "position_ids")


def prepared(mesh: Mesh, what: str, given: dict[str, Any], names: Sequence[str], own: bool = False) -> dict[str, Any]:
    """Arguments by name, with the mask of keys as attention here takes it, and positions where none are given. own: they are those of
    this data rank.

    Raises ShapeError for a sequence of fewer places than ranks, NotImplementedError for a cache.
    """
    stream = next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
    time, pieces = stream.shape[1], mesh.parts(mesh.outer.time)
    if min(chunks(time, [pieces])) == 0:
        raise ShapeError(
            f"{what}: rank {mesh.rank} got a sequence of {time} places on {pieces} ranks that cut it, so that some would have none;"
            " generation and short sequences need another mode"
        )
    found = dict(given)
    cache = next((found[name] for name in ("cache", "past_key_values") if found.get(name) is not None), None)
    if cache is not None and cache.get_seq_length():
        raise NotImplementedError(f"{what}: rank {mesh.rank} got a cache, which mode 'sequence' does not fill; choose another mode")
    mask = found.get(KEYS)
    if mask is not None:
        if mask.dim() == 2 and mask.shape[1] == time:
            found[KEYS] = mask.bool()[:, None, None, :]
        elif mask.dim() == 4 and mask.shape[2] == time:
            mine = mesh.scatter(mask.to(torch.uint8) if mask.dtype == torch.bool else mask, "rows", 2, own)
            found[KEYS] = mine.to(mask.dtype)
        else:
            raise ShapeError(
                f"{what}: rank {mesh.rank} got {KEYS} {tuple(mask.shape)}, expected [batch, {time}] or [batch, 1, {time}, {time}]"
            )
    if "position_ids" in names and found.get("position_ids") is None:
        first, count = mesh.interval(time, mesh.outer.time)
        found["position_ids"] = torch.arange(first, first + count, device=stream.device).unsqueeze(0)
    elif found.get("position_ids") is not None:
        found["position_ids"] = mesh.scatter(found["position_ids"], "rows", own=own)
    return found


def attention_function(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls its attention interface, on this rank's piece: [batch, heads, time, width] of q, k and v."""
    asked = [name for name in ("output_attentions", "s_aux", "position_bias", "softcap") if rest.get(name)]
    if asked or key.shape[2] != query.shape[2]:
        raise NotImplementedError(
            f"{type(module).__name__}: {', '.join(asked) or 'keys of other places than the queries'} has no form in mode 'sequence'"
        )
    from .attention import dropout_of

    mesh = module.sequence_mesh
    q, k, v = (part.permute(2, 0, 1, 3) for part in (query, key, value))
    lengths = lengths_of(mesh, len(q))
    place = mesh.interval(len(lengths), mesh.outer.time)[0]
    custom = attention_mask is not None and attention_mask.shape[2] > 1
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True)) and not custom
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    drop: Any = dropout_of(module) if dropout else None
    way = Way(CutSequence(mesh, mesh.outer.time, tuple(lengths), place), causal, scale, drop, type(module).__name__)
    return attend_sequence(module.sequence_way, q, k, v, attention_mask, way).transpose(0, 1), None


def prepare(module: Any, mesh: Mesh) -> None:
    """Chooses how a transformers attention module's keys and values reach its queries: module.sequence_way, of formulas.WAYS. Raises as
    way_of."""
    config, what = module.config, f"{type(module).__name__} on {mesh}"
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    item = next(module.parameters()).itemsize
    causal = bool(getattr(module, "is_causal", True))
    module.sequence_mesh = mesh
    module.sequence_way = way_of(asked_way(mesh), mesh, heads, kv_heads, causal, False, item, what)
    config._attn_implementation = NAME


def mask_function(*args: Any, allow_is_causal_skip: bool = True, attention_mask: torch.Tensor | None = None, **rest: Any) -> None:
    """What transformers calls where no prepared mask came: the causal one needs none."""
    if not allow_is_causal_skip or attention_mask is not None:
        raise NotImplementedError(
            "mode 'sequence': a mask that is not causal (packed sequences, position_ids that begin anew); give attention_mask of 4 dims"
        )


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)
