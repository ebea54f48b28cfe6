"""The files of a checkpoint: blocks as torch.save writes them, one after the other, and beside them checksums.json with the
CRC-32C of each, of `.metadata` and of itself, all looked at before a load touches a model.

{"crc32c": "<sum of the bytes after this value>", "format": 2, "metadata": [bytes, sum],
 "files": {"__0_0.distcp": [[offset, bytes, sum, where in it the tensor's own bytes begin], ...], ...}}
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ..native import crc32c
from . import folders
from .metadata import METADATA, read_metadata
from .together import CheckpointError

Written = tuple[WriteResult, int, int]  # where a block lies, its sum, where in it the tensor's bytes begin
FORMAT = 2  # 1: without checksums
BUFFER = 1 << 18  # bytes read at a time: they stay in the processor's cache
Block = tuple[int, int, int, int]  # offset, bytes, sum, where in it a tensor's bytes begin (-1: not known)


class Summed:
    """A file being written and the sum of what was written since `restart`. An error of the disk becomes a CheckpointError that
    says which file, what was being written and how much room there is."""

    def __init__(self, file: Path, doing: str = "") -> None:
        self.path, self.doing, self.at, self.sum = file, doing, 0, 0
        self.places: dict[int, int] = {}  # by the length of a write, where it began
        self.failed: CheckpointError | None = None
        self._file: BinaryIO = open(file, "wb")  # noqa: SIM115

    def restart(self, doing: str) -> None:
        self.doing, self.sum, self.places = doing, 0, {}

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            raise self._named(error) from error
        self.sum = crc32c(view, self.sum)
        self.places[len(view)] = self.at
        self.at += len(view)
        return len(view)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            raise self._named(error) from error

    def finish(self) -> None:
        """Flushes it to the disk and closes it."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._named(error) from error

    def abandon(self) -> None:
        with suppress(OSError):
            self._file.close()

    def _named(self, error: OSError) -> CheckpointError:
        free = shutil.disk_usage(self.path.parent).free
        self.failed = CheckpointError(
            f"{self.path}: {error.strerror or error} (errno {error.errno}) while writing {self.doing}; {self.at:,} bytes of the file were"
            f" written, {free:,} bytes are free there"
        )
        return self.failed


def write(folder: Path, plan: SavePlan, planner: Any, limit: int | None = None) -> list[Written]:
    """Writes a plan's blocks into files of this rank, each of at most `limit` blocks, and gives back where each lies and its sum."""
    if not isinstance(plan.storage_data, _StoragePrefix):
        raise TypeError(f"got storage_data {plan.storage_data!r}, expected a prefix of names")
    needed, step = sum(_bytes(item) for item in plan.items), limit or max(1, len(plan.items))
    written: list[Written] = []
    for number, first in enumerate(range(0, len(plan.items), step)):
        name = f"{plan.storage_data.prefix}{number}.distcp"
        file = Summed(folder / name, f"{needed:,} bytes of this rank")
        try:
            for item in plan.items[first : first + step]:
                written.append(_write_block(file, name, item, planner, needed))
            file.finish()
        except BaseException as error:
            file.abandon()
            raise file.failed or error from error
    return written


def _write_block(file: Summed, name: str, item: WriteItem, planner: Any, needed: int) -> Written:
    file.restart(f"{item.index.fqn} ({_bytes(item):,} of this rank's {needed:,} bytes)")
    offset, data = file.at, planner.resolve_data(item)
    if item.type == WriteItemType.BYTE_IO:
        file.write(data.getbuffer())
    else:
        tensor = data.detach().cpu()
        # a view would be written with all of its storage
        torch.save(tensor if tensor.untyped_storage().size() == tensor.nbytes else tensor.clone(), cast(IO[bytes], file))
    length, start = file.at - offset, file.places.get(_bytes(item), -1)
    return WriteResult(item.index, length, _StorageInfo(name, offset, length)), file.sum, start - offset if start >= 0 else -1


def _bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


def finish(folder: Path, metadata: Metadata, written: list[Written]) -> None:
    """Writes `.metadata` and checksums.json, whose file is the lock that the folder's writer holds."""
    metadata.version = "1.0.0"  # of torch.distributed.checkpoint's format
    metadata.storage_data = {result.index: result.storage_data for result, *_ in written}
    file, packed = Summed(folder / METADATA, "the metadata"), pickle.dumps(metadata)
    file.write(packed)
    file.finish()
    files: dict[str, list[Block]] = defaultdict(list)
    for result, total, start in written:
        files[result.storage_data.relative_path].append((result.storage_data.offset, result.storage_data.length, total, start))
    body = json.dumps({"format": FORMAT, "metadata": [len(packed), file.sum], "files": files}, separators=(",", ":"))[1:].encode()
    sums = Summed(folder / folders.LOCK, "the checksums")
    sums.write(_head(body) + body)
    sums.finish()


def _head(body: bytes) -> bytes:
    return f'{{"crc32c":"{crc32c(body):08x}",'.encode()


