"""A model as parts in a row, and as stages: which of its modules each rank keeps.

A torch.nn.Sequential is the row of its children. Another model says its row by a method `in_a_row()`, which returns (function, modules)
pairs: the forward pass calls the functions one after the other, each with what the one before gave, and a function uses the modules
beside it. A parameter of several parts is tied: the stages that have it hold a copy each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MeshError
from ..launch.describe import describe
from ..plan.pipeline import balance
from ..plan.workload import Linears
from .families import BORDER, FAMILIES, family_of
from .given import Given


@dataclass(frozen=True)
class Part:
    run: Callable[[Any], Any]
    modules: Sequence[torch.nn.Module]


def parts_of(model: torch.nn.Module, given: Given) -> list[Part]:
    """given: what a converted model's parts take beside their input. Raises NotImplementedError for a model that is not known to be layers
    in a row, and for one that gingham.parallelize has converted and families.py does not know."""
    if hasattr(model, BORDER):
        family = family_of(model)
        if family is None:
            raise NotImplementedError(
                f"gingham.pipeline of a {type(model).__name__} that gingham.parallelize has converted: of these {', '.join(FAMILIES)}"
                " are known as layers in a row; build others of gingham.nn's layers"
            )
        return [Part(run, tuple(modules)) for run, modules in family.row(model, given)]
    row: Any = getattr(model, "in_a_row", None)
    if row is not None:
        return [Part(run, tuple(modules)) for run, modules in row()]
    if isinstance(model, torch.nn.Sequential):
        return [Part(child, (child,)) for child in model]
    raise NotImplementedError(
        f"gingham.pipeline of a {type(model).__name__}: it is not known to be layers in a row; expected a torch.nn.Sequential, or a model"
        " whose method in_a_row() returns [(function, [modules it uses]), ..], called one after the other by its forward"
    )


def flops(part: Part) -> float:
    """Of the linear maps of a part, forward, for one row."""
    found = 0
    for module in part.modules:
        for times, each in describe(module, 1, 1).parts:
            if isinstance(each, Linears):
                found += times * 2 * each.k * sum(each.n)
    return float(found)


def cut(model: torch.nn.Module, parts: Sequence[Part], stages: int) -> list[list[Part]]:
    """The parts of each stage, of about as many operations. Raises MeshError where there are fewer parts than stages, or where the parts'
    modules are not all of the model."""
    if len(parts) < stages:
        raise MeshError(f"gingham.pipeline: {len(parts)} layers in a row cannot make {stages} stages; use fewer pipeline ranks or stages")
    known = {id(parameter) for part in parts for module in part.modules for parameter in module.parameters()}
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if left:
        raise MeshError(f"gingham.pipeline: no part of the model's row has {left[:4]}: in_a_row() must name all modules that it uses")
    begins = balance([flops(part) for part in parts], stages)
    return [list(parts[begin:end]) for begin, end in zip(begins, begins[1:], strict=False)]


def tensors_of(parts: Sequence[Part]) -> Iterator[tuple[torch.nn.Module, str, torch.Tensor]]:
    """(module, name, tensor) of all parameters and buffers."""
    for part in parts:
        for outer in part.modules:
            for module in outer.modules():
                for held in (module._parameters, module._buffers):
                    for name, each in held.items():
                        if each is not None:
                            yield module, name, each


def drop(stages: Sequence[Sequence[Part]], kept: Sequence[int]) -> None:
    """Takes from the model what only other stages use, so that names stay and memory goes."""
    here = {id(module) for stage in kept for part in stages[stage] for outer in part.modules for module in outer.modules()}
    for stage in stages:
        for module, name, _ in list(tensors_of(stage)):
            if id(module) not in here:
                held = module._parameters if name in module._parameters else module._buffers
                held[name] = None  # type: ignore[assignment]


def tied(stages: Sequence[Sequence[Part]]) -> list[tuple[torch.nn.Parameter, list[int]]]:
    """Parameters that several stages use, with those stages; in the model's order."""
    users: dict[int, tuple[torch.nn.Parameter, list[int]]] = {}
    for number, stage in enumerate(stages):
        for _, _, each in tensors_of(stage):
            if isinstance(each, torch.nn.Parameter):
                found = users.setdefault(id(each), (each, []))[1]
                if number not in found:
                    found.append(number)
    return [(parameter, found) for parameter, found in users.values() if len(found) > 1]
