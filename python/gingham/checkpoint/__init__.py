"""Saving and loading: from any grid to any grid, and to and from one process without a mesh.

`save` and `load` keep a training run (model, optimizer, scheduler, random numbers, step) in a folder that survives a kill
at any moment; `export_safetensors` and `import_safetensors` exchange a model's weights with other libraries.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StoragePrefix

from . import blocks, folders, state_dicts  # noqa: F401 (state_dicts lets load_state_dict take full tensors)
from .reading import fill
from .stages import is_staged
from .state import EXTRA, MODEL, RNG, Target, extra_of, extra_state, gathered
from .tensors import SavePlanner, Whole, check, missing_blocks
from .together import CheckpointError, Ranks
from .weights import export_safetensors, import_safetensors

__all__ = ["CheckpointError", "export_safetensors", "import_safetensors", "load", "save"]


def save(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    path: str | os.PathLike[str],
    scheduler: Any = None,
    step: int | None = None,
    keep: int = 2,
    scaler: Any = None,
) -> None:
    """Adds a complete checkpoint to the folder `path` and removes all but the last `keep`. Every rank calls it alike.

    Held are the model's parameters and persistent buffers, the optimizer's state and settings, the state_dict of scheduler
    and scaler (a GradScaler), the state of torch's CPU generator, the call numbers of gingham.nn.Dropout and `step`, under
    the keys of the original torch model. Every rank writes its own blocks, of replicas one rank does, into one file each;
    no rank ever holds more than its own. The format is torch.distributed.checkpoint's, and beside it checksums of every
    block. All files are on the disk before the checkpoint gets its name, so that a kill at any moment leaves the previous or
    this one to load; what killed processes left is removed by a later save. Several jobs may save into one folder (each
    keeps the last `keep` of all). All ranks must see `path`, and its file system should have locks (flock).
    Raises CheckpointError, on every rank, naming the rank and the key or file that failed, a full disk with the bytes that
    are needed; MeshError on a rank of several without a mesh (before init, after destroy); PeerDied where a rank dies.
    Bytes: none counted; the ranks' plans (some hundred bytes a block) to all ranks.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: expected the number of checkpoints to keep, at least 1")
    what = f"gingham.save to {path}"
    ranks = Ranks(what, writes=True, of=model.parameters())
    held = ranks.together(what, lambda: gathered(ranks, model, optimizer)[1]) if is_staged(model) else None

    def state() -> dict[str, Any]:
        tensors, part = gathered(ranks, model, optimizer)
        extra = {EXTRA: extra_state(ranks, held or [part], {"scheduler": scheduler, "scaler": scaler}, step)} if ranks.rank == 0 else {}
        return {**tensors, **extra}

    planner, merged, metadata = _plan(ranks, state)
    begun: list[folders.Writing] = []

    def begin() -> Path:
        begun.append(folders.begin(folders.absolute(path)))
        return begun[0].folder

    folder = ranks.first(what, begin)
    try:
        results = ranks.together(what, lambda: blocks.write(folder, planner.finish_plan(merged[ranks.rank]), planner))
        ranks.first(what, lambda: _finish(begun[0], metadata, results, keep))
    except CheckpointError:
        # every rank has stopped writing; what it wrote may be what filled the disk
        for writing in begun:
            writing.give_up()
        raise
    finally:
        for writing in begun:
            writing.lock.release()


def _plan(ranks: Ranks, state: Callable[[], dict[str, Any]]) -> tuple[SavePlanner, Any, Any]:
    """The planner, what each rank will write, and the metadata (of rank 0). Raises CheckpointError where that is not all."""
    planner = SavePlanner()

    def plan() -> Any:
        planner.set_up_planner(state(), None, ranks.rank == 0)
        return planner.create_local_plan()

    plans = ranks.together(ranks.what, plan)

    def merge() -> Any:
        lacking = missing_blocks(plans)
        if lacking:
            raise CheckpointError(f"{'; '.join(lacking[:8])}: the ranks that save do not hold the whole model")
        merged, metadata = planner.create_global_plan(plans)
        return [replace(part, storage_data=_StoragePrefix(f"__{rank}_")) for rank, part in enumerate(merged)], metadata

    return planner, *ranks.first(ranks.what, merge)


def _finish(writing: folders.Writing, metadata: Any, results: list[Any], keep: int) -> None:
    blocks.finish(writing.folder, metadata, [result for part in results for result in part])
    try:
        blocks.open_checkpoint(writing.folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}, as its ranks wrote: all ranks must write to one file system") from error
    folders.commit(writing, keep)


def load(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    path: str | os.PathLike[str],
    scheduler: Any = None,
    strict: bool = True,
    scaler: Any = None,
) -> int | None:
    """Loads the newest complete checkpoint of the folder `path` (or `path` itself, if it is one); returns save's `step`.

    The model may stand on any grid, or on none; each rank reads its blocks of what any grid wrote. With optimizer=None only
    the model is read. With an optimizer, its state and settings, scheduler, scaler, the generator and the dropout calls
    continue where they were: on the same grid to the bit. On another number of ranks all generators get rank 0's state.
    Everything is checked before the model is changed: every byte of the checkpoint against its checksums, and whether it fits;
    until then a rank holds its part of the model twice. A folder without checksums loads with a warning. Raises
    CheckpointError on every rank, naming rank and key, for damage, keys missing in the checkpoint or left over in it, other
    shapes, and dtypes that the model's cannot hold exactly; strict=False loads what fits by name and casts (shapes must
    agree all the same). No code that the files may hold is run, and no path in them leaves the folder.
    """
    what = f"gingham.load from {path}"
    ranks = Ranks(what, of=model.parameters())
    held: list[folders.Lock] = []

    def find() -> Path:
        folder, lock = folders.reading(folders.absolute(path))
        held.extend([lock] if lock is not None else [])
        return folder

    try:
        folder = ranks.first(what, find)
        prepared: list[tuple[blocks.Opened, Target, Callable[[], None]]] = []
        beside = {"scheduler": scheduler, "scaler": scaler}
        ranks.together(what, lambda: prepared.append(_prepare(ranks, folder, model, optimizer, beside, strict)))
        opened, target, fill_model = prepared[0]
        if opened.sums is None:
            warnings.warn(
                f"gingham.load: {folder} has no {folders.LOCK}: an earlier gingham or another tool wrote it, damage would go unseen",
                stacklevel=2,
            )
        fill_model()
        target.apply()
        return target.extra.get("step")
    finally:
        for lock in held:
            lock.release()


def _prepare(ranks: Ranks, folder: Path, model: torch.nn.Module, optimizer: Any, beside: dict[str, Any], strict: bool) -> Any:
    """The checkpoint, what it fills, and what fills the model, once everything has been looked at: whether it fits, and every sum.
    What is the optimizer's has been read into tensors that it gets at the end."""
    opened = blocks.open_checkpoint(folder)
    saved = opened.metadata.state_dict_metadata
    target = Target(ranks, model, optimizer, beside, saved, extra_of(opened), strict)
    wrong = target.wrong + [
        reason
        for name, wanted in target.state.items()
        if name in saved and isinstance(wanted, Whole)
        for reason in check(name, saved[name], wanted, strict)
    ]
    if wrong:
        more = f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""
        raise CheckpointError("; ".join(wrong[:8]) + more)
    alike = not is_staged(model)  # ranks look at other keys, so that each must see to its share of all
    opened.verify(ranks.rank, ranks.size, lambda key: key == EXTRA or alike and key != RNG and key in target.state)
    return opened, target, fill(opened, target.state, lambda key: not key.startswith(MODEL))
