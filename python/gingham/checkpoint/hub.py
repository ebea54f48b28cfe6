"""What a Hugging Face model says of the keys in its files: older names of its parameters, and keys to pass over."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

import torch

from .together import CheckpointError


def keys_in_files(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The model's own key of each key in the files: transformers renames parameters between versions, and its files keep
    the old names. Raises CheckpointError where a tensor would have to be computed (experts stacked into one), not renamed."""
    library = sys.modules.get("transformers")
    found = {name: name for name in sorted(names)}
    if library is None or not isinstance(model, library.PreTrainedModel):
        return found
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before transformers 5 files and models have the same names
        return found
    for rule in get_model_conversion_mapping(model):
        for name, key in found.items():
            renamed, matched = rule.rename_source_key(key)
            if matched is not None and hasattr(rule, "operations"):
                raise CheckpointError(f"{name}: {type(model).__name__} computes {renamed} from it; load it with from_pretrained instead")
            found[name] = renamed
    return found


def own_key(key: str, model: torch.nn.Module, by_key: dict[str, str]) -> str | None:
    """The file's name of a model's key, with or without the model's `base_model_prefix`; None where there is none."""
    prefix = getattr(model, "base_model_prefix", "")
    tries = [key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")] if prefix else [key]
    return next((by_key[name] for name in tries if name in by_key), None)


def ignored(model: torch.nn.Module, name: str) -> bool:
    """Whether the model wants a key of its files to be passed over."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