@dataclass
class Opened:
    """A checkpoint whose metadata and checksums have been read and looked at; `sums` None: it has none."""

    folder: Path
    metadata: Metadata
    sums: dict[str, list[Block]] | None
    lock: folders.Lock | None = None
    _sums: dict[tuple[str, int], Block] = field(init=False)

    def __post_init__(self) -> None:
        self._sums = {(name, block[0]): block for name, block in self.blocks()}

    def sum_of(self, info: _StorageInfo) -> Block | None:
        """What the checksums say of a block, or None where there are none."""
        return None if self.sums is None else self._sums[info.relative_path, info.offset]

    def blocks(self) -> list[tuple[str, Block]]:
        return [(name, block) for name, blocks in sorted((self.sums or {}).items()) for block in blocks]

    def verify(self, rank: int = 0, size: int = 1, elsewhere: Callable[[str], bool] = lambda key: False) -> None:
        """Reads this rank's share of the blocks, but of those keys that are looked at elsewhere, and raises CheckpointError where a
        sum is another. Bytes: a `size`-th of all."""
        keys = defaultdict(list)
        for index, info in self.metadata.storage_data.items():
            keys[info.relative_path, info.offset].append(index.fqn)
        blocks = [(name, block) for name, block in self.blocks() if not all(elsewhere(key) for key in keys[name, block[0]])]
        total, before = sum(block[1] for _, block in blocks), 0
        wrong, buffer = [], memoryview(bytearray(BUFFER))
        for name, (offset, length, expected, _) in blocks:
            middle = before + length // 2
            before += length
            if not rank * total <= middle * size < (rank + 1) * total and total:
                continue
            found = _sum_of(self.folder / name, offset, length, buffer)
            if found != expected:
                wrong.append(f"{self.folder / name}: {', '.join(keys[name, offset])}: got checksum {found:08x}, expected {expected:08x}")
        if wrong:
            raise CheckpointError(damaged(wrong))


def damaged(wrong: list[str]) -> str:
    more = f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""
    return f"{'; '.join(wrong[:8])}{more}: the checkpoint is damaged; an older one loads by its own folder's path"


def _sum_of(file: Path, offset: int, length: int, buffer: memoryview) -> int:
    found = 0
    with open(file, "rb", 0) as opened:
        opened.seek(offset)
        while length > 0:
            count = opened.readinto(buffer[: min(length, BUFFER)])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(damaged([f"{file}: ended {length} bytes early"]))
            found = crc32c(buffer[:count], found)
            length -= count
    return found


def open_checkpoint(folder: Path, lock: folders.Lock | None = None) -> Opened:
    """Reads a checkpoint's metadata and checksums. Raises CheckpointError where they are damaged, harmful or do not fit each other
    or the sizes of the files."""
    packed = _read(folder, METADATA)
    sums = _sums(folder, packed)
    metadata = read_metadata(folder / METADATA, packed)
    opened = Opened(folder, metadata, sums, lock)
    wrong = _misplaced(opened)
    if wrong:
        raise CheckpointError(damaged(wrong))
    return opened


def _read(folder: Path, name: str) -> bytes:
    try:
        return folders.inside(folder, name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder / name}: {error.strerror or error}; expected a complete checkpoint") from error


def _sums(folder: Path, packed: bytes) -> dict[str, list[Block]] | None:
    file = folders.inside(folder, folders.LOCK)
    if not file.exists():
        return None
    data = _read(folder, folders.LOCK)
    start = len(_head(b""))
    if data[:start] != _head(data[start:]):
        raise CheckpointError(damaged([f"{file}: its own checksum is {data[:start]!r}, expected {_head(data[start:])!r}"]))
    try:
        found = json.loads(b"{" + data[start:])
        check_format(file, found["format"])
        files = {
            str(name): [(int(offset), int(length), int(total), int(start)) for offset, length, total, start in each]
            for name, each in found["files"].items()
        }
        described = tuple(found["metadata"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: holds no table of checksums: {type(error).__name__}: {error}") from error
    if described != (len(packed), crc32c(packed)):
        wrong = (
            f"{folder / METADATA}: got {len(packed)} bytes of checksum {crc32c(packed):08x}, expected {described[0]} of {described[1]:08x}"
        )
        raise CheckpointError(damaged([wrong]))
    return files


def check_format(file: Path, found: Any) -> None:
    """Raises CheckpointError for a format that a later gingham writes, naming both."""
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise CheckpointError(
            f"{file}: has format {found!r}, this gingham reads formats 1 to {FORMAT}; load it with the gingham that wrote it"
        )


def _misplaced(opened: Opened) -> list[str]:
    """Files that are missing, of another size than their blocks, or whose blocks are others than the checksums'."""
    described: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for info in opened.metadata.storage_data.values():
        described[info.relative_path].append((info.offset, info.length))
    wrong = []
    for name, places in sorted(described.items()):
        file, end = folders.inside(opened.folder, name), max(offset + length for offset, length in places)
        size = file.stat().st_size if file.is_file() else 0
        if size < end or opened.sums is not None and size != end:
            wrong.append(f"{file}: got {size} bytes, expected {end}")
        elif opened.sums is not None:
            summed = [(offset, length) for offset, length, *_ in opened.sums.get(name, [])]
            starts = [0, *(offset + length for offset, length in sorted(summed))]
            if sorted(places) != sorted(summed) or starts[:-1] != [offset for offset, _ in sorted(summed)]:
                wrong.append(f"{file}: the checksums are of other blocks than the metadata's")
    extra = set(opened.sums or ()) - described.keys()
    return wrong + [f"{opened.folder / name}: has checksums and no place in the metadata" for name in sorted(extra)]


def unpacked(packed: io.BytesIO) -> dict[str, Any]:
    """What torch.save packed, numbers, strings, tensors and their containers only."""
    packed.seek(0)
    return torch.load(packed, map_location="cpu", weights_only=True)
