"""An optimizer's state_dict with the parameters of the original model, where a converted one holds one of them in parts.

GPT-2's c_attn.weight [in, 3 out] is held as q, k and v: three parameters of an optimizer, one of a plain process's. `joined`
makes one of three, for files that others read; Optimizer.load_state_dict takes either form. States as large as their
parameter are joined and split along the join's dim, numbers are the same for all parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import WeakSet, ref

import torch

_modules: WeakSet[torch.nn.Module] = WeakSet()


@dataclass(frozen=True)
class Slot:
    """A parameter of the original model: its parts' places among all of the optimizer's, in the join's order."""

    places: tuple[int, ...]
    dim: int = 0


class _Note:
    """Lies in a noted module, whose copies are noted too."""

    def __init__(self, module: torch.nn.Module | None = None) -> None:
        self.module = None if module is None else ref(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Note:
        copied = None if self.module is None else memo.get(id(self.module()))
        if isinstance(copied, torch.nn.Module):
            _modules.add(copied)
        return _Note(copied)

    def __reduce__(self) -> Any:
        return _Note, ()


def note(module: torch.nn.Module) -> None:
    """A module that has the attribute `joins`."""
    _modules.add(module)
    module.__dict__["_joins_noted"] = _Note(module)


def slots(optimizer: Any) -> list[list[Slot]]:
    """Of every group. Parts that do not all stand in one group are slots of their own."""
    part: dict[int, tuple[Any, int, int, int]] = {}
    for module in list(_modules):
        for key, (names, dim) in module.joins.items():  # type: ignore[operator,union-attr]
            for index, name in enumerate(names):
                part[id(module.get_parameter(name))] = ((id(module), key), index, len(names), dim)
    found: list[list[Slot]] = []
    place = 0
    for group in optimizer.param_groups:
        mine: dict[Any, list[tuple[int, int]]] = {}
        about: dict[Any, tuple[int, int]] = {}
        for parameter in group["params"]:
            key, index, count, dim = part.get(id(parameter), (place, 0, 1, 0))
            mine.setdefault(key, []).append((index, place))
            about[key] = count, dim
            place += 1
        whole: list[Slot] = []
        for key, places in mine.items():
            count, dim = about[key]
            if len(places) == count:
                whole.append(Slot(tuple(where for _, where in sorted(places)), dim))
            else:
                whole += [Slot((where,)) for _, where in places]
        found.append(whole)
    return found


def joined(state_dict: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A state_dict of `optimizer` by the parameters of the original model; as it is where no state of a part can be joined to others
    (a row or a column of means)."""
    groups = slots(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if all(len(slot.places) == 1 for group in groups for slot in group):
        return state_dict
    saved, state, number = state_dict["state"], {}, 0
    made = []
    for group, mine in zip(state_dict["param_groups"], groups, strict=True):
        made.append({**group, "params": list(range(number, number + len(mine)))})
        if "param_names" in group:
            first = group["params"][0] if group["params"] else 0
            made[-1]["param_names"] = [_named(slot, group["param_names"], first, parameters) for slot in mine]
        for slot in mine:
            parts = [saved[place] for place in slot.places if place in saved]
            if len(parts) == len(slot.places):
                if len(parts) > 1 and not all(_fits(part, parameters[place]) for part, place in zip(parts, slot.places, strict=True)):
                    return state_dict
                state[number] = {name: _cat([part[name] for part in parts], slot.dim) for name in parts[0]}
            number += 1
    return {**state_dict, "state": state, "param_groups": made}


def _named(slot: Slot, names: list[str], first: int, parameters: list[Any]) -> str:
    name = names[slot.places[0] - first]
    if len(slot.places) == 1:
        return name
    for module in list(_modules):
        for key, (parts, _) in module.joins.items():  # type: ignore[operator,union-attr]
            if module.get_parameter(parts[0]) is parameters[slot.places[0]]:
                return name.removesuffix(parts[0]) + key
    return name


def _fits(part: dict[str, Any], parameter: torch.Tensor) -> bool:
    return all(not isinstance(value, torch.Tensor) or not value.dim() or value.shape == parameter.shape for value in part.values())


def _cat(values: list[Any], dim: int) -> Any:
    first = values[0]
    if len(values) == 1 or not isinstance(first, torch.Tensor) or not first.dim():
        return first
    return torch.cat(values, dim)


def apart(state_dict: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A state_dict by the parameters of the original model for an optimizer that holds some in parts; others as they are."""
    groups = slots(optimizer)
    given = [len(group["params"]) for group in state_dict["param_groups"]]
    if given != [len(mine) for mine in groups] or all(len(slot.places) == 1 for mine in groups for slot in mine):
        return state_dict
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved, state, made, place = state_dict["state"], {}, [], 0
    for group, own, mine in zip(state_dict["param_groups"], optimizer.param_groups, groups, strict=True):
        more = {"param_names": own["param_names"]} if "param_names" in own and "param_names" in group else {}
        made.append({**group, **more, "params": list(range(place, place + len(own["params"])))})
        place += len(own["params"])
        for number, slot in zip(group["params"], mine, strict=True):
            if number in saved:
                sizes = [parameters[where].shape[slot.dim] if parameters[where].dim() else 1 for where in slot.places]
                pieces = {name: _split(value, sizes, slot.dim) for name, value in saved[number].items()}
                for index, where in enumerate(slot.places):
                    state[where] = {name: parts[index] for name, parts in pieces.items()}
    return {**state_dict, "state": state, "param_groups": made}


def _split(value: Any, sizes: list[int], dim: int) -> list[Any]:
    if len(sizes) > 1 and isinstance(value, torch.Tensor) and value.dim():
        return [part.contiguous() for part in value.split(sizes, dim)]
    return [value if index == 0 or not isinstance(value, torch.Tensor) else value.clone() for index in range(len(sizes))]


def _taking_either(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> Any:
        return load(self, apart(state_dict, self) if _modules else state_dict)

    return load_state_dict


torch.optim.Optimizer.load_state_dict = _taking_either(torch.optim.Optimizer.load_state_dict)  # type: ignore[method-assign]
