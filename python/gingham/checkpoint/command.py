"""`python -m gingham ckpt inspect|convert`: what lies in a checkpoint, and folders to safetensors and back, without ranks."""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from . import folders
from .state import EXTRA, MODEL, unpacked
from .tensors import SavePlanner, Whole, read
from .together import CheckpointError
from .weights import Files, Line, Stored, size_of


def add_arguments(parser: ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="inspect|convert")
    inspect = commands.add_parser("inspect", help="keys, shapes, bytes, and the grid and step it was saved on")
    inspect.add_argument("path", type=Path)
    convert = commands.add_parser("convert", help="a checkpoint's weights to safetensors, or safetensors to a checkpoint")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    convert.add_argument("--shard-size", default="5GB", help="bytes of a safetensors file at most")


def run(options: Namespace) -> int:
    """The command; returns its exit code: 0, or 2 where a path holds nothing that can be used."""
    try:
        if options.action == "inspect":
            return inspect(options.path, Console())
        convert(options.source, options.target, options.shard_size, Console())
    except (CheckpointError, OSError, ValueError) as error:
        print(f"gingham ckpt: {error}", file=sys.stderr)
        return 2
    return 0


def inspect(path: Path, console: Console) -> int:
    if _is_safetensors(path):
        lines = Stored(path).lines()
        _show(console, f"{path}: safetensors", [(key, line.shape, line.dtype, 1) for key, line in lines.items()])
        return 0
    unfinished = sorted(path.glob(f"{folders.WRITING}*")) if path.is_dir() else []
    for folder in unfinished:
        console.print(f"{folder.name}: not complete (being written, or its writer was killed); load does not look at it", markup=False)
    folder = folders.newest(path)
    for older in folders.complete(path)[:-1]:
        console.print(f"{older.name}: complete, older", markup=False)
    metadata, extra = _opened(folder)
    grid = extra.get("grid")
    on = " x ".join(f"{name} {size}" for name, size in grid.items()) if grid else "one process" if extra else "unknown"
    missing = folders.damaged(folder, metadata)
    console.print(f"{folder}: {'complete' if not missing else 'DAMAGED'}, step {extra.get('step')}, saved on {on}", markup=False)
    for text in missing:
        console.print(text, markup=False)
    rows = [
        (name, saved.size, saved.properties.dtype, len(saved.chunks))
        for name, saved in metadata.state_dict_metadata.items()
        if isinstance(saved, TensorStorageMetadata)
    ]
    _show(console, folder.name, rows)
    for name in ("scheduler", "scaler", "groups", "scalars", "dropout", "modules"):
        if extra.get(name):
            console.print(f"{name}: {str(extra[name])[:200]}", markup=False)
    return 1 if missing else 0


def _show(console: Console, title: str, rows: list[tuple[str, Any, Any, int]]) -> None:
    table = Table(title=title)
    table.add_column("key", overflow="fold")
    for heading in ("shape", "dtype", "bytes", "blocks"):
        table.add_column(heading, justify="right")
    total = 0
    for name, shape, dtype, blocks in rows:
        size = shape.numel() * dtype.itemsize
        total += size
        table.add_row(name, " x ".join(map(str, shape)) or "-", str(dtype).removeprefix("torch."), f"{size:,}", str(blocks))
    table.add_section()
    table.add_row(f"all {len(rows)}", "", "", f"{total:,}", "")
    console.print(table)


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("model*.safetensors*")))


def _opened(folder: Path) -> tuple[Metadata, dict[str, Any]]:
    reader = FileSystemReader(folder)
    metadata, extra = reader.read_metadata(), {EXTRA: None}
    if EXTRA not in metadata.state_dict_metadata:
        return metadata, {}
    read(reader, metadata, extra)
    return metadata, unpacked(extra[EXTRA])  # type: ignore[arg-type]


def convert(source: Path, target: Path, shard_size: str, console: Console) -> None:
    """Weights from the one form into the other, one tensor in memory at a time."""
    if _is_safetensors(source):
        _to_checkpoint(source, target, console)
    else:
        _to_safetensors(source, target, size_of(shard_size), console)


def _to_safetensors(source: Path, target: Path, limit: int, console: Console) -> None:
    folder = folders.newest(source)
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    saved = metadata.state_dict_metadata
    tensors = {name: value for name, value in saved.items() if isinstance(value, TensorStorageMetadata)}
    # a folder that torch.distributed.checkpoint wrote of a bare state_dict has no prefixes
    prefix = MODEL if any(name.startswith(MODEL) for name in tensors) else ""
    lines = [Line(name[len(prefix) :], of.size, of.properties.dtype) for name, of in tensors.items() if name.startswith(prefix)]
    files = Files(target.absolute(), lines, limit)
    files.begin()
    for line in files.lines:
        full = torch.empty(line.shape, dtype=line.dtype)
        read(reader, metadata, {prefix + line.key: Whole(line.shape, line.dtype, {(0,) * len(line.shape): (line.shape, full)})})
        files.add(line, full)
    files.commit()
    console.print(f"{len(lines)} tensors of {folder} to {target}", markup=False)
    left = [name for name in saved if not name.startswith(prefix)]
    if left:
        kinds = sorted({name.split(".")[0] for name in left})
        console.print(f"left out, safetensors holds weights only: {len(left)} entries of {', '.join(kinds)}", markup=False)


def _to_checkpoint(source: Path, target: Path, console: Console) -> None:
    stored = Stored(source)
    state: dict[str, Any] = {}
    for key, line in stored.lines().items():
        place = (0,) * len(line.shape)
        state[MODEL + key] = Whole(line.shape, line.dtype, {place: (line.shape, partial(stored.read, key, place, line.shape))})
    temporary, final = folders.begin(target.absolute())
    # one file a tensor: torch's writer keeps what it has written to a file until the file is done
    planner, writer = SavePlanner(), FileSystemWriter(temporary, single_file_per_rank=False, sync_files=True)
    planner.set_up_planner(state, writer.storage_meta(), True)
    writer.set_up_storage_writer(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = writer.prepare_local_plan(planner.create_local_plan())
    merged, metadata = planner.create_global_plan([plan])
    results = writer.write_data(planner.finish_plan(writer.prepare_global_plan(merged)[0]), planner).value()
    writer.finish(metadata, [results])
    folders.commit(temporary, final, keep=1 << 30)
    console.print(f"{len(state)} tensors of {source} to {final}", markup=False)
