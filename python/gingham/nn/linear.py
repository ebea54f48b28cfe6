"""Linear: y = x W^T + b with W cut over the mesh."""

from __future__ import annotations

from math import sqrt

import torch

from ..functional import linear, linear_plan
from ..mesh import Mesh, current


class Linear(torch.nn.Module):
    """torch.nn.Linear on a mesh: x [..., in] -> [..., out], both this rank's blocks.

    weight, bias: DTensors of the global shapes [out, in] and [out], the same bits as torch.nn.Linear's after the same
    seed. layout: the activation layouts that come in and go out, "outer->outer", "outer->inner" or "inner->outer";
    where they differ on the mesh the first costs one relayout. swapped: n and k trade places (None: no, or as layout
    asks; "auto": the cheaper). epilogue: "gelu" applies the exact GELU to the result before it is stored.

    Bytes received, forward and backward: [3x(pn-1) + 2y(pk-1) + 3w(pm-1)] / P words unswapped, n and k traded when
    swapped, 2w(d-1)/(d q^2) more where the weights are replicated over depth (THEORY.md section 4).
    Raises MeshError where layout and swapped disagree; see functional.linear for the errors of a call.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mesh: Mesh | None = None,
        layout: str = "outer->outer",
        swapped: bool | str | None = None,
        epilogue: str = "none",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mesh, self.in_features, self.out_features, self.layout, self.epilogue = (
            current(mesh),
            in_features,
            out_features,
            layout,
            epilogue,
        )
        self.plan = linear_plan(self.mesh, in_features, [out_features], layout, swapped)
        weight = torch.empty(out_features, in_features, dtype=dtype)
        torch.nn.init.kaiming_uniform_(weight, a=sqrt(5))
        self.weight = self.mesh.parameter(weight, self.plan.weight_cuts)
        self.bias: torch.nn.Parameter | None = None
        if bias:
            bound = 1 / sqrt(in_features) if in_features > 0 else 0
            full = torch.empty(out_features, dtype=dtype)
            torch.nn.init.uniform_(full, -bound, bound)
            self.bias = self.mesh.parameter(full, self.plan.bias_cuts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, [self.weight], [self.bias], self.plan, self.epilogue)[0]

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, layout={self.layout}, swapped={self.plan.swapped}"
