"""What is put into a model after parallelize: adapters of peft beside converted linears are converted at the next call, anything else
with parameters of its own is named, since it would see a part of a batch and nobody would sum its gradients.
"""

from __future__ import annotations

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


def fingerprint(model: torch.nn.Module) -> int:
    """Of the modules of a model, which changes when one is put in or taken out."""
    return hash(tuple(map(id, model.modules())))


def adopt(model: torch.nn.Module, mesh: Any, body: str) -> None:
    """Converts adapters that were put beside converted linears. Raises NotImplementedError for other modules that came later."""
    for path, module in list(model.named_modules()):
        base = module._modules.get("base_layer")
        if isinstance(base, nn.Linear | FusedLinears) and any(side in module._modules for side in SIDES):
            _adapters(path, module, base, mesh)
            accept_full(module)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, DTensor):
                raise NotImplementedError(
                    f"{path}.{name} of {type(module).__name__} was put into the model after parallelize and would see a part of each batch,"
                    f" on rank {mesh.rank} of {mesh.size}; put it in before"
                )


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
