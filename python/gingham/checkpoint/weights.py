"""Weights as Hugging Face keeps them: model.safetensors, or model-00001-of-00003.safetensors and an index of which key is where.

Export brings one tensor at a time to rank 0, which appends it to its file; import reads this rank's blocks only. So no
process ever holds more than its own blocks and one tensor. safetensors' own writer wants a whole file's tensors at once,
hence the dozen lines that write its format here: 8 bytes of header length, a JSON header of dtype, shape and offsets by
key, then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from fcntl import LOCK_SH
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from ..mesh.carried import on_host
from . import folders, hub, stages
from .blocks import Summed
from .metadata import uncovered
from .stages import is_staged
from .stored import DTYPES, INDEX, NAMES, SINGLE, Line, Stored
from .tensors import Offsets, Part, Whole, check_dtype, plain_keys, whole_of
from .together import CheckpointError, Ranks

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Files:
    """A set of files being written in a folder of its own beside the ones they replace. `lines` in the order in which tensors must
    be added."""

    def __init__(self, path: Path, lines: Iterable[Line], limit: int) -> None:
        self.single = path if path.suffix == ".safetensors" else None
        self.folder = path.parent if self.single else path
        self.shards = _shards(lines, 1 << 62 if self.single else limit)
        self.lines = [line for shard in self.shards for line in shard]
        self._open: Summed | None = None
        self._writing: folders.Writing | None = None
        self._starts = {shard[0].key: index for index, shard in enumerate(self.shards) if shard}

    def name(self, index: int) -> str:
        if self.single:
            return self.single.name
        return SINGLE if len(self.shards) == 1 else f"model-{index + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def begin(self) -> None:
        for line in self.lines:
            if line.dtype not in NAMES:
                raise CheckpointError(f"{line.key}: is {line.dtype}, which safetensors files cannot hold; expected one of {list(DTYPES)}")
        self._writing = folders.begin(self.folder, "export")
        if not self.lines:
            self._start(0)

    def _new(self, name: str) -> Summed:
        assert self._writing is not None
        return Summed(self._writing.folder / name, f"{sum(line.bytes for line in self.lines):,} bytes of weights")

    def _start(self, index: int) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for line in self.shards[index]:
            header[line.key] = {"dtype": NAMES[line.dtype], "shape": list(line.shape), "data_offsets": [offset, offset + line.bytes]}
            offset += line.bytes
        packed = json.dumps(header, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)
        self._finish()
        self._open = self._new(self.name(index))
        self._open.write(len(packed).to_bytes(8, "little") + packed)

    def _finish(self) -> None:
        if self._open is not None:
            self._open.finish()
            self._open = None

    def add(self, line: Line, tensor: torch.Tensor) -> None:
        if line.key in self._starts:
            self._start(self._starts[line.key])
        assert self._open is not None
        self._open.write(_bytes_of(tensor).numpy().data)

    def give_up(self) -> None:
        """Removes what was written of a set that is not complete."""
        if self._open is not None:
            self._open.abandon()
        if self._writing is not None:
            self._writing.give_up()

    def commit(self) -> None:
        """Gives the files their names, the index last, and removes an earlier export's that are no longer part of the set. Exports
        of several jobs into one folder do so one after the other: the last one's set is what stays."""
        self._finish()
        assert self._writing is not None
        written = [self.name(index) for index in range(len(self.shards))]
        if not self.single and len(self.shards) > 1:
            places = {line.key: self.name(index) for index, shard in enumerate(self.shards) for line in shard}
            total = {"total_size": sum(line.bytes for line in self.lines)}
            index = self._new(INDEX)
            index.write(json.dumps({"metadata": total, "weight_map": places}, indent=2, sort_keys=True).encode())
            index.finish()
            written.append(INDEX)
        with folders.turn(self.folder):
            for name in written:
                os.replace(self._writing.folder / name, self.folder / name)
            if not self.single:
                for old in [*self.folder.glob("model-*-of-*.safetensors"), self.folder / SINGLE, self.folder / INDEX]:
                    if old.name not in written:
                        old.unlink(missing_ok=True)
            folders.sync(self.folder)
        self._writing.give_up()


def _shards(lines: Iterable[Line], limit: int) -> list[list[Line]]:
    """Lines packed in order into files of at most `limit` bytes; in a file wide dtypes go first, which keeps all aligned."""
    shards: list[list[Line]] = [[]]
    held = 0
    for line in lines:
        if shards[-1] and held + line.bytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(line)
        held += line.bytes
    return [sorted(shard, key=lambda line: -line.dtype.itemsize) for shard in shards]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def size_of(text: int | str) -> int:
    """Bytes of 5000000000 or "5GB". Raises ValueError."""
    found = re.fullmatch(r"(\d+) ?([KMGT]?B?)", str(text).upper())
    if not found or (found[2] or "") not in UNITS or int(found[1]) < 1:
        raise ValueError(f"shard_size={text!r}: expected bytes, or a number and KB, MB, GB or TB")
    return int(found[1]) * UNITS[found[2]]


