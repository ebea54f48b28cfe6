"""A linear whose one weight is three: GPT-2's c_attn and its like."""

from __future__ import annotations

from typing import Any

import torch

from .. import nn
from ..autograd.linear import linear, linear_plan
from ..errors import ShapeError
from ..mesh import Mesh


class FusedLinears(torch.nn.Module):
    """Three linears of one weight, [3 out, in] or transposed (Conv1D's order) [in, 3 out]: x -> their local outputs side by side,
    with one gather of x.

    q, k and v hold their own parameters; `joins` tells checkpoints the name, the parts and the dim of the original ones.
    """

    def __init__(
        self, path: str, into: int, out: int, mesh: Mesh, given: dict[str, torch.Tensor], layout: str, transposed: bool = True
    ) -> None:
        super().__init__()
        if out % 3:
            raise ShapeError(f"{path}: its {out} outputs are not three of one width, as the role 'qkv' needs")
        self.in_features, self.out_features = into, out
        dims = {"weight": 1 if transposed else 0, "bias": 0}
        parts = {name: dict(zip(("q", "k", "v"), whole.split(out // 3, dim=dims[name]), strict=True)) for name, whole in given.items()}
        swapped = "auto" if mesh.outer == mesh.inner else None
        self.plan = linear_plan(mesh, into, [out // 3] * 3, layout, swapped, "qkv", transposed=transposed)
        for part in ("q", "k", "v"):
            pieces = {name: torch.nn.Parameter(split[part], given[name].requires_grad) for name, split in parts.items()}
            layer = nn.Linear(into, out // 3, "bias" in given, mesh, layout, self.plan.swapped, transposed=transposed, given=pieces)
            setattr(self, part, layer)
        self.joins = {"weight": (("q.weight", "k.weight", "v.weight"), dims["weight"])}
        if "bias" in given:
            self.joins["bias"] = (("q.bias", "k.bias", "v.bias"), 0)

    def received(self, rows: int, inner: int = 1) -> int:
        return self.plan.received(self.q, rows, inner)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("joins", {}):
            raise AttributeError(
                f"{name} of a weight held as three, q.{name}, k.{name}, v.{name} (see `joins`): read these; merge before parallelize"
            )
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts: list[Any] = [self.q, self.k, self.v]
        return torch.cat(linear(x, [part.operand("weight") for part in parts], [part.operand("bias") for part in parts], self.plan), -1)
