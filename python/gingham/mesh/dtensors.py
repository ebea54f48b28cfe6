"""What torch's DTensor lacks for parameters on a mesh of ours; those on other meshes are left as they are.

loss + sum(p.square().sum() for p in model.parameters())   the sum becomes a plain tensor, so that both gradients are right
p.mean().item(), float(p.sum()), bool((p > 9).any())       this rank's part: a warning, once a place
torch.autograd.set_detect_anomaly(True)                    each rank looks at its own block
layer.weight.grad * mask                                   a plain tensor of the same shape is cut like it
x @ layer.weight.T                                         MeshError that says what to write
layer.weight.numpy()                                       MeshError: a rank has a part
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
from torch.nn.utils.parametrizations import _Orthogonal, _WeightNorm

from ..errors import MeshError
from .mesh import mesh_of
from .operations import mixed, stands_whole, told
from .writes import cut_as

ARITHMETIC = ("add", "sub", "mul", "truediv", "pow", "matmul")
READING = ("item", "__float__", "__int__", "__bool__")

_told: set[tuple[str, int]] = set()


def install() -> None:
    for name in ARITHMETIC:
        for form in (f"__{name}__", f"__r{name}__"):
            setattr(DTensor, form, _with_plain(getattr(torch.Tensor, form)))
    for name in READING:
        setattr(DTensor, name, _with_warning(name, getattr(torch.Tensor, name)))
    for name in ("numpy", "tolist"):
        setattr(DTensor, name, _refused(name, getattr(torch.Tensor, name)))
    setattr(DTensor, "__format__", _formatted)  # noqa: B010
    for op in (torch.ops.aten._is_any_true.default, torch.ops.aten._is_all_true.default):
        register_sharding(op)(_of_blocks)
    _WeightNorm.right_inverse = _summed(_WeightNorm.right_inverse)  # type: ignore[method-assign]
    for name in ("forward", "right_inverse"):
        setattr(_Orthogonal, name, _of_the_whole(getattr(_Orthogonal, name)))
    whole = Replicate()
    # torch has a rule for the forward pass of weight_norm only
    register_sharding(torch.ops.aten._weight_norm_interface_backward.default)(lambda *_: [([whole, whole], [whole] * 4 + [None])])


def _with_plain(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Python asks a subclass's operators first, also for `plain + dtensor`."""

    @wraps(operator)
    def apply(self: DTensor, other: Any) -> Any:
        plain = isinstance(other, torch.Tensor) and not isinstance(other, DTensor) and (other.requires_grad or other.numel() > 1)
        mesh = mesh_of(self) if plain and not torch.compiler.is_compiling() else None
        if mesh is None:
            return operator(self, other)
        if other.requires_grad or torch.is_grad_enabled() and self.requires_grad and stands_whole(self):
            return operator(self.full_tensor(), other)
        by_element = "matmul" not in operator.__name__ and all(type(place) in (Shard, Replicate) for place in self.placements)
        if by_element and other.shape == self.shape:
            return operator(self, cut_as(mesh, self, other.detach()))
        if stands_whole(self):
            return operator(self.full_tensor(), other)
        raise mixed(mesh, operator.__name__.strip("_"), self, other)

    return apply


def _summed(inverse: Callable[..., Any]) -> Callable[..., Any]:
    """weight_norm's magnitudes, which become a parameter: no parts of sums, which no optimizer can change in place."""

    @wraps(inverse)
    def parts(self: Any, weight: torch.Tensor) -> Any:
        found = inverse(self, weight)
        if not isinstance(weight, DTensor) or mesh_of(weight) is None:
            return found
        return tuple(
            each.redistribute(each.device_mesh, [place if type(place) in (Shard, Replicate) else Replicate() for place in each.placements])
            for each in found
        )

    return parts


def _of_the_whole(method: Callable[..., Any]) -> Callable[..., Any]:
    """A parametrization's function of a whole matrix: made on every rank, and cut as the parameter is."""

    @wraps(method)
    def make(self: Any, weight: torch.Tensor) -> Any:
        if not isinstance(weight, DTensor) or mesh_of(weight) is None:
            return method(self, weight)
        full = method(self, weight.full_tensor())
        made = DTensor.from_local(full, weight.device_mesh, [Replicate()] * len(weight.placements), run_check=False)
        return made.redistribute(placements=weight.placements).contiguous()

    return make


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


def _formatted(self: DTensor, how: str) -> str:
    """f"{loss:.3f}" of a number, as of torch's own tensors; a part of one warns as item() does."""
    return format(self.item() if how and self.dim() == 0 and mesh_of(self) is not None else str(self), how)


def _refused(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
    """Of what a rank has no more than a part of, torch's own words would be about tensor subclasses."""

    @wraps(read)
    def reading(self: DTensor, *args: Any, **kwargs: Any) -> Any:
        mesh = mesh_of(self)
        if mesh is None:
            return read(self, *args, **kwargs)
        raise MeshError(
            f"{name}() of {told(mesh, self)[0]}: a rank has a part of it; take .full_tensor().detach().{name}(), on every rank, or"
            f" .to_local().detach().{name}() for this rank's part"
        )

    return reading


def _of_blocks(x: Any) -> list[tuple[list[Any], list[Any]]]:
    """Each rank's own answer; nobody is asked in the middle of a backward pass."""
    found: list[tuple[list[Any], list[Any]]] = [([Replicate()], [Replicate()]), ([Partial("max")], [Partial("sum")])]
    return found + [([Partial("max")], [Shard(dim)]) for dim in range(len(x.shape))]


install()
