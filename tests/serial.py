"""What the layers must compute, in plain torch and by torch.nn's own modules: imports nothing of gingham."""

import torch
from torch.nn import functional as F

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}


class Transposed(torch.nn.Module):
    """GPT-2's Conv1D: weight [in, out]."""

    def __init__(self, width: int, out: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, out, dtype=dtype))
        torch.nn.init.normal_(self.weight, std=0.02)
        self.bias = torch.nn.Parameter(torch.zeros(out, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


class Tied(torch.nn.Module):
    """ids -> logits by one table."""

    def __init__(self, count: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(count, width, dtype=dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(self.embedding(ids), self.embedding.weight)


class Patches(torch.nn.Conv2d):
    """images -> [rows, patches, width]."""

    def __init__(self, patch: int, channels: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(channels, width, patch, patch, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flatten(2).transpose(1, 2)


class MLP(torch.nn.Module):
    def __init__(self, width: int, hidden: int, activation: str, gated: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        names = ("gate", "up", "down") if gated else ("fc1", "fc2")
        for name in names[:-1]:
            setattr(self, name, torch.nn.Linear(width, hidden, dtype=dtype))
        setattr(self, names[-1], torch.nn.Linear(hidden, width, dtype=dtype))
        self.gated = gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x)) if self.gated else self.fc2(self.activation(self.fc1(x)))


class Attention(torch.nn.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        theta: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal, self.theta = heads, kv_heads or heads, causal, theta
        self.head_dim = head_dim or width // heads
        self.q = torch.nn.Linear(width, heads * self.head_dim, dtype=dtype)
        self.k, self.v = (torch.nn.Linear(width, self.kv_heads * self.head_dim, dtype=dtype) for _ in range(2))
        self.o = torch.nn.Linear(heads * self.head_dim, width, dtype=dtype)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.theta is not None:
            q, k = self.turned(q), self.turned(k)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (k, v))
        if mask is not None and self.causal:
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            mask = mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -torch.inf)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None)
        return self.o(y.transpose(1, 2).flatten(2))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Llama's rotary positions: features i and i + d/2 are a pair, turned by position theta^(-2i/d)."""
        half = self.head_dim // 2
        angles = torch.outer(torch.arange(x.shape[2], dtype=torch.float64), self.theta ** (-torch.arange(half, dtype=torch.float64) / half))
        cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
        wide = x if x.dtype == torch.float64 else x.float()
        turned = torch.cat([-wide[..., half:], wide[..., :half]], -1)
        return (wide * cos.to(wide.dtype) + turned * sin.to(wide.dtype)).to(x.dtype)


class Loss(torch.nn.Module):
    """logits -> one number."""

    def __init__(self, target: torch.Tensor, smoothing: float) -> None:
        super().__init__()
        self.target, self.smoothing = target, smoothing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x.flatten(0, -2), self.target.flatten(), label_smoothing=self.smoothing)
