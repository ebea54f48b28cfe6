"""Where checkpoints stand so that a kill at any moment leaves one that loads.

path/00000007          complete: it got this name by a rename after all its files were on the disk
path/00000008          complete, newer
path/.writing-00000009 being written, or left by a process that was killed; the next save removes it
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from .together import CheckpointError

METADATA = ".metadata"  # torch.distributed.checkpoint writes it last
WRITING = ".writing-"


def complete(path: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    if not path.is_dir():
        return []
    found = [folder for folder in path.iterdir() if folder.name.isdigit() and (folder / METADATA).is_file()]
    return sorted(found, key=lambda folder: int(folder.name))


def newest(path: Path) -> Path:
    """The newest complete checkpoint of `path`, or `path` itself where it is one. Raises CheckpointError where there is none."""
    if (path / METADATA).is_file():
        return path
    found = complete(path)
    if not found:
        holds = sorted(entry.name for entry in path.iterdir())[:5] if path.is_dir() else "nothing: no such folder"
        raise CheckpointError(f"{path}: no complete checkpoint; expected a folder that gingham.save wrote, it holds {holds}")
    return found[-1]


def damaged(folder: Path, metadata: Any) -> list[str]:
    """Files of a checkpoint that are missing or shorter than what its metadata says lies in them."""
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in ends}
    return [f"{folder / name}: got {sizes[name]} bytes, expected {end}" for name, end in ends.items() if sizes[name] < end]


def begin(path: Path) -> tuple[Path, Path]:
    """(a new empty folder to write into, the name it gets when complete); what killed processes left is removed."""
    if (path / METADATA).is_file():
        raise CheckpointError(f"{path}: is a single checkpoint, expected a folder of checkpoints; save to another path")
    if not path.is_dir():
        path.mkdir(parents=True)
        sync(path.parent)
    for left in path.glob(f"{WRITING}*"):
        shutil.rmtree(left)
    taken = [int(entry.name) for entry in path.iterdir() if entry.name.isdigit()]
    name = f"{max(taken, default=0) + 1:08d}"
    temporary = path / f"{WRITING}{name}"
    temporary.mkdir()
    return temporary, path / name


def commit(temporary: Path, final: Path, keep: int) -> None:
    """Makes a written folder the newest checkpoint, then removes all but the last `keep`. The rename is the moment:
    before it the previous checkpoint is the newest, after it this one, and both are complete."""
    sync(temporary)
    os.rename(temporary, final)
    sync(final.parent)
    for old in complete(final.parent)[:-keep]:
        # a half-removed folder must not look complete, so it loses its name first
        gone = old.with_name(f"{WRITING}{old.name}")
        os.rename(old, gone)
        shutil.rmtree(gone)


def sync(folder: Path) -> None:
    """Flushes a folder's entries (names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
