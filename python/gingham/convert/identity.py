"""Whoever held a parameter before parallelize holds what became of it: an optimizer made before goes on moving the model.

torch.utils.swap_tensors refuses a Parameter and a DTensor (their classes have different slots), so the holders are changed instead:
every list, dict, set and closure that has the old Parameter gets the new one, an optimizer's state with it, cut. A parameter that
becomes several (GPT-2's c_attn) has no one heir: an optimizer that still has it raises at its next step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from types import CellType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..mesh import Mesh
from .loose import cuts_of

GONE = "_gingham_name"  # on a Parameter that is no more in a model: its name there


@torch.no_grad()
def keep(mesh: Mesh, names: dict[int, str], old: Iterable[Any], new: dict[int, Any], own: Iterable[Any]) -> None:
    """Hands the new parameters to the holders of the old ones, with gradients, attributes and hooks.

    names: of the old ones by id; new: by the old one's id; own: containers that must keep the old ones. What holds one out of
    reach (a tuple, a local variable) and gives it to an optimizer gets a RuntimeError at the step.
    """
    heirs: dict[int, Any] = {}
    replaced = []
    for parameter in old:
        made = new.get(id(parameter))
        if made is parameter:
            continue
        replaced.append(parameter)
        setattr(parameter, GONE, names[id(parameter)])
        if made is not None:
            heirs[id(parameter)] = made
            _endow(mesh, parameter, made)
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_check_step))
    spared = {id(each) for each in own} | {id(replaced), id(heirs)}
    for holder in gc.get_referrers(*replaced) if replaced else ():
        if id(holder) not in spared:
            _hand_over(mesh, holder, heirs)


def _endow(mesh: Mesh, parameter: Any, made: Any) -> None:
    for name, value in vars(parameter).items():
        if name != GONE and name not in vars(made):
            setattr(made, name, value)
    if parameter.grad is not None and not parameter.grad.is_meta:
        made.grad = mesh.parameter(parameter.grad, cuts_of(mesh, made)).detach()
    for hook in (parameter._backward_hooks or {}).values():
        made.register_hook(hook)
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        made.register_post_accumulate_grad_hook(hook)


def _hand_over(mesh: Mesh, holder: Any, heirs: dict[int, Any]) -> None:
    if isinstance(holder, list):
        for index, each in enumerate(holder):
            if id(each) in heirs:
                holder[index] = heirs[id(each)]
    elif isinstance(holder, dict):
        for key, value in list(holder.items()):
            if id(key) in heirs:
                del holder[key]
                holder[heirs[id(key)]] = _state(mesh, key, value, heirs[id(key)])
            elif id(value) in heirs:
                holder[key] = heirs[id(value)]
    elif isinstance(holder, set):
        for each in [each for each in holder if id(each) in heirs]:
            holder.discard(each)
            holder.add(heirs[id(each)])
    elif isinstance(holder, CellType) and id(holder.cell_contents) in heirs:
        holder.cell_contents = heirs[id(holder.cell_contents)]


def _state(mesh: Mesh, parameter: Any, value: Any, made: Any) -> Any:
    """An optimizer's state of a parameter, tensors of its shape cut like it."""
    if not isinstance(value, dict):
        return value

    def cut(x: Any) -> Any:
        fits = isinstance(x, torch.Tensor) and x.dim() and x.shape == parameter.shape
        return mesh.parameter(x, cuts_of(mesh, made)).detach() if fits else x

    return {name: cut(x) for name, x in value.items()}


_watching: list[Any] = []


def _check_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = getattr(parameter, GONE, None)
            if name is not None:
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step: {name} was taken from the model before parallelize, which put other parameters in"
                    " its place (for a joined weight several, see `joins`), so that this one moves nothing; make the optimizer after"
                    " parallelize"
                )
