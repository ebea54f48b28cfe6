"""`python -m gingham ckpt inspect|verify|convert`: what lies in a checkpoint, whether it is whole, and folders to safetensors and
back, without ranks."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..checkpoint import blocks, folders
from ..checkpoint.reading import fill
from ..checkpoint.state import EXTRA, MODEL, extra_of, packed
from ..checkpoint.stored import Line, Stored
from ..checkpoint.tensors import SavePlanner, Whole
from ..checkpoint.together import CheckpointError
from ..checkpoint.weights import Files, size_of
from ..plan.tables import amount, fold, show


def add_arguments(parser: ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="inspect|verify|convert")
    inspect = commands.add_parser("inspect", help="keys, shapes, bytes, and the grid and step it was saved on")
    inspect.add_argument("path", type=Path, help="folder of checkpoints, one of them, or safetensors")
    verify = commands.add_parser("verify", help="reads every byte of a checkpoint and compares it with its checksums")
    verify.add_argument("path", type=Path, help="folder of checkpoints, or one of them")
    convert = commands.add_parser("convert", help="a checkpoint's weights to safetensors, or safetensors to a checkpoint")
    convert.add_argument("source", type=Path, help="what is read")
    convert.add_argument("target", type=Path, help="what is written")
    convert.add_argument("--shard-size", default="5GB", help="bytes of a safetensors file at most")


def run(options: Namespace) -> int:
    """The command; returns its exit code: 0, 1 for a damaged checkpoint, or 2 where a path holds nothing that can be used."""
    try:
        if options.action == "verify":
            return verify(options.path, Console())
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
    for left in folders.unfinished(path):
        console.print(f"{left.name}: not complete (being written, or its writer was killed); load does not look at it", markup=False)
    folder = folders.newest(path)
    for older in folders.complete(path)[:-1]:
        console.print(f"{older.name}: complete, older", markup=False)
    try:
        opened = blocks.open_checkpoint(folder)
        extra = extra_of(opened)
    except CheckpointError as error:
        console.print(f"{folder}: DAMAGED: {error}", markup=False)
        return 1
    metadata, grid = opened.metadata, extra.get("grid")
    on = " x ".join(f"{name} {size}" for name, size in grid.items()) if grid else "one process" if extra else "unknown"
    sums = "its blocks have checksums (ckpt verify compares them)" if opened.sums is not None else "it has no checksums"
    console.print(f"{folder}: complete, step {extra.get('step')}, saved on {on}; {sums}", markup=False)
    rows = [
        (name, saved.size, saved.properties.dtype, len(saved.chunks))
        for name, saved in metadata.state_dict_metadata.items()
        if isinstance(saved, TensorStorageMetadata)
    ]
    _show(console, folder.name, rows)
    for name in ("scheduler", "scaler", "groups", "scalars", "dropout", "modules"):
        if extra.get(name):
            console.print(f"{name}: {extra[name]}", markup=False)
    return 0


def verify(path: Path, console: Console) -> int:
    """Prints what is wrong and returns 1, or returns 0. Raises CheckpointError for a checkpoint without checksums."""
    folder, lock = folders.reading(folders.absolute(path))
    try:
        opened = blocks.open_checkpoint(folder)
        opened.verify()
        extra_of(opened)
    except CheckpointError as error:
        console.print(f"{folder}: DAMAGED: {error}", markup=False)
        return 1
    finally:
        if lock is not None:
            lock.release()
    if opened.sums is None:
        raise CheckpointError(f"{folder}: has no {folders.LOCK} to compare with: an earlier gingham or another tool wrote it")
    found = opened.blocks()
    console.print(f"{folder}: {len(found)} blocks, {sum(block[1] for _, block in found):,} bytes: all as written", markup=False)
    return 0


def _show(console: Console, title: str, rows: list[tuple[str, Any, Any, int]]) -> None:
    sizes = [shape.numel() * dtype.itemsize for _, shape, dtype, _ in rows]
    cells = [
        (name, " x ".join(map(str, shape)) or "-", str(dtype).removeprefix("torch."), amount(size), str(count))
        for (name, shape, dtype, count), size in zip(rows, sizes, strict=True)
    ]
    headings = ("key", "shape", "dtype", "bytes", "blocks")
    show(console, title, headings, fold(cells), headings[1:], (f"all {len(rows)}", "", "", amount(sum(sizes)), ""))


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("model*.safetensors*")))


def convert(source: Path, target: Path, shard_size: str, console: Console) -> None:
    """Weights from the one form into the other, one tensor in memory at a time."""
    if _is_safetensors(source):
        _to_checkpoint(source, target, console)
    elif target.is_dir() and ((target / folders.METADATA).is_file() or folders.complete(target)):
        # both would then be read as safetensors
        raise ValueError(f"{target}: holds checkpoints; expected another folder for safetensors")
    else:
        _to_safetensors(source, target, size_of(shard_size), console)


def _to_safetensors(source: Path, target: Path, limit: int, console: Console) -> None:
    folder, lock = folders.reading(folders.absolute(source))
    try:
        _write_weights(folder, target, limit, console)
    finally:
        if lock is not None:
            lock.release()


def _write_weights(folder: Path, target: Path, limit: int, console: Console) -> None:
    opened = blocks.open_checkpoint(folder)
    opened.verify()
    extra_of(opened)
    saved = opened.metadata.state_dict_metadata
    tensors = {name: value for name, value in saved.items() if isinstance(value, TensorStorageMetadata)}
    # a folder that torch.distributed.checkpoint wrote of a bare state_dict has no prefixes
    prefix = MODEL if any(name.startswith(MODEL) for name in tensors) else ""
    lines = [Line(name[len(prefix) :], of.size, of.properties.dtype) for name, of in tensors.items() if name.startswith(prefix)]
    files = Files(folders.absolute(target), lines, limit)
    try:
        files.begin()
        for line in files.lines:
            full = torch.empty(line.shape, dtype=line.dtype, device="cpu")
            fill(opened, {prefix + line.key: Whole(line.shape, line.dtype, {(0,) * len(line.shape): (line.shape, full)})})()
            files.add(line, full)
        files.commit()
    except BaseException:
        files.give_up()
        raise
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
    state[EXTRA] = packed({"format": blocks.FORMAT, "step": None})
    writing = folders.begin(folders.absolute(target))
    try:
        planner = SavePlanner()
        planner.set_up_planner(state, None, True)
        merged, metadata = planner.create_global_plan([planner.create_local_plan()])
        plan = replace(merged[0], storage_data=_StoragePrefix("__0_"))
        # one file a tensor: what was written of a file stays in memory until the disk has it
        blocks.finish(writing.folder, metadata, blocks.write(writing.folder, planner.finish_plan(plan), planner, limit=1))
        final = folders.commit(writing, keep=1 << 30)
    except BaseException:
        writing.give_up()
        raise
    console.print(f"{len(state) - 1} tensors of {source} to {final}", markup=False)