def export_safetensors(model: torch.nn.Module, path: str | os.PathLike[str], shard_size: int | str = "5GB") -> None:
    """Writes the model's weights under plain torch keys, in Hugging Face's file layout, into the folder `path` (or into one
    file, where path ends in .safetensors). Every rank calls it; rank 0 writes, holding one full tensor at a time.

    shard_size: bytes of a file at most (one larger tensor has a file of its own). A tensor with two keys is written under
    its first. Bytes: every block that rank 0 lacks, sent to it once; not counted as traffic. Raises CheckpointError on
    every rank where one fails.
    """
    what = f"gingham.export_safetensors to {path}"
    _refuse_stages(what, model)
    ranks = Ranks(what, writes=True, of=model.parameters())
    limit = size_of(shard_size)
    wholes, tables = _described(ranks, model)
    made: list[Files] = []

    def begin() -> list[Line]:
        made.append(Files(folders.absolute(path), [Line(key, whole.shape, whole.dtype) for key, whole in wholes.items()], limit))
        made[0].begin()
        return made[0].lines

    try:
        for line in ranks.first(what, begin):
            tensor = _to_rank_0(ranks, line, wholes[line.key], [table[line.key] for table in tables])
            ranks.first(what, lambda line=line, tensor=tensor: made[0].add(line, tensor))  # type: ignore[misc]
        ranks.first(what, lambda: made[0].commit())
    except BaseException:
        for files in made:
            files.give_up()
        raise


def _refuse_stages(what: str, model: torch.nn.Module) -> None:
    if is_staged(model):
        raise NotImplementedError(
            f"{what}: a rank of a pipeline holds its stages only; export by gingham.save and then"
            " `python -m gingham ckpt convert`, or gingham.load into a model without a pipeline"
        )


def full_tensors(ranks: Ranks, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's full tensors by plain key on rank 0, those with several keys under the first; {} on the other ranks."""
    wholes, tables = _described(ranks, model)
    lines = [Line(key, whole.shape, whole.dtype) for key, whole in wholes.items()]
    found = {line.key: _to_rank_0(ranks, line, wholes[line.key], [table[line.key] for table in tables]) for line in lines}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def _described(ranks: Ranks, model: torch.nn.Module) -> tuple[dict[str, Whole], list[dict[str, list[tuple[Offsets, torch.Size]]]]]:
    """This rank's tensors by their first key, and every rank's blocks of each. Raises CheckpointError where they are not the whole."""
    wholes: dict[str, Whole] = {}

    def describe() -> dict[str, list[tuple[Offsets, torch.Size]]]:
        seen: set[tuple[int, ...]] = set()
        for key, parts in plain_keys(model).items():
            tensors = tuple(id(part.tensor) for part in parts)
            if tensors not in seen:
                wholes[key] = whole_of(key, parts)
                seen.add(tensors)
        return {key: [(place, lengths) for place, (lengths, _) in whole.chunks.items()] for key, whole in wholes.items()}

    tables = ranks.together(ranks.what, describe)

    def check() -> None:
        lacking = [reason for key, whole in wholes.items() for reason in _lacking(key, whole, [table[key] for table in tables])]
        if lacking:
            raise CheckpointError(f"{'; '.join(lacking[:8])}: the ranks do not hold the whole model")

    ranks.together(ranks.what, check)
    return wholes, tables


def _lacking(key: str, whole: Whole, table: list[list[tuple[Offsets, torch.Size]]]) -> list[str]:
    blocks = {place: lengths for held in table for place, lengths in held}
    chunks = [ChunkStorageMetadata(torch.Size(place), lengths) for place, lengths in blocks.items()]
    return uncovered(key, TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, chunks))


