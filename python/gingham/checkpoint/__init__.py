"""Saving and loading: from any grid to any grid, and to and from one process without a mesh.

`save` and `load` keep a training run (model, optimizer, scheduler, random numbers, step) in a folder that survives a kill
at any moment; `export_safetensors` and `import_safetensors` exchange a model's weights with other libraries.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from . import folders
from .state import EXTRA, Target, gathered, unpacked
from .tensors import SavePlanner, Whole, check, read
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
    no rank ever holds more than its own. The format is torch.distributed.checkpoint's. All files are on the disk before
    the checkpoint gets its name, so that a kill at any moment leaves the previous or this one to load. All ranks must see
    `path`.
    Raises CheckpointError, on every rank, naming the rank and the key or file that failed; PeerDied where a rank dies.
    Bytes: none counted; the ranks' plans (some hundred bytes a block) to all ranks.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: expected the number of checkpoints to keep, at least 1")
    ranks, what = Ranks(), f"gingham.save to {path}"
    temporary, final = ranks.first(what, lambda: folders.begin(Path(path).absolute()))
    try:
        _write(ranks, what, temporary, lambda: gathered(ranks, model, optimizer, {"scheduler": scheduler, "scaler": scaler}, step))
        ranks.first(what, lambda: folders.commit(temporary, final, keep))
    except CheckpointError:
        # every rank has stopped writing; what it wrote may be what filled the disk
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(ranks: Ranks, what: str, folder: Path, state: Callable[[], dict[str, Any]]) -> None:
    planner, writer = SavePlanner(), FileSystemWriter(folder, thread_count=1, sync_files=True)

    def plan() -> Any:
        planner.set_up_planner(state(), writer.storage_meta(), ranks.rank == 0)
        writer.set_up_storage_writer(ranks.rank == 0)
        return writer.prepare_local_plan(planner.create_local_plan())

    plans = ranks.together(what, plan)

    def merge() -> Any:
        merged, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(merged), metadata

    merged, metadata = ranks.first(what, merge)
    results = ranks.together(what, lambda: writer.write_data(planner.finish_plan(merged[ranks.rank]), planner).value())

    def finish() -> None:
        writer.finish(metadata, results)
        unseen = folders.damaged(folder, metadata)
        if unseen:
            raise CheckpointError(f"{'; '.join(unseen)}, as their ranks wrote: all ranks must write to one file system")

    ranks.first(what, finish)


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
    Everything is checked before the model is changed. Raises CheckpointError on every rank, naming rank and key, for keys
    missing in the checkpoint or left over in it, other shapes, and dtypes that the model's cannot hold exactly;
    strict=False loads what fits by name and casts (shapes must agree all the same).
    """
    ranks, what = Ranks(), f"gingham.load from {path}"
    folder = ranks.first(what, lambda: folders.newest(Path(path).absolute()))

    def prepare() -> tuple[Any, Any, Target]:
        reader = FileSystemReader(folder)
        metadata = reader.read_metadata()
        saved, extra = metadata.state_dict_metadata, {EXTRA: None}
        if EXTRA in saved:
            read(reader, metadata, extra)
        damaged = folders.damaged(folder, metadata) if ranks.rank == 0 else []
        if damaged:
            raise CheckpointError(f"{'; '.join(damaged)}: the checkpoint is damaged; an older one loads by its own folder's path")
        beside = {"scheduler": scheduler, "scaler": scaler}
        target = Target(ranks, model, optimizer, beside, saved, unpacked(extra[EXTRA]) if extra[EXTRA] else {}, strict)
        wrong = target.wrong + [
            reason
            for name, wanted in target.state.items()
            if name in saved and isinstance(wanted, Whole)
            for reason in check(name, saved[name], wanted, strict)
        ]
        if wrong:
            more = f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""
            raise CheckpointError("; ".join(wrong[:8]) + more)
        return reader, metadata, target

    prepared: list[tuple[Any, Any, Target]] = []
    ranks.together(what, lambda: prepared.append(prepare()))
    reader, metadata, target = prepared[0]
    ranks.together(f"{what} (the model may be half loaded)", lambda: read(reader, metadata, target.state))
    target.apply()
    return target.extra.get("step")
