"""MLP: the pair of linears between which activations lie in the inner layout, so that no relayout is needed."""

from __future__ import annotations

import torch

from ..mesh import Mesh
from .dropout import Dropout
from .linear import Linear


class MLP(torch.nn.Module):
    """x [..., width] -> gelu(x fc1) [..., hidden] -> fc2 -> dropout, outer -> inner -> outer; GELU runs in fc1's step.

    Bytes: those of the two Linears. swapped: as Linear's, for both; matters only where outer and inner are the same.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        dropout: float = 0.0,
        bias: bool = True,
        mesh: Mesh | None = None,
        swapped: bool | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, bias, mesh, "outer->inner", swapped, "gelu", dtype)
        self.fc2 = Linear(hidden, width, bias, mesh, "inner->outer", swapped, "none", dtype)
        self.dropout = Dropout(dropout, mesh=mesh) if dropout else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc2(self.fc1(x))
        return y if self.dropout is None else self.dropout(y)
