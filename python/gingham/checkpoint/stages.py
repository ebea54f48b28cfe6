"""A model of which a rank holds the layers of its pipeline stages: what belongs to other stages, under the keys of the whole model.

gingham.pipeline leaves a note on the model, `_pipeline`, with `absent` (keys that only other stages hold), `first_keys` (of tied
parameters that are here under a later key only) and `holds(path)` (whether this rank's stages use a module).
"""

from __future__ import annotations

from typing import Any

import torch


def is_staged(model: torch.nn.Module) -> bool:
    """Whether other ranks hold what is not here."""
    note = _note(model)
    return note is not None and note.mesh.whole is not None


def _note(model: torch.nn.Module) -> Any:
    return getattr(model, "_pipeline", None)


def is_absent(model: torch.nn.Module, key: str) -> bool:
    """Whether a key of the whole model, or of an optimizer's state for it, belongs to other stages."""
    if not is_staged(model):
        return False
    absent, of = _note(model).absent, key.rpartition(".")[0]
    return key in absent or of in absent and of not in first_keys(model).values()


def absent(model: torch.nn.Module) -> set[str]:
    """The keys of the whole model that only other stages hold."""
    return set(_note(model).absent) if is_staged(model) else set()


def first_keys(model: torch.nn.Module) -> dict[str, str]:
    """Of tied parameters, by the keys that are here, the first that the whole model has."""
    return dict(_note(model).first_keys) if is_staged(model) else {}


def holds(model: torch.nn.Module, path: str) -> bool:
    return not is_staged(model) or bool(_note(model).holds(path))


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What is no tensor, of all ranks: modules by path from the stage that has them, parameters of each group of the optimizer in the
    stages' order."""
    first = parts[0]
    for part in parts[1:]:
        for name in ("dropout", "modules", "scalars"):
            first[name] = {**part[name], **first[name]}
        for group, other in zip(first["groups"] or [], part["groups"] or [], strict=True):
            group["params"] = list(dict.fromkeys([*group["params"], *other["params"]]))
    return first
