"""Converted models in mode "sequence": a rank has a piece of every sequence, and attention's keys and values come by (nn/sequence.py).

GPT-2, Llama, BERT and ViT, whose layers but attention see one token at a time: the border cuts ids, labels (a causal model's shifted first)
and positions along the sequence, and leaves masks of keys whole. Images stay whole; every rank embeds all patches and keeps its piece, of
class token and patches together. What reads the first token (poolers, ViT's classifier) has rows on the rank that has it, and none on the
others. All other models are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..autograd.ring import CutSequence, Way, widest_head
from ..errors import ShapeError
from ..mesh import Mesh
from ..mesh.layout import chunks
from ..nn.sequence import asked_way, attend_sequence, lengths_of, way_of
from .loose import shared_gradient
from .shares import Share, inward

NAME = "gingham_ring"  # under which transformers finds the attention function and the mask
# by family the losses (losses.LOSSES) of heads that have a form here
FAMILIES = {
    "gpt2": ("causal",),
    "llama": ("causal",),
    "bert": ("masked", "pretraining", "choices", "classes", "tokens", "answers"),
    "vit": ("classes",),
}
WORDS = {"choices": "next sentences"}  # of losses whose name says too much: BertForMultipleChoice is not among them
KEYS = "attention_mask"
IMAGES = ("pixel_values", "bool_masked_pos")  # of which every rank has whole samples


def check_model(model: Any, mesh: Mesh, family: str | None, loss: str | None, base: Any) -> None:
    """Raises NotImplementedError for a model that has no form here."""
    if not mesh.outer.time:
        return
    if family not in FAMILIES or base is not None and loss not in FAMILIES[family]:
        known = "; ".join(f"{name} with {', '.join(WORDS.get(each, each) for each in losses)}" for name, losses in FAMILIES.items())
        raise NotImplementedError(
            f"{type(model).__name__} on {mesh}: mode 'sequence' converts bases, and models by the kind of their loss: {known};"
            " choose a mode that keeps samples whole, or build the model of gingham.nn's layers"
        )
    if family == "bert" and (model.config.is_decoder or model.config.add_cross_attention):
        raise NotImplementedError(f"{type(model).__name__} on {mesh}: BERT as a decoder has no form in mode 'sequence'")


def attach(model: torch.nn.Module, mesh: Mesh) -> None:
    """Hooks of a converted model: embedded patches lose other ranks' places, the first token its rows where it is another rank's."""
    if not mesh.outer.time:
        return

    def piece(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0].narrow(1, *mesh.interval(args[0].shape[1], mesh.outer.time)),)

    def first(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return args if mesh.interval(mesh.parts(mesh.outer.time), mesh.outer.time)[0] == 0 else (args[0][:0],)

    for module in model.modules():
        kind = type(module).__name__
        if kind == "ViTEmbeddings":
            module._modules["dropout"].register_forward_pre_hook(piece)  # type: ignore[union-attr]
        if kind in ("ViTPooler", "BertPooler"):
            module.register_forward_pre_hook(first)
        if kind == "ViTForImageClassification":
            module._modules["classifier"].register_forward_pre_hook(first)  # type: ignore[union-attr]


def is_prepared(mesh: Mesh, name: str) -> bool:
    """Whether an argument is as the model takes it."""
    return bool(mesh.outer.time) and name in (KEYS, "position_ids")


def prepared(
    mesh: Mesh, model: Any, given: dict[str, Any], names: Sequence[str], share: Share | None = None, missing: int = 0
) -> dict[str, Any]:
    """Arguments by name, with the mask of keys as attention here takes it, images of this rank's samples, and positions where none are
    given. share: of this data rank's own samples, where they are such; missing: samples to add, copies of the first.

    Raises ShapeError for a sequence of fewer places than ranks, NotImplementedError for a cache.
    """
    what = type(model).__name__
    stream = next(given[name] for name in ("input_ids", "inputs_embeds", "pixel_values") if given.get(name) is not None)
    time, pieces = _places(model, stream), mesh.parts(mesh.outer.time)
    if min(chunks(time, [pieces])) == 0:
        raise ShapeError(
            f"{what}: rank {mesh.rank} got a sequence of {time} places on {pieces} ranks that cut it, so that some would have none;"
            " generation and short sequences need another mode"
        )
    found = dict(given)
    cache = next((found[name] for name in ("cache", "past_key_values") if found.get(name) is not None), None)
    if cache is not None and cache.get_seq_length():
        raise NotImplementedError(f"{what}: rank {mesh.rank} got a cache, which mode 'sequence' does not fill; choose another mode")

    def samples(x: torch.Tensor) -> torch.Tensor:
        """Of all that are given, those of this rank."""
        if share or len(x) != len(stream):
            return x
        x = torch.cat([x, x[:1].expand(missing, *x.shape[1:])]) if missing else x
        return x.narrow(0, *mesh.interval(len(x), tuple(name for name in mesh.outer.rows if name not in mesh.outer.time)))

    for name in IMAGES:
        images = found.get(name)
        if images is not None:
            wanted = images.requires_grad and torch.is_grad_enabled()
            summed = mesh.outer.time if share else mesh.outer.rows
            images = inward(images, share) if share else images
            found[name] = samples(shared_gradient(images, mesh, summed) if wanted else images)
    mask = found.get(KEYS)
    if mask is not None:
        if mask.dim() == 2 and mask.shape[1] == time:
            found[KEYS] = samples(mask).bool()[:, None, None, :]
        elif mask.dim() == 4 and mask.shape[2] == time:
            found[KEYS] = samples(mask).narrow(2, *mesh.interval(time, mesh.outer.time))
            found[KEYS].of_queries = True  # which its shape does not say where a rank has one place
        else:
            raise ShapeError(
                f"{what}: rank {mesh.rank} got {KEYS} {tuple(mask.shape)}, expected [batch, {time}] or [batch, 1, {time}, {time}]"
            )
    if found.get("position_ids") is not None or "position_ids" in names:
        positions = found.get("position_ids")
        positions = torch.arange(time, device=stream.device).unsqueeze(0) if positions is None else samples(positions)
        found["position_ids"] = positions.narrow(-1, *mesh.interval(time, mesh.outer.time))
    return found


def _places(model: Any, stream: torch.Tensor) -> int:
    """How long the sequence is that a model makes of its input: of images, the patches and the class token."""
    if stream.dim() != 4:
        return stream.shape[1]
    size = model.config.patch_size
    high, wide = (size, size) if isinstance(size, int) else size
    return (stream.shape[2] // high) * (stream.shape[3] // wide) + 1


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
    custom = attention_mask is not None and (attention_mask.shape[2] > 1 or hasattr(attention_mask, "of_queries"))
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
    dtype, width = next(module.parameters()).dtype, getattr(config, "head_dim", None) or config.hidden_size // heads
    most = widest_head(mesh, dtype)
    if width > most:
        raise NotImplementedError(f"{what}: rank {mesh.rank} got heads of {width} {dtype} numbers on a GPU, expected at most {most}")
    causal = bool(getattr(module, "is_causal", True))
    module.sequence_mesh = mesh
    module.sequence_way = way_of(asked_way(mesh), mesh, heads, kv_heads, width, causal, False, dtype, what)
    config._attn_implementation = NAME


def mask_function(*args: Any, allow_is_causal_skip: bool = True, attention_mask: torch.Tensor | None = None, **rest: Any) -> None:
    """What transformers calls where no prepared mask came: the causal one needs none, nor does one in which all see all."""
    if not (allow_is_causal_skip or rest.get("allow_is_bidirectional_skip")) or attention_mask is not None:
        raise NotImplementedError(
            "mode 'sequence': a mask that is not causal (packed sequences, position_ids that begin anew); give attention_mask of 4 dims"
        )


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)
