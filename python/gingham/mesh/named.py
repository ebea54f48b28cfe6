"""The name of a layer or parameter in the model it is part of, looked for only when an error is to name it."""

from __future__ import annotations

import gc
from typing import Any

import torch

NODES = 64  # of an autograd graph that are looked at


def path_of(layer: torch.nn.Module) -> str:
    """The path from the outermost module that holds the layer, "" where none does."""
    return _path(layer, _modules())


def parameter_of(tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    """The parameter that the tensor is, is a view of, or is made of by differentiable operations, and its path: "blocks.0.fc1.weight",
    or "Linear.weight" where no module holds the layer. None where there is none."""
    modules = _modules()
    held = {id(p): (module, name) for module in modules for name, p in module._parameters.items() if p is not None}
    for leaf in leaves(tensor):
        if id(leaf) in held:
            layer, name = held[id(leaf)]
            return f"{_path(layer, modules) or type(layer).__name__}.{name}", leaf
    return None


def _modules() -> list[torch.nn.Module]:
    """All of this process; by type, since proxies of other packages do things when they are asked for their class."""
    return [each for each in gc.get_objects() if issubclass(type(each), torch.nn.Module) and "_modules" in vars(each)]


def _path(layer: torch.nn.Module, modules: list[torch.nn.Module]) -> str:
    owners: dict[int, tuple[torch.nn.Module, str]] = {}
    for module in modules:
        for name, child in module._modules.items():
            if child is not None:
                owners.setdefault(id(child), (module, name))
    names: list[str] = []
    seen = {id(layer)}
    while id(layer) in owners and id(owners[id(layer)][0]) not in seen:
        layer, name = owners[id(layer)]
        seen.add(id(layer))
        names.append(name)
    return ".".join(reversed(names))


def leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Of which it may be made: itself, what it is a view of, and the leaves of its graph, nearest first."""
    found = [each for each in (tensor, tensor._base) if each is not None]
    left: list[Any] = [tensor.grad_fn]
    for node in left:  # grows as it goes
        if node is None or len(left) > NODES:
            continue
        if hasattr(node, "variable"):
            found.append(node.variable)
        left += [each for each, _ in node.next_functions]
    return found
