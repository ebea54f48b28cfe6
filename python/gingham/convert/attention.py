"""Attention of converted models: torch's MultiheadAttention, and the function that transformers' attention modules call.

Heads lie on inner's feature ranks and whole sequences on a rank, so that attention itself moves nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from .. import nn
from ..autograd.linear import linear, linear_plan
from ..autograd.relayout import relayout
from ..errors import ShapeError
from ..mesh import Mesh
from ..mesh.layout import Layout
from ..nn.attention import softmax
from . import sequence
from .loose import shared_gradient

# under which transformers finds the attention functions: torch's fused one, and for models made with "eager" plain operations,
# whose gradients have gradients
NAME, PLAIN = "gingham", "gingham_eager"


def check_heads(mesh: Mesh, heads: int, what: str) -> None:
    """Raises ShapeError where the ranks that cut features do not divide the heads, naming counts that would do."""
    ranks = mesh.parts(mesh.inner.features)
    if heads % ranks:
        near = sorted({max(ranks, heads // ranks * ranks), (heads // ranks + 1) * ranks})
        raise ShapeError(
            f"{what}: {heads} heads on {ranks} ranks that cut features: need a multiple of {ranks}, for example {near};"
            f" or a grid (m, n, k) whose n x k divides {heads}, for example {_grids(mesh.size, heads)}"
        )


def _grids(size: int, heads: int) -> list[tuple[int, int, int]]:
    """Grids of as many ranks that cut features over a divisor of the heads, the most first."""
    ways = [parts for parts in range(size, 0, -1) if size % parts == 0 and heads % parts == 0]
    return [(size // parts, parts, 1) for parts in ways[:2]]


class MultiheadAttention(torch.nn.Module):
    """torch.nn.MultiheadAttention in its place: query [batch, time, width], key and value [batch, time, width], all blocks
    in outer (batch first, always), the output likewise; masks as torch's, key_padding_mask with this rank's rows.

    q, k, v are three linears (one step where query, key and value are one tensor, two where key and value are) and
    out_proj is the fourth; `joins` tells checkpoints of in_proj_weight [3 width, width]. Attention weights are not
    returned: need_weights=True raises NotImplementedError. Bytes: those of the linears.
    """

    batch_first = True
    in_proj_bias = in_proj_weight = None  # what the fast path of torch's encoder layer asks for first
    _qkv_same_embed_dim = False
    q: nn.Linear

    def __init__(self, old: torch.nn.MultiheadAttention, mesh: Mesh) -> None:
        super().__init__()
        if not old._qkv_same_embed_dim or old.bias_k is not None or old.add_zero_attn:
            raise NotImplementedError("MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn has no distributed form here")
        check_heads(mesh, old.num_heads, "MultiheadAttention")
        width = old.embed_dim
        self.mesh, self.embed_dim, self.num_heads, self.head_dim = mesh, width, old.num_heads, old.head_dim
        free = mesh.outer == mesh.inner
        self.plans = {n: linear_plan(mesh, width, [width] * n, "outer->inner", "auto" if free else None, "qkv") for n in (1, 2, 3)}
        if len({plan.swapped for plan in self.plans.values()}) > 1:  # the weights have one place
            self.plans = {n: linear_plan(mesh, width, [width] * n, "outer->inner", self.plans[3].swapped, "qkv") for n in (1, 2, 3)}
        has_bias = old.in_proj_bias is not None
        weights = dict(zip("qkv", old.in_proj_weight.chunk(3), strict=True))
        biases = dict(zip("qkv", old.in_proj_bias.chunk(3), strict=True)) if has_bias else {}
        for part in "qkv":
            given = {"weight": torch.nn.Parameter(weights[part], old.in_proj_weight.requires_grad)}
            if has_bias:
                given["bias"] = torch.nn.Parameter(biases[part], old.in_proj_bias.requires_grad)
            setattr(self, part, nn.Linear(width, width, has_bias, mesh, "outer->inner", self.plans[3].swapped, given=given))
        given = dict(old.out_proj.named_parameters())
        swapped = "auto" if free else None
        self.out_proj = nn.Linear(width, width, old.out_proj.bias is not None, mesh, "inner->outer", swapped, given=given)
        self.dropout = nn.Dropout(old.dropout, mesh=mesh, layout="inner", dims=(0, 1)) if old.dropout else None
        self.joins = {"in_proj_weight": (("q.weight", "k.weight", "v.weight"), 0)}
        if has_bias:
            self.joins["in_proj_bias"] = (("q.bias", "k.bias", "v.bias"), 0)

    def received(self, rows: int, inner: int = 1) -> int:
        """Of self-attention: q, k and v with one gather of x."""
        return self.plans[3].received(self.q, rows, inner) + self.out_proj.received(rows, inner)

    def _project(self, x: torch.Tensor, parts: str) -> list[torch.Tensor]:
        layers = [getattr(self, part) for part in parts]
        projected = linear(
            x, [each.operand("weight") for each in layers], [each.operand("bias") for each in layers], self.plans[len(parts)]
        )
        return [part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, None]:
        if need_weights:
            raise NotImplementedError(
                "MultiheadAttention: heads lie on several ranks, so weights are not returned; pass need_weights=False"
            )
        if query is key and key is value:
            q, k, v = self._project(query, "qkv")
        elif key is value:
            (q,), (k, v) = self._project(query, "q"), self._project(key, "kv")
        else:
            (q,), (k,), (v,) = self._project(query, "q"), self._project(key, "k"), self._project(value, "v")
        mask = self._mask(q, attn_mask, key_padding_mask)
        y = attend(q, k, v, mask, is_causal and mask is None, None, self.dropout if self.training else None)
        return self.out_proj(y.transpose(1, 2).flatten(2)), None

    def _mask(self, q: torch.Tensor, attn_mask: torch.Tensor | None, padding: torch.Tensor | None) -> torch.Tensor | None:
        """One additive mask, broadcast to [rows, heads here, time, time], of torch's two, in which True means left out."""
        parts = []
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            if mask.dim() == 3:
                rows = self.mesh.interval(mask.shape[0] // self.num_heads, self.mesh.inner.rows)
                heads = self.mesh.interval(self.num_heads, self.mesh.inner.features)
                mask = mask.unflatten(0, (-1, self.num_heads)).narrow(0, *rows).narrow(1, *heads)
            parts.append(mask)
        if padding is not None:
            mask = _additive(padding, q.dtype)
            given, needed = (Layout(layout.rows, ()) for layout in (self.mesh.outer, self.mesh.inner))
            parts.append(relayout(mask, self.mesh, given, needed, mask.shape[-1])[:, None, None, :])
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (
        torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
        if mask.dtype == torch.bool
        else mask.to(dtype)
    )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    dropout: nn.Dropout | None,
    softcap: float | None = None,
    plain: bool = False,
) -> torch.Tensor:
    """softmax(q k^T scale + mask) v of [rows, heads, time, width]; mask: additive, or bool with True for what is seen.
    k and v may have fewer heads. dropout on the probabilities, its mask by global element. softcap c: scores s become c tanh(s / c)."""
    if k.shape[1] != q.shape[1]:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    dropout = None if dropout is not None and dropout.p == 0 else dropout
    if dropout is None and not plain and not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    scores = q @ k.transpose(-2, -1) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    probabilities = softmax(scores.to(torch.float64 if q.dtype == torch.float64 else torch.float32)).to(q.dtype)
    return (probabilities if dropout is None else dropout(probabilities)) @ v


