"""A checkpoint's `.metadata`, which is a pickle, read without trust: no code of it runs, and no path in it leaves the folder.

torch.distributed.checkpoint unpickles the file as it is, which runs whatever a stranger hid in it. Here the pickle may only
name the ten classes that such a file is made of, gets records that do nothing in their place, and the real classes are made
from those records once their types and numbers have been looked at. The blocks of each tensor must cover it exactly once.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .together import CheckpointError

METADATA = ".metadata"  # torch.distributed.checkpoint's name
PACKAGE = "torch.distributed.checkpoint."
RECORDS = {
    f"{PACKAGE}metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    f"{PACKAGE}filesystem": {"_StorageInfo"},
}
PATHS = {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}
Box = tuple[Sequence[int], Sequence[int]]  # offsets, lengths


class _Record:
    """What stands for an object of torch's while the pickle is read; a new class each time, so that nothing can be changed."""

    kind = ""
    state: Any = None

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._made: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if name in RECORDS.get(module, ()):
            return self._made.setdefault(name, type(name, (_Record,), {"kind": name}))
        if module == "torch" and name == "Size":
            return torch.Size
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return lambda layout: str(layout)
        if module.split(".")[0] == "pathlib" and name in PATHS:
            return lambda *parts: str(PurePosixPath(*parts))
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint holds")


def read_metadata(file: Path, data: bytes) -> Metadata:
    """The metadata of the bytes of `file`. Raises CheckpointError for anything that a checkpoint does not hold: classes of
    others, paths that leave the folder, blocks that do not cover their tensor exactly once or are stored nowhere."""
    try:
        found = _fields(_Unpickler(data).load(), "Metadata")
        described = {_typed(name, str): _storage(value) for name, value in _typed(found["state_dict_metadata"], dict).items()}
        places = dict(_place(*pair) for pair in _typed(found["storage_data"], dict).items())
        version = found.get("version")
    except Exception as error:  # a damaged pickle may raise anything
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file}: is not the metadata of a checkpoint, or a damaged or harmful one: {said}") from error
    wrong = [reason for name, saved in described.items() for reason in _wrong(name, saved, places)]
    if wrong:
        raise CheckpointError(f"{file}: {'; '.join(wrong[:8])}{f' (and {len(wrong) - 8} more)' if len(wrong) > 8 else ''}")
    return Metadata(described, None, places, StorageMeta(), version if isinstance(version, str) else None)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"got a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _fields(record: Any, kind: str) -> dict[str, Any]:
    if not isinstance(record, _Record) or record.kind != kind or type(record.state) is not dict:
        raise ValueError(f"got {getattr(record, 'kind', type(record).__name__)}, expected {kind}")
    return record.state


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"got {value!r}, expected a number of at least 0")
    return value


def _size(value: Any) -> torch.Size:
    return torch.Size([_natural(length) for length in _typed(value, torch.Size)])


def _storage(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(record, _Record) and record.kind == "BytesStorageMetadata":
        return BytesStorageMetadata()
    found = _fields(record, "TensorStorageMetadata")
    properties = found["properties"]
    state = properties.state if isinstance(properties, _Record) and properties.kind == "TensorProperties" else None
    dtype = _typed(_typed(state, tuple)[0], torch.dtype)
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in _typed(found["chunks"], list)]
    made = [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _size(found["size"]), made)


def _place(key: Any, value: Any) -> tuple[MetadataIndex, _StorageInfo]:
    index, info = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
    name = _typed(info["relative_path"], str)
    if not is_plain(name):
        raise ValueError(f"it names the file {name!r}, expected a name without folders")
    if info.get("transform_descriptors"):
        raise ValueError(f"{name}: is stored by the extensions {info['transform_descriptors']!r}, which are not read here")
    offset = index.get("offset")
    at = MetadataIndex(_typed(index["fqn"], str), None if offset is None else _size(offset))
    return at, _StorageInfo(name, _natural(info["offset"]), _natural(info["length"]))


def is_plain(name: Any) -> bool:
    """Whether a name of a file stays in its folder: no separator of any system, not the folder itself or the one above."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0")


def _wrong(name: str, saved: Any, places: dict[MetadataIndex, _StorageInfo]) -> list[str]:
    if isinstance(saved, BytesStorageMetadata):
        return [] if MetadataIndex(name) in places else [f"{name}: is stored nowhere"]
    lost = [tuple(chunk.offsets) for chunk in saved.chunks if MetadataIndex(name, chunk.offsets) not in places]
    said = [f"{name}: its blocks at {lost[:4]} are stored nowhere"] if lost else []
    return said + uncovered(name, saved)


def uncovered(name: str, saved: TensorStorageMetadata | BytesStorageMetadata) -> list[str]:
    """What is wrong with a tensor whose blocks do not hold each of its elements exactly once."""
    if isinstance(saved, BytesStorageMetadata):
        return []
    boxes: list[Box] = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in saved.chunks]
    for offsets, lengths in boxes:
        ends = [offset + length for offset, length in zip(offsets, lengths, strict=False)]
        if not len(offsets) == len(lengths) == len(saved.size) or any(end > of for end, of in zip(ends, saved.size, strict=True)):
            return [f"{name}: has a block of {lengths} at {offsets} in a tensor of shape {tuple(saved.size)}"]
    held, wanted = sum(prod(lengths) for _, lengths in boxes), prod(saved.size)
    if held < wanted:
        return [f"{name}: its blocks hold {held} of {wanted} elements of shape {tuple(saved.size)}"]
    if held > wanted or _overlap(boxes):
        return [f"{name}: its blocks overlap: {held} elements in a tensor of {wanted}, shape {tuple(saved.size)}"]
    return []


def _overlap(boxes: list[Box]) -> bool:
    """Whether any two boxes share an element: a sweep along the dim that has the most cuts."""
    boxes = [box for box in boxes if prod(box[1])]
    if not boxes or not boxes[0][0]:
        return len(boxes) > 1
    dim = max(range(len(boxes[0][0])), key=lambda dim: len({offsets[dim] for offsets, _ in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box[0][dim]):
        active = [other for other in active if other[0][dim] + other[1][dim] > box[0][dim]]
        if any(all(_meet(*pair) for pair in zip(*box, *other, strict=True)) for other in active):
            return True
        active.append(box)
    return False


def _meet(start: int, length: int, other: int, its: int) -> bool:
    return start < other + its and other < start + length
