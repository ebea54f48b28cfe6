"""MLP: the linears between which activations lie in the inner layout, so that no relayout is needed; plain or gated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ..autograd.linear import linear, linear_plan
from ..checks import cuts_of_block, row_dim
from ..mesh import Mesh
from ..mesh.layout import Cuts
from .dropout import Dropout
from .layer import Layer
from .linear import Linear
from .parameter import Given, part_of

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class MLP(Layer):
    """x [..., width] -> fc2(act(fc1(x))) -> dropout, outer -> inner -> outer; gated: down(act(gate(x)) * up(x)).

    activation: "gelu" (exact; runs inside fc1's step where not gated), "gelu_tanh", "relu", "silu". gated: gate and up
    share one gather of x. dim, order: of the rows by which dropout's masks go, see nn.Dropout. given: full tensors
    "fc1.weight", "fc1.bias", .. or "gate.weight", .., cut instead of drawn.
    Bytes: those of the Linears, x of gate and up once. swapped: as Linear's, for all; matters only where outer and inner
    are the same. Raises ValueError for another activation.
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
        *,
        activation: str = "gelu",
        gated: bool = False,
        dim: int = 0,
        order: str | None = None,
        given: Given = None,
        device: Any = None,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP: activation={activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        mesh = self.begin(mesh, device)
        self.width, self.hidden = width, hidden
        self.activation, self.gated = activation, gated
        if gated:
            self.plan = linear_plan(mesh, width, [hidden] * 2, "outer->inner", swapped, "gated").owned_by(self)
            self.gate, self.up = (
                Linear(width, hidden, bias, mesh, "outer->inner", self.plan.swapped, dtype=dtype, given=part_of(given, name))
                for name in ("gate", "up")
            )
            self.down = Linear(hidden, width, bias, mesh, "inner->outer", swapped, dtype=dtype, given=part_of(given, "down"))
        else:
            self.fused = "gelu" if activation == "gelu" else "none"
            self.fc1 = Linear(width, hidden, bias, mesh, "outer->inner", swapped, self.fused, dtype, given=part_of(given, "fc1"))
            self.fc2 = Linear(hidden, width, bias, mesh, "inner->outer", swapped, "none", dtype, given=part_of(given, "fc2"))
        self.dropout = Dropout(dropout, mesh=mesh, dims=(dim, -1), order=order) if dropout else None
        self.holds(*(part for part in self.children() if isinstance(part, Layer)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        act = ACTIVATIONS[self.activation]
        if self.gated:
            operands = [part.operands() for part in (self.gate, self.up)]
            gate, up = linear(x, [w for (w,), _ in operands], [b for _, (b,) in operands], self.plan)
            y = self.down(act(gate) * up)
        else:
            hidden = self.fc1(x)
            y = self.fc2(hidden if self.fused == "gelu" else act(hidden))
        return y if self.dropout is None else self.dropout(y)

    def extra_repr(self) -> str:
        return f"width={self.width}, hidden={self.hidden}, activation={self.activation!r}, gated={self.gated}"

    def received(self, rows: int, inner: int = 1) -> int:
        """gate and up share x."""
        if not self.gated:
            return super().received(rows, inner)
        return self.plan.received(self.gate, rows, inner) + self.down.received(rows, inner)

    def ends(self, x: torch.Tensor) -> tuple[Cuts, Cuts]:
        outer = self.mesh.outer
        # the index of a dropped element says which dim has the rows
        same = outer.rows == self.mesh.inner.rows and (self.dropout is None or self.dropout.dims[0] == 1)
        cuts = cuts_of_block(outer, x.dim(), row_dim(x, outer) if same else 0)
        return cuts, cuts

    def sizes(self) -> tuple[int, ...]:
        return self.width, self.hidden

    def reset_parameters(self) -> None:
        """Its linears have their own."""