def attention_function(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    plain: bool = False,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls its attention interface, on this rank's rows and heads; rest: what it passes and sdpa ignores.

    Raises NotImplementedError for output_attentions, sinks and position_bias.
    """
    asked = [name for name in ("output_attentions", "s_aux", "position_bias", "cache") if rest.get(name)]
    if asked:
        raise NotImplementedError(f"{type(module).__name__}: {', '.join(asked)} has no distributed form here")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    drop = dropout_of(module) if dropout else None
    if drop is not None and not isinstance(drop, nn.Dropout) or dropout and drop is None:
        raise NotImplementedError(f"{type(module).__name__}: dropout {dropout} was set after parallelize; set it before")
    y = attend(query, key, value, attention_mask, causal, scaling, drop, rest.get("softcap"), plain)
    return y.transpose(1, 2).contiguous(), None


def register() -> None:
    """Tells transformers the function and its masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, function in ((NAME, attention_function), (PLAIN, partial(attention_function, plain=True))):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
    sequence.register()


DROPOUTS = ("probability_dropout", "attn_dropout", "dropout")  # children of an attention module, on its probabilities


def is_attention(module: torch.nn.Module) -> bool:
    """Whether a transformers module calls the attention interface."""
    return hasattr(module, "is_causal") and hasattr(module, "scaling") and hasattr(module, "config")


def dropout_of(module: torch.nn.Module) -> torch.nn.Module | None:
    return next((module._modules[name] for name in DROPOUTS if module._modules.get(name) is not None), None)


def prepare(module: Any, mesh: Mesh, cut: bool) -> None:
    """Makes a transformers attention module work on this rank's heads (not cut: on all), before its children are converted.

    Raises ShapeError where the heads do not divide by the ranks, NotImplementedError for GPT-2's cross-attention.
    """
    config = module.config
    if cut and getattr(config, "num_attention_heads", None):
        check_heads(mesh, config.num_attention_heads, f"{type(module).__name__}'s num_attention_heads")
    if cut and _fewer(module, mesh) and not all(isinstance(module._modules.get(name), torch.nn.Module) for name in KEYS_AND_VALUES):
        check_heads(mesh, config.num_key_value_heads, f"{type(module).__name__}'s num_key_value_heads")
    if getattr(module, "is_cross_attention", False) and hasattr(module, "c_attn"):
        raise NotImplementedError("GPT-2 with cross-attention is not built yet")
    p = getattr(module, "attention_dropout", 0.0)
    if dropout_of(module) is None and isinstance(p, float) and p > 0:
        module.probability_dropout = torch.nn.Dropout(p)  # holds no tensor: the state dict stays as it was
    if cut and hasattr(module, "split_size"):
        module.split_size = mesh.interval(module.split_size, mesh.inner.features)[1]
    if mesh.outer.time:
        sequence.prepare(module, mesh)
        return
    config._attn_implementation = PLAIN if config._attn_implementation in ("eager", PLAIN) else NAME


KEYS_AND_VALUES = ("k_proj", "v_proj")


def _fewer(module: Any, mesh: Mesh) -> bool:
    """Whether the key and value heads do not divide by the ranks that cut features."""
    return bool((getattr(module.config, "num_key_value_heads", None) or 0) % mesh.parts(mesh.inner.features))


def copy_heads(module: Any, mesh: Mesh) -> None:
    """Where there are fewer key and value heads than ranks that cut features, each rank gets those that its query heads attend to,
    after its children were converted. Bytes: the outputs of both projections gathered over the feature ranks, and their gradients
    summed over them: (g-1)/g and 2 (g-1)/g of the whole."""
    if not _fewer(module, mesh):
        return
    heads, fewer = module.config.num_attention_heads, module.config.num_key_value_heads
    first, count = mesh.interval(heads, mesh.inner.features)
    wanted = [head * fewer // heads for head in range(first, first + count)]
    groups = len(set(wanted))
    if count % groups == 0 and wanted == [wanted[0] + index * groups // count for index in range(count)]:
        wanted = sorted(set(wanted))  # each of them serves as many query heads, as attend repeats them
    whole = Layout(mesh.inner.rows, ())
    for name in KEYS_AND_VALUES:
        width = layers_of(module._modules[name]).out_features

        def take(layer: Any, args: Any, y: torch.Tensor, width: int = width) -> torch.Tensor:
            full = shared_gradient(relayout(y, mesh, mesh.inner, whole, width), mesh, mesh.inner.features)
            picked = torch.tensor(wanted, device=y.device)
            return full.unflatten(-1, (fewer, -1)).index_select(-2, picked).flatten(-2)

        module._modules[name].register_forward_hook(take)


def layers_of(module: Any) -> Any:
    """The layer inside peft's wrapper."""
    return module._modules.get("base_layer", module)
