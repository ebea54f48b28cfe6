"""Layers: one class each, right on every mesh. Parameters are DTensors of torch.nn's global shapes and initial bits."""

from . import init
from .attention import SelfAttention
from .cache import KVCache
from .clip import clip_grad_norm_
from .dropout import Dropout
from .embedding import Embedding
from .linear import Classifier, Linear, share_input
from .loss import accuracy, cross_entropy
from .mlp import MLP
from .norm import LayerNorm, RMSNorm
from .patches import PatchEmbedding
from .scaler import GradScaler

__all__ = [
    "MLP",
    "Classifier",
    "Dropout",
    "Embedding",
    "GradScaler",
    "KVCache",
    "LayerNorm",
    "Linear",
    "PatchEmbedding",
    "RMSNorm",
    "SelfAttention",
    "accuracy",
    "clip_grad_norm_",
    "cross_entropy",
    "init",
    "share_input",
]
