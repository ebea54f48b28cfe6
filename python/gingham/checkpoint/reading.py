"""Reading a checkpoint's blocks: each once, its sum taken while its bytes are in memory, and no tensor of a model touched before
every sum was right. What a load makes anew (an optimizer's state) is filled at once; what is a model's waits for the end."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from ..native import crc32c
from . import folders
from .blocks import BUFFER, Block, Opened, damaged
from .tensors import LoadPlanner
from .together import CheckpointError

SMALL = 1 << 16  # bytes of a block that is summed before it is taken apart; of a larger one the tensor's bytes are summed where they went
Fill = Callable[[], None]


def fill(opened: Opened, state: dict[str, Any], at_once: Callable[[str], bool] = lambda name: False) -> Fill:
    """Reads what `state` needs from a checkpoint, in this process; entries are Whole, or None for bytes, which are put in its place.
    Tensors of names that are at_once are filled; calling the result fills the others, of which this rank's part is held until then.
    Raises CheckpointError for a block whose sum, shape or dtype is not the one that was written."""
    planner = LoadPlanner()
    planner.set_up_planner(state, opened.metadata)
    by_block: dict[str, dict[int, list[ReadItem]]] = defaultdict(lambda: defaultdict(list))
    for item in planner.create_local_plan().items:
        info = opened.metadata.storage_data[item.storage_index]
        by_block[info.relative_path][info.offset].append(item)
    later: list[tuple[ReadItem, torch.Tensor]] = []
    for name, places in by_block.items():
        path = folders.inside(opened.folder, name)
        with open(path, "rb", 0) as file:
            for _, items in sorted(places.items()):
                if items[0].type == LoadItemType.BYTE_IO:
                    planner.load_bytes(items[0], io.BytesIO(_bytes(opened, path, file, items[0])))
                    continue
                tensor = _tensor(opened, path, file, items[0])
                for item in items:
                    if at_once(item.dest_index.fqn):
                        _copy(planner, item, tensor)
                    else:
                        later.append((item, tensor))

    def rest() -> None:
        for item, tensor in later:
            _copy(planner, item, tensor)

    return rest


@torch.no_grad()
def _copy(planner: LoadPlanner, item: ReadItem, tensor: torch.Tensor) -> None:
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    planner.resolve_tensor(item).detach().copy_(tensor)


def _bytes(opened: Opened, path: Path, file: BinaryIO, item: ReadItem) -> bytes:
    """A block as it lies in the file."""
    info = opened.metadata.storage_data[item.storage_index]
    packed, expected = _at(file, info.offset, info.length), opened.sum_of(info)
    if expected is not None and crc32c(packed) != expected[2]:
        raise CheckpointError(damaged([f"{path}: {item.storage_index.fqn}: got checksum {crc32c(packed):08x}, expected {expected[2]:08x}"]))
    return packed


def _at(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    found = bytearray()
    while len(found) < length:
        more = file.read(length - len(found))
        if not more:
            raise CheckpointError(damaged([f"{file.name}: ended {length - len(found)} bytes early"]))
        found += more
    return bytes(found)


def _tensor(opened: Opened, path: Path, file: BinaryIO, item: ReadItem) -> torch.Tensor:
    """A block's tensor, which has the shape and dtype that the metadata gives it."""
    index = item.storage_index
    info, saved = opened.metadata.storage_data[index], cast(TensorStorageMetadata, opened.metadata.state_dict_metadata[index.fqn])
    expected = opened.sum_of(info)
    small = info.length <= SMALL or expected is not None and expected[3] < 0
    source: Any = io.BytesIO(_bytes(opened, path, file, item)) if small else _Summing(file, info.offset, info.length, expected)
    try:
        tensor = torch.load(source, map_location="cpu", weights_only=True)
        found = (tensor.shape, tensor.dtype)
    except Exception as error:
        raise CheckpointError(damaged([f"{path}: {index.fqn}: cannot be read: {type(error).__name__}: {error}"])) from error
    wanted = {(chunk.sizes, saved.properties.dtype) for chunk in saved.chunks if chunk.offsets == index.offset}
    if found not in wanted:
        raise CheckpointError(damaged([f"{path}: {index.fqn}: got {found}, expected {wanted}"]))
    if not small and expected is not None:
        total = source.sum_of(tensor)
        if total != expected[2]:
            raise CheckpointError(damaged([f"{path}: {index.fqn}: got checksum {total:08x}, expected {expected[2]:08x}"]))
    return tensor


class _Summing(io.RawIOBase):
    """A block in its file for torch.load: the tensor's bytes are summed piece by piece as they arrive, while the processor's cache
    holds them."""

    def __init__(self, file: BinaryIO, offset: int, length: int, block: Block | None) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0
        self._start = -1 if block is None else block[3]
        self._sum = crc32c(_at(file, offset, self._start)) if self._start >= 0 else 0
        self._seen = 0  # bytes from `start` on that are in the sum

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        wanted = min(len(view), max(0, self._length - self._at))
        self._file.seek(self._offset + self._at)
        summing = self._at == self._start and wanted > SMALL // 2 and not self._seen
        while done < wanted:
            piece = view[done : min(done + BUFFER, wanted)]
            count = self._file.readinto(piece)  # type: ignore[attr-defined]
            if not count:
                break
            self._sum = crc32c(piece[:count], self._sum) if summing else self._sum
            done += count
        self._seen += done if summing else 0
        self._at += done
        return done

    def sum_of(self, tensor: torch.Tensor) -> int:
        """The block's sum, once its tensor has been read; from memory where it was not read in one go."""
        if self._seen != tensor.untyped_storage().nbytes():
            held = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage()).numpy()
            self._sum, self._seen = crc32c(held, crc32c(_at(self._file, self._offset, self._start))), len(held)
        end = self._start + self._seen
        rest = _at(self._file, self._offset + end, max(0, self._length - end))
        return crc32c(rest, self._sum) if end <= self._length else ~self._sum & 0xFFFFFFFF
