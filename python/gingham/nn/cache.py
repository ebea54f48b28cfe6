"""Keys and values of the tokens so far, for generation one piece at a time."""

from __future__ import annotations

import torch


class KVCache:
    """Of one SelfAttention: this rank's heads of the past, [batch, kv heads here, time, head_dim] each; pass it as `cache=`.

    length: tokens held. Any object with `length` and `update` fits. 2 batch kv_heads/ranks length head_dim words.
    """

    def __init__(self) -> None:
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends the new tokens' keys and values, each [batch, kv heads here, new, head_dim]; returns all."""
        if self.key is None or self.value is None:
            self.key, self.value = key, value
        else:
            self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        return self.key, self.value
