"""The models and batches of the tests of pipelines."""

from typing import Any

import torch

from gingham.commands.gpt import GPT, Shape, parallel_kit, serial_kit

SHAPE = dict(layers=4, width=32, heads=4, context=8, dropout=0.1)


def sample(batch: int, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(256, (batch, SHAPE["context"] + 1), generator=torch.Generator().manual_seed(step))
    targets = tokens[:, 1:].contiguous()
    targets[: batch // 3] = -100  # micro-batches have unequal numbers of valid tokens
    return tokens[:, :-1].contiguous(), targets


def gpt(mesh: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(3)
    return GPT(serial_kit() if mesh is None else parallel_kit(mesh), Shape(**SHAPE)).to(dtype)


def sequential(linear: Any) -> Any:
    torch.manual_seed(1)
    return torch.nn.Sequential(linear(8, 16, dtype=torch.float64), torch.nn.GELU(), linear(16, 4, dtype=torch.float64))
