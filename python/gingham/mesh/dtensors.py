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
from torch.nn.utils.parametrizations import _WeightNorm

from ..errors import MeshError
from .mesh import Mesh, cuts_of, mesh_of

ARITHMETIC = ("add", "sub", "mul", "truediv", "pow", "matmul")
READING = ("item", "tolist", "__float__", "__int__", "__bool__")

_told: set[tuple[str, int]] = set()


def install() -> None:
    for name in ARITHMETIC:
        for form in (f"__{name}__", f"__r{name}__"):
            setattr(DTensor, form, _with_plain(getattr(torch.Tensor, form)))
    for name in READING:
        setattr(DTensor, name, _with_warning(name, getattr(torch.Tensor, name)))
    DTensor.numpy = _without_numpy  # type: ignore[assignment,method-assign]
    for op in (torch.ops.aten._is_any_true.default, torch.ops.aten._is_all_true.default):
        register_sharding(op)(_of_blocks)
    _WeightNorm.right_inverse = _summed(_WeightNorm.right_inverse)  # type: ignore[method-assign]
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
        if other.requires_grad:
            return operator(self.full_tensor(), other)
        by_element = "matmul" not in operator.__name__ and all(type(place) in (Shard, Replicate) for place in self.placements)
        if by_element and other.shape == self.shape:
            return operator(self, mesh.parameter(other.detach(), cuts_of(mesh, self.placements, self.dim())).detach())
        raise _mixed(mesh, operator.__name__, self, other)

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


def _mixed(mesh: Mesh, name: str, parameter: DTensor, plain: torch.Tensor) -> Exception:
    return MeshError(
        f"{name.strip('_')}: rank {mesh.rank} got a plain tensor {tuple(plain.shape)} beside a DTensor {tuple(parameter.shape)} placed"
        f" {tuple(parameter.placements)}, of which a rank has a part. Call the layer, layer(x); for a function of all of a parameter write"
        " layer.weight.full_tensor(), on every rank"
    )


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


def _without_numpy(self: DTensor, *args: Any, **kwargs: Any) -> Any:
    if mesh_of(self) is None:
        return torch.Tensor.numpy(self, *args, **kwargs)
    raise MeshError(
        f"numpy() of a DTensor {tuple(self.shape)} placed {tuple(self.placements)}: a rank has a part of it; take"
        " .full_tensor().detach().numpy(), on every rank, or .to_local() for this rank's part"
    )


def _of_blocks(x: Any) -> list[tuple[list[Any], list[Any]]]:
    """Each rank's own answer; nobody is asked in the middle of a backward pass."""
    found: list[tuple[list[Any], list[Any]]] = [([Replicate()], [Replicate()]), ([Partial("max")], [Partial("sum")])]
    return found + [([Partial("max")], [Shard(dim)]) for dim in range(len(x.shape))]


install()
