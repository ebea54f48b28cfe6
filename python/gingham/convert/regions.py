"""Regions of a model without a rule whose inside may be cut along features: stacks of torch's transformer layers, chains of linears."""

from __future__ import annotations

from typing import Any

import torch

from .. import nn
from ..autograd.relayout import relayout
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


def enter(made: Conversion, path: str, module: torch.nn.Module) -> None:
    """A region inside a model of whole features: its input loses the features of other ranks, its output regains them."""
    mesh = made.mesh
    if not path or mesh.outer == mesh.layout("rows"):
        return
    if isinstance(module, STACKS) and batch_dim(module) != 0:
        raise NotImplementedError(f"{path}: {type(module).__name__} with batch_first=False inside another model; make it batch_first")

    def moved(x: Any, source: str, target: str) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() < 2:
            return x
        width = x.shape[-1] if source == "rows" else width_of(module)
        return relayout(x, mesh, mesh.layout(source), mesh.layout(target), width)

    def before(each: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        taken = {"src", "tgt", "memory", "input"}
        return (
            tuple(moved(x, "rows", "outer") if index < len(inputs.streams(module)) else x for index, x in enumerate(args)),
            {name: moved(x, "rows", "outer") if name in taken else x for name, x in kwargs.items()},
        )

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(lambda each, args, y: moved(y, "outer", "rows"))


def width_of(module: torch.nn.Module) -> int:
    """Features of a region's output."""
    linears = [each for each in module.modules() if isinstance(each, nn.Linear)]
    if isinstance(module, torch.nn.Sequential):
        return linears[-1].out_features
    return next(each.embed_dim for each in module.modules() if isinstance(each, attention.MultiheadAttention))
