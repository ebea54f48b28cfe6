"""Layers: one class each, right on every mesh. Parameters are DTensors of torch.nn's global shapes and initial bits."""

from .attention import SelfAttention
from .clip import clip_grad_norm_
from .dropout import Dropout
from .embedding import Embedding
from .linear import Linear
from .loss import cross_entropy
from .mlp import MLP
from .norm import LayerNorm

__all__ = ["MLP", "Dropout", "Embedding", "LayerNorm", "Linear", "SelfAttention", "clip_grad_norm_", "cross_entropy"]
