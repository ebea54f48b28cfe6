"""Regions of a model without a rule whose inside may be cut along features: stacks of torch's transformer layers, chains of linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import nn
from ..autograd.relayout import relayout
from ..mesh import Mesh
from . import attention, inputs, layers
from .layers import ELEMENTWISE, Conversion
from .rules import TORCH

STACKS = (
    torch.nn.Transformer,
    torch.nn.TransformerEncoder,
    torch.nn.TransformerDecoder,
    torch.nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer,
)


def region_of(module: torch.nn.Module) -> str:
    """Why a module's inside may lie in outer and inner: a stack of torch's transformer layers, or a chain of linears."""
    if isinstance(module, STACKS) and layers.is_plain(module):
        return "stack"
    if isinstance(module, torch.nn.Sequential) and layers.is_plain(module) and any(isinstance(child, torch.nn.Linear) for child in module):
        links = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.RMSNorm, *ELEMENTWISE)
        if all(type(child) in links and layers.is_plain(child) for child in module):
            return "chain"
    return ""


def batch_dim(model: torch.nn.Module) -> int:
    """Which dim of a stack's input is the batch."""
    firsts = [module.batch_first for module in model.modules() if isinstance(module, torch.nn.MultiheadAttention)]
    return 0 if all(firsts) else 1


def roles_of_children(module: torch.nn.Module) -> dict[str, str]:
    """Roles that a module of torch gives its linears: a transformer layer by name, a chain by pairs of them."""
    for cls in type(module).__mro__:
        if cls.__name__ in TORCH and cls.__module__.startswith("torch."):
            return TORCH[cls.__name__]
    if region_of(module) != "chain":
        return {}
    roles: dict[str, str] = {}
    first: str | None = None
    between: list[torch.nn.Module] = []
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            if first is None:
                first, between = name, []
            else:
                roles |= {first: "colwise", name: "rowwise"}
                for each in between:
                    each._between = True  # type: ignore[assignment]
                first = None
        elif first is not None and type(child) not in ELEMENTWISE:
            first = None
        elif first is not None:
            between.append(child)
    return roles


class Region:
    """The regions inside a model of whole features. within: what of one runs, which has taken the features of other ranks from its input
    and gives them back; None outside of a call, where each layer does so for itself (`for layer in self.net: x = layer(x)`)."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.within: torch.nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return self  # as hooks, which hold it

    def moved(self, x: Any, source: str, target: str, width: int) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() == 0:
            return x
        return relayout(x, self.mesh, self.mesh.layout(source), self.mesh.layout(target), width)

    def alone(self, call: Callable[..., Any], layer: Any, x: Any, *rest: Any, **options: Any) -> Any:
        """A layer that is called by other code than the region's."""
        source, _, target = layer.layout.partition("->")
        given, made = (layer.in_features, layer.out_features) if target else (x.shape[-1], x.shape[-1])
        self.within = layer
        try:
            y = call(layer, self.moved(x, "rows", source, given), *rest, **options)
        finally:
            self.within = None
        return self.moved(y, target or source, "rows", made)


def enter(made: Conversion, path: str, module: torch.nn.Module) -> Region | None:
    """A region inside a model of whole features: its input loses the features of other ranks, its output regains them, and the batch comes
    first within. So do the layers of a stack where they are called alone. None where the whole model is one, or nothing of this is so."""
    mesh, batch = made.mesh, batch_dim(module) if isinstance(module, STACKS) else 0
    if not path or mesh.outer == mesh.layout("rows") and not batch:
        return None
    region: Region = made.region or Region(mesh)
    made.region = region
    for each in module.modules():
        if each is module or isinstance(each, STACKS):
            _enter(each, region, batch)
    return region


def _enter(module: torch.nn.Module, region: Region, batch: int) -> None:
    """batch: the dim of the batch in what a stack is given and gives; inside it is the first."""

    def turned(x: Any) -> Any:
        return x.transpose(0, 1).contiguous() if batch and isinstance(x, torch.Tensor) and x.dim() == 3 else x

    def before(each: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if region.within is not None:
            return None
        region.within = each
        streams, taken = len(inputs.streams(each)), {"src", "tgt", "memory", "input"}

        def inside(x: Any) -> Any:
            return region.moved(turned(x), "rows", "outer", x.shape[-1]) if isinstance(x, torch.Tensor) and x.dim() else x

        return (
            tuple(inside(x) if index < streams else x for index, x in enumerate(args)),
            {name: inside(x) if name in taken else x for name, x in kwargs.items()},
        )

    def after(each: Any, args: Any, y: Any) -> Any:
        running: Any = region.within
        if running is not each:
            return None
        region.within = None
        return turned(region.moved(y, "outer", "rows", width_of(each)))

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, always_call=True)  # also where an error ends the call


def hold(module: torch.nn.Module, region: Region) -> None:
    """Tells the layers of a region, once they are made, that they are in one."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.LayerNorm | nn.RMSNorm | nn.Dropout):
            layer._region = region


def width_of(module: torch.nn.Module) -> int:
    """Features of a region's output."""
    linears = [each for each in module.modules() if isinstance(each, nn.Linear)]
    if isinstance(module, torch.nn.Sequential):
        return linears[-1].out_features
    return next(each.embed_dim for each in module.modules() if isinstance(each, attention.MultiheadAttention))
