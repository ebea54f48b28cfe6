"""Models of transformers, converted by gingham.parallelize, as layers in a row: causal language models of GPT-2 and Llama.

Between the border that parallelize puts around a model, which `step` takes the place of, and its layers stands only what is written here.
Labels are shifted by one, as the models' own loss does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..checks import plain

Row = list[tuple[Callable[[Any], Any], list[torch.nn.Module]]]
BORDER = "_gingham_border"  # what parallelize leaves on a model


def row_of(model: Any) -> Row | None:
    """Of a converted model of a known family, else None."""
    rows: dict[str, Callable[[Any], Row]] = {"GPT2LMHeadModel": _gpt2, "LlamaForCausalLM": _llama}
    names = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")]
    return rows[names[0]](model) if names and names[0] in rows else None


def shifted(labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """Each token's label is the next token."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignored)


def _first(y: Any) -> torch.Tensor:
    return y[0] if isinstance(y, tuple) else y


def _gpt2(model: Any) -> Row:
    inner = model.transformer

    def embed(ids: torch.Tensor) -> torch.Tensor:
        ids = plain(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return inner.drop(inner.wte(ids) + inner.wpe(positions))

    def run(block: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: _first(block(x))

    first = (embed, [inner.wte, inner.wpe, inner.drop])
    return [first, *((run(block), [block]) for block in inner.h), (inner.ln_f, [inner.ln_f]), (model.lm_head, [model.lm_head])]


def _llama(model: Any) -> Row:
    inner = model.model

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return inner.embed_tokens(plain(ids))

    def run(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
            return _first(layer(x, position_embeddings=inner.rotary_emb(x, positions), position_ids=positions))

        return call

    layers = ((run(layer), [layer, inner.rotary_emb]) for layer in inner.layers)
    return [(embed, [inner.embed_tokens]), *layers, (inner.norm, [inner.norm]), (model.lm_head, [model.lm_head])]
