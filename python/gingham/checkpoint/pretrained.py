"""save_pretrained of a converted transformers model: the files that transformers writes of the original one, by the original keys.

Every rank calls it as every rank calls gingham.save; rank 0 gathers the full tensors and hands them to transformers' own method,
so that shards, tied weights, names of older versions and the configuration are its own. from_pretrained reads them anywhere.
"""

from __future__ import annotations

import inspect
import os
from types import MethodType
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .state_dicts import accept_full
from .tensors import plain_keys
from .together import Ranks
from .weights import full_tensors


def attach(model: torch.nn.Module) -> None:
    """Gives a converted model its load_state_dict for full tensors and, where it has the methods, save_pretrained over a mesh and a
    resize_token_embeddings that says when it can be called."""
    accept_full(model)
    method = getattr(type(model), "save_pretrained", None)
    if callable(getattr(model, "save_pretrained", None)) and not hasattr(method, "_gingham"):  # peft's gathers by itself
        model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]
    if callable(getattr(model, "resize_token_embeddings", None)):
        model.resize_token_embeddings = MethodType(resize_token_embeddings, model)  # type: ignore[assignment]


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    method: Any = None,
    **options: Any,
) -> None:
    """transformers' save_pretrained, called by every rank; rank 0 writes (unless its is_main_process is False) and holds the full
    model while it does. state_dict: full tensors to write in place of the model's; one of DTensors is the model's own and gathered.
    Bytes: every block that rank 0 lacks, sent to it once; not counted as traffic. Raises CheckpointError on every rank where one
    fails, NotImplementedError for options that transformers no longer has or that write per rank. method: the library's own."""
    method = method or type(model).save_pretrained
    if options.get("distributed_checkpoint"):
        raise NotImplementedError("save_pretrained: distributed_checkpoint=True on a gingham mesh; use gingham.save, or leave it out")
    if options.get("safe_serialization") is False and "safe_serialization" not in inspect.signature(method).parameters:
        raise NotImplementedError("save_pretrained: safe_serialization=False, but this transformers writes safetensors only; leave it out")
    what = f"{type(model).__name__}.save_pretrained to {save_directory}"
    ranks = Ranks(what, writes=True, of=model.parameters())
    if state_dict is None or any(isinstance(value, DTensor) for value in state_dict.values()):
        full = full_tensors(ranks, model)
        first: dict[tuple[int, ...], str] = {}
        names = {key: first.setdefault(tuple(id(part.tensor) for part in parts), key) for key, parts in plain_keys(model).items()}
        state_dict = {key: full[name] for key, name in names.items()} if ranks.rank == 0 else {}  # tied ones are one tensor
    ranks.first(what, lambda: method(model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **options))


def resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> Any:
    """The table as it is where nothing is asked; raises NotImplementedError for another size."""
    table = model.get_input_embeddings()
    size = table.weight.shape[0]
    asked = size if new_num_tokens is None else new_num_tokens
    asked = -(-asked // pad_to_multiple_of) * pad_to_multiple_of if pad_to_multiple_of else asked
    if asked != size:
        raise NotImplementedError(
            f"resize_token_embeddings({asked}) of a table of {size} rows that is cut over a mesh: call it before gingham.parallelize, and"
            " make the optimizer after it"
        )
    return table
