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


# what transformers passes over in every model that has a buffer of that name (it was saved with the weights once)
FORMER_BUFFERS = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}


def ignored(model: torch.nn.Module, name: str, key: str) -> bool:
    """Whether a key of the model's files, `key` by today's name, is passed over: the model says so, or it is of a buffer that is
    computed, not saved."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    if hasattr(model, "base_model_prefix"):
        buffers = [buffer for buffer, _ in model.named_buffers()]
        patterns += [pattern for end, pattern in FORMER_BUFFERS.items() if any(buffer.endswith(end) for buffer in buffers)]
    if any(re.search(pattern, each) for pattern in patterns for each in (name, key)):
        return True
    computed = {
        f"{path}.{buffer}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for buffer in module._non_persistent_buffers_set
    }
    return any(own_key(buffer, model, {name: name, key: key}) is not None for buffer in computed)
