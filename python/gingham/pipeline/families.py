"""Models of transformers, converted by gingham.parallelize, as layers in a row: GPT-2 and Llama as causal language models, BERT that
predicts masked tokens or classes of tokens or texts, ViT that names images.

Between the border that parallelize puts around a model, which `step` takes the place of, and its layers stands only what is written here:
how inputs are cut, positions, and the first token. A causal model's labels are shifted by one, as its own loss does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import plain
from ..errors import ShapeError
from ..mesh import Mesh
from ..mesh.layout import chunks
from .given import MASK, POSITIONS, TYPES, Given

Row = list[tuple[Callable[[Any], Any], Sequence[torch.nn.Module]]]
BORDER = "_gingham_border"  # what parallelize leaves on a model


@dataclass(frozen=True)
class Family:
    """row(model, given): its layers; shifts: whether each token's label is the next token; images: whether its input is images; labels: the
    dims of its labels; takes: what it takes beside its input."""

    row: Callable[[Any, Given], Row]
    shifts: bool = False
    images: bool = False
    labels: int = 2
    takes: tuple[str, ...] = ()


def family_of(model: Any) -> Family | None:
    """Of a converted model of a known class, else None."""
    names = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")]
    return FAMILIES.get(names[0]) if names else None


def shifted(labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """Each token's label is the next token."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignored)


def images_here(mesh: Mesh, x: torch.Tensor, own: bool) -> torch.Tensor:
    """Of full images those of this rank, whole; own: as scatter's."""
    if not mesh.outer.time:
        return mesh.scatter(x, "rows", own=own)
    return x if own else x.narrow(0, *mesh.interval(len(x), samples_of(mesh)))


def samples_of(mesh: Mesh, own: bool = False) -> tuple[str, ...]:
    """The axes that cut samples; own: of what is this data rank's."""
    return tuple(name for name in mesh.outer.rows if name not in mesh.outer.time and not (own and name == "data"))


def check_places(model: Any, mesh: Mesh, x: torch.Tensor) -> None:
    """Raises ShapeError where a rank would have no place of the sequence."""
    places, pieces = x.shape[1], mesh.parts(mesh.outer.time)
    if x.dim() == 4:
        size = model.config.patch_size
        high, wide = (size, size) if isinstance(size, int) else size
        places = (x.shape[2] // high) * (x.shape[3] // wide) + 1
    if min(chunks(places, [pieces])) == 0:
        raise ShapeError(f"step: rank {mesh.rank} got sequences of {places} places on {pieces} ranks that cut them: some would have none")


def _first(y: Any) -> torch.Tensor:
    return y[0] if isinstance(y, tuple) else y


def _gpt2(model: Any, given: Given) -> Row:
    inner = model.transformer

    def embed(ids: torch.Tensor) -> torch.Tensor:
        ids, types = plain(ids), given.now.get(TYPES)
        x = inner.wte(ids) + inner.wpe(given.positions(ids).expand_as(ids))
        return inner.drop(x if types is None else x + inner.wte(types))

    def run(block: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: _first(block(x, attention_mask=given.mask(inner, x, True)))

    first = (embed, [inner.wte, inner.wpe, inner.drop])
    return [first, *((run(block), [block]) for block in inner.h), (inner.ln_f, [inner.ln_f]), (model.lm_head, [model.lm_head])]


def _llama(model: Any, given: Given) -> Row:
    inner = model.model

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return inner.embed_tokens(plain(ids))

    def run(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            positions, mask = given.positions(x), given.mask(inner, x, True)
            turned = inner.rotary_emb(x, positions)
            return _first(layer(x, attention_mask=mask, position_embeddings=turned, position_ids=positions))

        return call

    layers = ((run(layer), [layer, inner.rotary_emb]) for layer in inner.layers)
    return [(embed, [inner.embed_tokens]), *layers, (inner.norm, [inner.norm]), (model.lm_head, [model.lm_head])]


def _bert(model: Any, given: Given, *head: torch.nn.Module) -> Row:
    inner = model.bert

    def embed(ids: torch.Tensor) -> torch.Tensor:
        ids = plain(ids)
        return inner.embeddings(input_ids=ids, token_type_ids=given.now.get(TYPES), position_ids=given.positions(ids))

    def run(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: _first(layer(x, given.mask(inner, x, bool(inner.config.is_decoder))))

    layers = ((run(layer), [layer]) for layer in inner.encoder.layer)
    return [(embed, [inner.embeddings]), *layers, *((each, [each]) for each in head)]


def _vit(model: Any, given: Given) -> Row:
    inner = model.vit

    def name(x: torch.Tensor) -> torch.Tensor:
        return model.classifier(x[:, 0, :])

    def run(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: _first(layer(x))

    layers = ((run(layer), [layer]) for layer in inner.layers)
    first = (lambda images: inner.embeddings(plain(images)), [inner.embeddings])
    return [first, *layers, (inner.layernorm, [inner.layernorm]), (name, [model.classifier])]


TEXT = (MASK, POSITIONS, TYPES)
FAMILIES = {
    "GPT2LMHeadModel": Family(_gpt2, shifts=True, takes=TEXT),
    "LlamaForCausalLM": Family(_llama, shifts=True, takes=(MASK, POSITIONS)),
    "BertForMaskedLM": Family(lambda model, given: _bert(model, given, model.cls), takes=TEXT),
    "BertForTokenClassification": Family(lambda model, given: _bert(model, given, model.dropout, model.classifier), takes=TEXT),
    "BertForSequenceClassification": Family(
        lambda model, given: _bert(model, given, model.bert.pooler, model.dropout, model.classifier), labels=1, takes=TEXT
    ),
    "ViTForImageClassification": Family(_vit, images=True, labels=1),
}
