"""Caches of keys and values of transformers models, which hold this rank's rows."""

from __future__ import annotations

from typing import Any

import torch

from ..mesh import Mesh

REORDERING = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of keys and values, known by what it can do: transformers has called the argument and the field
    both past_key_values and cache."""
    return not isinstance(value, torch.Tensor | int | float | str) and any(callable(getattr(value, name, None)) for name in REORDERING)


def keep_rows(cache: Any, mesh: Mesh) -> None:
    """A cache holds this rank's rows: what moves rows by their number in the whole batch (beams) is refused."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "generation that reorders rows (beams, contrastive search) on a mesh that cuts rows; use greedy or sampling"
        )

    for name in REORDERING:
        if mesh.outer.rows and hasattr(cache, name):
            setattr(cache, name, refuse)
