"""What is put into a model after parallelize: adapters of peft beside converted linears are converted at the next call, any other module
with parameters of its own and any other parameter is named, since it would see a part of a batch and nobody would sum its gradients.
A parameter under a name that its module had when it was converted is cut where it is read, and may come at any time.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .. import nn
from ..checkpoint.state_dicts import accept_full
from . import identity
from .fused import FusedLinears
from .layers import convert_late
from .wrappers import adapter_roles

SIDES = ("lora_A", "lora_B")
LIBRARIES = ("gingham.", "transformers.", "torch.", "accelerate.", "peft.")
KNOWN = "_gingham_names"  # the attribute of a module that holds the names of the parameters that it had when it was converted


def fingerprint(model: torch.nn.Module) -> int:
    """Of the modules of a model, the names of their parameters and their hooks, which changes when one is put in or taken out."""
    found: list[int | str] = []
    seen: set[int] = set()
    left: list[torch.nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            found.append(id(module))
            if module._parameters:
                found += _names(module)
            if module._forward_hooks or module._forward_pre_hooks:
                found.append(len(module._forward_hooks) + len(module._forward_pre_hooks))
            left += module._modules.values()
    return hash(tuple(found))


def _names(module: torch.nn.Module) -> list[str]:
    return [name for name, parameter in module._parameters.items() if parameter is not None]


def note(model: torch.nn.Module) -> int:
    """Takes what a model now holds for what it was converted with, and returns its fingerprint."""
    for module in model.modules():
        vars(module)[KNOWN] = frozenset(_names(module))
    return fingerprint(model)


def hooked(model: torch.nn.Module) -> list[str]:
    """The paths of modules on which forward hooks of a caller's are, "" for the model itself."""
    found = []
    for path, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(not str(getattr(hook, "__module__", "")).startswith(LIBRARIES) for hook in hooks):
            found.append(path)
    return found


def look(model: torch.nn.Module, border: Any, crossed: bool) -> int:
    """Before a call: converts and tells what was put in since the fingerprint border.modules was taken, and gives the new one. crossed:
    whether calls have been. Raises NotImplementedError as adopt does."""
    now = fingerprint(model)
    if now != border.modules:
        now = adopt(model, border.mesh, border.body)
    if border.parted and (now != border.modules or not crossed):
        _tell_hooks(model, border.told)
    return now


def _tell_hooks(model: torch.nn.Module, told: set[str]) -> None:
    """Warns once of each forward hook inside of a model whose modules see a part of the samples or of their features."""
    for path in hooked(model):
        if path and f"hook {path}" not in told:
            told.add(f"hook {path}")
            warnings.warn(
                f"{path} of {type(model).__name__}: a forward hook gets this rank's part of samples and features, so that a loss or a"
                " statistic of them is this rank's only; return what it takes from the model's forward, whose outputs are whole",
                stacklevel=4,
            )


def adopt(model: torch.nn.Module, mesh: Any, body: str) -> int:
    """Converts adapters that were put beside converted linears, and returns the model's fingerprint. Raises NotImplementedError for other
    modules that came later, and for parameters."""
    for path, module in list(model.named_modules()):
        base = module._modules.get("base_layer")
        if isinstance(base, nn.Linear | FusedLinears) and any(side in module._modules for side in SIDES):
            _adapters(path, module, base, mesh)
            accept_full(module)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, DTensor) and name not in vars(module).get(KNOWN, ()):
                raise NotImplementedError(
                    f"{f'{path}.{name}'.lstrip('.')} of {type(module).__name__} was put into the model after parallelize and would see a"
                    f" part of each batch, on rank {mesh.rank} of {mesh.size}, and nobody would sum its gradient; put it in before (a"
                    " parameter that was there may be replaced by one of its name and shape)"
                )
    return note(model)


def _adapters(path: str, module: Any, base: Any, mesh: Any) -> None:
    layout: Any = base.q.layout if isinstance(base, FusedLinears) else base.layout  # type: ignore[union-attr]
    source, target = layout.split("->")
    role = "qkv" if isinstance(base, FusedLinears) else "rowwise" if source == "inner" else "keep"
    adapter_roles(path, module, role)  # refuses what reads weights
    between = target if source == "inner" else source
    old, new, names = {}, {}, {}
    for side, ends in zip(SIDES, (f"{source}->{between}", f"{between}->{target}"), strict=True):
        for name, layer in module._modules[side]._modules.items():
            if type(layer) is not torch.nn.Linear:
                continue
            made = convert_late(f"{path}.{side}.{name}", layer, mesh, ends, role == "qkv" and side == "lora_B")
            module._modules[side]._modules[name] = made
            for each, parameter in layer.named_parameters():
                old[id(parameter)], names[id(parameter)] = parameter, f"{path}.{side}.{name}.{each}"
                if each in made._parameters:
                    new[id(parameter)] = made._parameters[each]
    for dropouts in (module._modules.get("lora_dropout"),):
        for name, dropout in list(dropouts._modules.items()) if dropouts is not None else ():
            if type(dropout) is torch.nn.Dropout:
                dropouts._modules[name] = nn.Dropout(dropout.p, mesh=mesh, layout=source).train(dropout.training)  # type: ignore[union-attr]
    identity.keep(mesh, names, old.values(), new, (old,))
