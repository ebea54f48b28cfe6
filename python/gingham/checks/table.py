"""Which rule each of torch's operations goes by, by its name: torch.add, Tensor.add, add_, __add__ and __radd__ are one."""

from __future__ import annotations

from typing import Any

from .rules import (
    CONVERSIONS,
    OF_FEATURES,
    Rule,
    Unknown,
    attention,
    convolution,
    elementwise,
    lookup,
    loss,
    matmul,
    name_of,
    normalisation,
    random,
    read,
    reduction,
    unmarked,
)
from .views import all_reduce, along, assigned, expanded, found, indexed, inserted, joined, like, permuted, pieces, reshape


def rule_of(func: Any) -> Rule:
    """The rule; raises Unknown."""
    name = name_of(func)
    if name.startswith(".") and name not in RULES:
        return unmarked
    if name not in RULES:
        raise Unknown(name or repr(func))
    return RULES[name]


def _words(text: str) -> list[str]:
    return text.split()


ELEMENTWISE = _words(
    """
    add sub mul div pow neg abs exp exp2 log log2 log10 log1p expm1 sqrt rsqrt square reciprocal sin cos tan tanh sinh cosh
    asin acos atan atan2 sigmoid logit relu relu6 gelu silu leaky_relu elu selu celu softplus mish hardswish hardsigmoid
    hardtanh softsign tanhshrink softshrink hardshrink threshold prelu logsigmoid erf erfc erfinv floor ceil round trunc
    frac sign sgn clamp clamp_min clamp_max clip nan_to_num isnan isfinite isinf logical_not logical_and logical_or
    logical_xor bitwise_not bitwise_and bitwise_or and or xor invert maximum minimum fmax fmin fmod remainder floor_divide
    eq ne lt le gt ge where masked_fill addcmul addcdiv lerp copy clone contiguous detach to float double half bfloat16 int
    long bool type type_as cpu requires_grad zeros_like ones_like full_like empty_like fill zero xlogy hypot rsub positive
    lgamma digamma sinc deg2rad alias data rad2deg polar copysign
    """
)
REDUCTIONS = _words(
    """
    sum mean prod max min amax amin argmax argmin softmax log_softmax softmin logsumexp std var std_mean var_mean norm
    cumsum cumprod logcumsumexp sort argsort topk kthvalue median mode any all nanmean nansum count_nonzero quantile roll
    flip normalize renorm aminmax nanmedian nanquantile
    """
)
READS = ["item", "tolist", "format", *CONVERSIONS]
UNMARKED = _words(
    """
    size dim numel stride is_contiguous element_size storage_offset data_ptr backward register_hook retain_grad
    is_floating_point is_complex is_inference nelement ndimension untyped_storage repr hash grad len deepcopy reduce_ex
    numpy has_names is_shared array is_same_size get_device is_nonzero is_signed register_post_accumulate_grad_hook
    is_pinned dlpack version iter broadcast_shapes result_type dlpack_device is_tensor allclose equal isclose
    """
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(UNMARKED, unmarked),
    **dict.fromkeys(READS, read),
    **dict.fromkeys(("layer_norm", "rms_norm"), normalisation),
    **dict.fromkeys(("matmul", "mm", "bmm", "linear", "mv"), matmul),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel"), reshape),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "permute", "t", ".T", ".mT", "adjoint", ".H", "movedim", "moveaxis"), permuted),
    **dict.fromkeys(("unsqueeze", "squeeze"), inserted),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expanded),
    **dict.fromkeys(("split", "chunk", "unbind", "narrow", "select", "tensor_split"), pieces),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), joined),
    **dict.fromkeys(("dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d"), random),
    **dict.fromkeys(("rand_like", "randn_like", "randint_like", "bernoulli", "normal", "uniform", "multinomial", "exponential"), random),
    **dict.fromkeys(("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"), loss),
    **dict.fromkeys(("binary_cross_entropy", "binary_cross_entropy_with_logits", "gaussian_nll_loss", "poisson_nll_loss"), loss),
    **dict.fromkeys(("margin_ranking_loss", "hinge_embedding_loss", "soft_margin_loss", *OF_FEATURES), loss),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "batch_norm", "instance_norm", "group_norm"), convolution),
    "scaled_dot_product_attention": attention,
    "getitem": indexed,
    "setitem": assigned,
    **dict.fromkeys(("index_select", "index_fill", "index_add", "index_copy", "index_reduce", "gather", "take_along_dim"), along),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), along),
    **dict.fromkeys(("nonzero", "argwhere"), found),
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full"), like),
    "embedding": lookup,
    "all_reduce": all_reduce,
    ".data": elementwise,
    ".real": elementwise,
}
