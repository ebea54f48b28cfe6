"""What torch's DTensor lacks for parameters on a mesh of ours; those on other meshes are left as they are.

loss + sum(p.square().sum() for p in model.parameters())   the sum becomes a plain tensor, so that both gradients are right
p.mean().item(), float(p.sum()), bool((p > 9).any())       this rank's part: a warning, once a place
torch.autograd.set_detect_anomaly(True)                    each rank looks at its own block
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from .mesh import mesh_of

ARITHMETIC = ("add", "sub", "mul", "truediv", "pow")
READING = ("item", "tolist", "__float__", "__int__", "__bool__")

_told: set[tuple[str, int]] = set()


def install() -> None:
    for name in ARITHMETIC:
        for form in (f"__{name}__", f"__r{name}__"):
            setattr(DTensor, form, _with_plain(getattr(torch.Tensor, form)))
    for name in READING:
        setattr(DTensor, name, _with_warning(name, getattr(torch.Tensor, name)))
    for op in (torch.ops.aten._is_any_true.default, torch.ops.aten._is_all_true.default):
        register_sharding(op)(_of_blocks)
    whole = Replicate()
    # torch has a rule for the forward pass of weight_norm only
    register_sharding(torch.ops.aten._weight_norm_interface_backward.default)(lambda *_: [([whole, whole], [whole] * 4 + [None])])


def _with_plain(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Python asks a subclass's operators first, also for `plain + dtensor`."""

    @wraps(operator)
    def apply(self: DTensor, other: Any) -> Any:
        plain = isinstance(other, torch.Tensor) and not isinstance(other, DTensor) and other.requires_grad
        if plain and not torch.compiler.is_compiling() and mesh_of(self) is not None:
            return operator(self.full_tensor(), other)
        return operator(self, other)

    return apply


def _with_warning(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(read)
    def reading(self: DTensor, *args: Any) -> Any:
        if mesh_of(self) is not None and not all(place.is_replicate() for place in self.placements):
            frame = sys._getframe(1)
            place = (frame.f_code.co_filename, frame.f_lineno)
            if place not in _told:
                _told.add(place)
                warnings.warn(
                    f"{name.strip('_')}() of a DTensor {tuple(self.shape)} placed {tuple(self.placements)} reads this rank's part only;"
                    " expected .full_tensor() before it (every rank calls it)",
                    stacklevel=2,
                )
        return read(self, *args)

    return reading


def _of_blocks(x: Any) -> list[tuple[list[Any], list[Any]]]:
    """Each rank's own answer; nobody is asked in the middle of a backward pass."""
    found: list[tuple[list[Any], list[Any]]] = [([Replicate()], [Replicate()]), ([Partial("max")], [Partial("sum")])]
    return found + [([Partial("max")], [Shard(dim)]) for dim in range(len(x.shape))]


install()
