"""load_state_dict with the full tensors of a torch model: each rank keeps its block.

A state dict of torch.nn's model, of DTensors, or of both fits a layer or a converted model on a mesh, keys and shapes as torch
wants them: a full tensor is cut to the block of the parameter that it meets, a weight that the model holds in pieces (`joins`) is
taken apart first, in an optimizer's state_dict too (optimizer_states). Of an optimizer, states as large as their parameter are cut
before its next step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..mesh import mesh_of
from . import optimizer_states
from .tensors import block_of


def accept_full(model: torch.nn.Module) -> None:
    """Makes load_state_dict of every module in a model take full tensors for parameters that are cut, and joined ones."""
    for module in model.modules():
        if hasattr(module, "joins"):
            optimizer_states.note(module)
        if hasattr(module, "joins") or any(isinstance(parameter, DTensor) for parameter in module._parameters.values()):
            _accept(module)


def _accept(module: torch.nn.Module) -> None:
    if "_takes_full" not in module.__dict__:
        module.__dict__["_takes_full"] = True
        module.register_load_state_dict_pre_hook(_cut_entries)


def _accept_new(module: torch.nn.Module, name: str, parameter: Any) -> None:
    """torch calls it for each parameter that a module gets: those of our mesh make theirs take full tensors."""
    if isinstance(parameter, DTensor) and mesh_of(parameter) is not None:
        _accept(module)


def _cut_entries(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    _take_apart(module, state_dict, prefix)
    for name, parameter in module._parameters.items():
        given = state_dict.get(prefix + name)
        if isinstance(parameter, DTensor) and _is_full(given, parameter):
            state_dict[prefix + name] = cut_like(given, parameter, own=bool(metadata.get("assign_to_params_buffers")))


def _take_apart(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    for key, (names, dim) in getattr(module, "joins", {}).items():
        given = state_dict.get(prefix + key)
        if not isinstance(given, torch.Tensor) or any(prefix + name in state_dict for name in names):
            continue
        shapes = [module.get_parameter(name).shape for name in names]
        sizes = [shape[dim] for shape in shapes]
        joined = [*shapes[0][:dim], sum(sizes), *shapes[0][dim + 1 :]]
        if list(given.shape) != joined:
            found, expected = tuple(given.shape), tuple(joined)
            raise RuntimeError(
                f"size mismatch for {prefix + key}: copying a tensor of shape {found}, the shape in current model is {expected}"
            )
        full = given.full_tensor() if isinstance(given, DTensor) else given
        state_dict.update(zip((prefix + name for name in names), full.split(sizes, dim), strict=True))
        del state_dict[prefix + key]


def _is_full(given: Any, parameter: DTensor) -> bool:
    return isinstance(given, torch.Tensor) and not isinstance(given, DTensor) and given.shape == parameter.shape


@torch.no_grad()
def cut_like(full: torch.Tensor, parameter: DTensor, own: bool) -> DTensor:
    """A full tensor cut as `parameter` is, in its own dtype; own: with memory of its own, which the ranks share where they can."""
    offsets, held = block_of("a parameter", parameter)
    local = full.detach()[tuple(slice(start, start + length) for start, length in zip(offsets, held.shape, strict=True))]
    if own:
        mesh = mesh_of(parameter)
        local = (mesh.empty(local.shape, local.dtype) if mesh is not None else torch.empty_like(held, dtype=local.dtype)).copy_(local)
    shape, stride = parameter.shape, torch.empty(parameter.shape, device="meta").stride()
    local = local.to(held.device)
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride)


def _cut_states(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """torch calls it before a step of any optimizer: load_state_dict gives the optimizer a new `state`, whose full tensors are cut."""
    if optimizer.__dict__.get("_looked_at") is optimizer.state:
        return
    for parameter, values in optimizer.state.items():
        if isinstance(parameter, DTensor):
            whole = {name: value for name, value in values.items() if _is_full(value, parameter) and value.dim()}
            values.update({name: cut_like(value, parameter, own=True) for name, value in whole.items()})
    optimizer.__dict__["_looked_at"] = optimizer.state


register_module_parameter_registration_hook(_accept_new)
register_optimizer_step_pre_hook(_cut_states)