def _to_rank_0(ranks: Ranks, line: Line, whole: Whole, table: list[list[tuple[Offsets, torch.Size]]]) -> torch.Tensor | None:
    """The full tensor on rank 0, None elsewhere; of the ranks that hold the same block the lowest sends it."""
    owner = {place: (rank, lengths) for rank in reversed(range(ranks.size)) for place, lengths in table[rank]}
    arrived: list[torch.Tensor] = []
    coming = [(rank, place, lengths) for place, (rank, lengths) in owner.items() if rank != 0]
    blocks: dict[Offsets, torch.Tensor] = {}
    if ranks.wide is not None:
        for told in ranks.tell({place: whole.tensor(place).cpu() for rank, place, _ in coming if rank == ranks.rank}):
            blocks |= told
        coming = []
    elif ranks.mesh is not None and coming:
        sends = [(0, _view_bytes(whole.tensor(place))) for rank, place, _ in coming if rank == ranks.rank]
        receives = [(rank, [lengths.numel() * line.dtype.itemsize]) for rank, _, lengths in coming] if ranks.rank == 0 else []
        arrived = ranks.mesh.world.exchange(sends, receives, "uint8", counted=False)
    if ranks.rank != 0:
        return None
    full = torch.empty(line.shape, dtype=line.dtype, device="cpu")
    blocks |= {place: whole.tensor(place) for place in whole.chunks}
    for (_, place, lengths), received in zip(coming, arrived, strict=True):
        assert ranks.mesh is not None
        blocks[place] = on_host(ranks.mesh, received).view(line.dtype).view(lengths)
    for place, held in blocks.items():
        _narrowed(full, place, held.shape).copy_(held)
    return full


def _view_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _narrowed(full: torch.Tensor, place: Offsets, lengths: torch.Size) -> torch.Tensor:
    return full[tuple(slice(start, start + length) for start, length in zip(place, lengths, strict=True))]


def import_safetensors(model: torch.nn.Module, path: str | os.PathLike[str], strict: bool = True) -> None:
    """Fills the model from safetensors files with plain torch keys, such as Hugging Face's save_pretrained writes: a folder
    or one file. Every rank reads its own blocks and nothing else, of a pipeline those of its stages. Bytes between ranks: none.

    Keys may carry or lack the model's `base_model_prefix` or be names that transformers has since changed; a tensor with two
    keys needs one of them. Everything is
    checked before the model is changed. Raises CheckpointError on every rank, naming rank, key, got and expected, for
    missing and unused keys (but those that transformers passes over: what the model's _keys_to_ignore_on_load_unexpected
    names, buffers that are not saved), other shapes, and dtypes that the model's cannot hold exactly; strict=False loads
    what is there, and casts. Names in an index with folders in them and links that leave the folder are refused.
    """
    what = f"gingham.import_safetensors from {path}"
    ranks = Ranks(what, of=model.parameters())
    found: list[tuple[Stored, list[tuple[str, Whole]]]] = []

    def prepare() -> None:
        stored = Stored(folders.absolute(path))
        found.append((stored, _matched(model, stored, strict)))

    with ExitStack() as reads:
        ranks.first(what, lambda: _hold(reads, folders.absolute(path)))
        ranks.together(what, prepare)
        stored, matched = found[0]

        def fill() -> None:
            for key, whole in sorted(matched, key=lambda pair: str(stored.places[pair[0]])):
                for place, (lengths, _) in whole.chunks.items():
                    whole.tensor(place).copy_(stored.read(key, place, lengths))

        ranks.together(f"{what} (the model may be half loaded)", fill)


def _hold(reads: ExitStack, path: Path) -> None:
    """Until `reads` ends no export of another job changes the folder."""
    if path.is_dir():
        reads.enter_context(folders.turn(path, LOCK_SH))


def _matched(model: torch.nn.Module, stored: Stored, strict: bool) -> list[tuple[str, Whole]]:
    """(key in the file, what it fills) for the whole model; raises where they do not fit."""
    keys, matched, wrong = plain_keys(model), [], []
    here: dict[tuple[int, ...], list[str]] = {}
    renamed = hub.keys_in_files(model, stored.places)
    by_key = {key: name for name, key in renamed.items()}
    firsts = stages.first_keys(model)  # a tied tensor may have one of its keys in the files, which another stage has
    used = {name for key in stages.absent(model) if (name := hub.own_key(key, model, by_key)) is not None}
    for key, parts in keys.items():
        name = hub.own_key(key, model, by_key) or hub.own_key(firsts.get(key, key), model, by_key)
        here.setdefault(_identity(parts), []).extend([] if name is None else [name])
        if name is None:
            continue
        used.add(name)
        whole, line = whole_of(key, parts), stored.line(name)
        if line.shape != whole.shape:
            wrong.append(f"{key}: got shape {tuple(line.shape)} in the file, expected {tuple(whole.shape)}, the model's")
        wrong += check_dtype(key, line.dtype, whole.dtype, strict)
        matched.append((name, whole))
    if strict:
        wrong += [f"{key}: got nothing, expected in the files" for key, parts in keys.items() if not here[_identity(parts)]]
        unused = [name for name in stored.places if name not in used and not hub.ignored(model, name, renamed[name])]
        wrong += [f"{name}: is in the files, expected nothing of that name (strict=False passes over it)" for name in unused]
    if wrong:
        raise CheckpointError("; ".join(wrong[:8]) + (f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""))
    return matched


def _identity(parts: list[Part]) -> tuple[int, ...]:
    return tuple(id(part.tensor) for part in parts)
