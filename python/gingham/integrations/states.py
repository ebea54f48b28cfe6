"""What a tool's checkpoint files hold of a model on a mesh: full tensors, as one process would write them, and the masks' numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from ..checkpoint.optimizer_states import joined
from ..checkpoint.state import dropouts
from ..checkpoint.tensors import plain_keys
from ..checkpoint.together import Ranks
from ..checkpoint.weights import full_tensors

CALLS = "gingham_dropout.json"


def full_model(model: torch.nn.Module, what: str) -> dict[str, torch.Tensor]:
    """The model's full tensors by the original's keys on rank 0, {} elsewhere. Every rank calls it."""
    ranks = Ranks(what, writes=True, of=model.parameters())
    full = full_tensors(ranks, model)
    first: dict[tuple[int, ...], str] = {}
    names = {key: first.setdefault(tuple(id(part.tensor) for part in parts), key) for key, parts in plain_keys(model).items()}
    return {key: full[name] for key, name in names.items()} if ranks.rank == 0 else {}


class FullState:
    """An optimizer's state_dict() with full tensors on rank 0, the same for other ranks but without their values.

    Every rank makes it; gathers one tensor at a time. A weight stored as one and held as three (GPT-2's c_attn) has one entry."""

    def __init__(self, optimizer: Any, rank: int) -> None:
        found = pytree.tree_map_only(DTensor, lambda tensor: _full(tensor, rank), optimizer.state_dict())
        self.state = joined(found, optimizer) if rank == 0 else found

    def state_dict(self) -> dict[str, Any]:
        return self.state


def _full(tensor: DTensor, rank: int) -> torch.Tensor | None:
    full = tensor.full_tensor()
    return full.clone() if rank == 0 else None


def write_calls(model: torch.nn.Module, folder: Any, rank: int) -> None:
    """How often each dropout has drawn, without which a resumed run draws the masks of its first steps again."""
    calls = {path: (module.name, module.calls) for path, module in dropouts(model)}
    if rank == 0 and calls:
        (Path(folder) / CALLS).write_text(json.dumps(calls))


def read_calls(model: torch.nn.Module, folder: Any) -> None:
    file = Path(folder) / CALLS
    if file.is_file():
        calls = json.loads(file.read_text())
        for path, module in dropouts(model):
            if path in calls:
                module.name, module.calls = calls[path]


def wait(what: str) -> None:
    """Until every rank is here: what rank 0 wrote can be read. Raises PeerDied where one is gone."""
    Ranks(what).tell(None)
