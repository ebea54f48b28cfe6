"""The name of a layer in the model it is part of, looked for only when an error is to name it."""

from __future__ import annotations

import gc

import torch


def path_of(layer: torch.nn.Module) -> str:
    """The path from the outermost module that holds the layer, "" where none does."""
    names: list[str] = []
    seen = {id(layer)}
    while True:
        owner = _owner(layer)
        if owner is None or id(owner[0]) in seen:
            return ".".join(reversed(names))
        layer, name = owner
        seen.add(id(layer))
        names.append(name)


def _owner(layer: torch.nn.Module) -> tuple[torch.nn.Module, str] | None:
    for held in gc.get_referrers(layer):
        if not isinstance(held, dict):
            continue
        name = next((key for key, value in held.items() if value is layer and isinstance(key, str)), None)
        if name is None:
            continue
        for state in gc.get_referrers(held):
            if isinstance(state, torch.nn.Module) and state._modules is held:
                return state, name
            if isinstance(state, dict) and state.get("_modules") is held:
                for module in gc.get_referrers(state):
                    if isinstance(module, torch.nn.Module) and module.__dict__ is state:
                        return module, name
    return None
