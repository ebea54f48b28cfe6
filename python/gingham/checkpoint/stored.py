"""What lies in safetensors files: one file, model.safetensors, or several with an index of which key is where. Read as files of
strangers are: names stay in the folder, and an index must be right about every key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from . import folders
from .metadata import is_plain
from .tensors import Offsets
from .together import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Line:
    """A tensor to write: its key, shape and dtype."""

    key: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Stored:
    """The tensors of safetensors files, opened one file at a time."""

    def __init__(self, path: Path) -> None:
        self.places: dict[str, Path] = {}
        for file in _files_of(path):
            for key in _keys_of(file):
                if self.places.setdefault(key, file) != file:
                    raise CheckpointError(f"{key}: is in {self.places[key]} and in {file}; the files are of different models")
        self._file: Path | None = None
        self._opened: Any = None

    def lines(self) -> dict[str, Line]:
        return {key: self.line(key) for key in self.places}

    def _in(self, key: str) -> Any:
        if self._file != self.places[key]:
            self._file = self.places[key]
            self._opened = safetensors.safe_open(str(self._file), framework="pt", device="cpu")
        return self._opened

    def line(self, key: str) -> Line:
        described = self._in(key).get_slice(key)
        if described.get_dtype() not in DTYPES:
            raise CheckpointError(f"{key} in {self.places[key]}: has dtype {described.get_dtype()}, expected one of {list(DTYPES)}")
        return Line(key, torch.Size(described.get_shape()), DTYPES[described.get_dtype()])

    def read(self, key: str, place: Offsets, lengths: torch.Size) -> torch.Tensor:
        if not lengths:
            return self._in(key).get_tensor(key)
        return self._in(key).get_slice(key)[tuple(slice(start, start + length) for start, length in zip(place, lengths, strict=True))]


def _keys_of(file: Path) -> list[str]:
    try:
        with safetensors.safe_open(str(file), framework="pt") as opened:
            return list(opened.keys())
    except Exception as error:
        raise CheckpointError(f"{file}: is no safetensors file, or a damaged one: {type(error).__name__}: {error}") from error


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / SINGLE).is_file():
        return [_within(path, SINGLE)]
    if not (path / INDEX).is_file():
        raise CheckpointError(f"{path}: expected {SINGLE} or {INDEX} in it, or a .safetensors file; there is neither")
    index = _within(path, INDEX)
    try:
        places = json.loads(index.read_text())["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: got no table of files ({type(error).__name__}: {error}), expected a weight_map") from error
    missing = [name for name in names if is_plain(name) and not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: names {missing}, which are not there")
    files = {name: _within(path, name) for name in names}
    held = {key: name for name, file in files.items() for key in _keys_of(file)}
    wrong = [f"{key} in {name}" for key, name in places.items() if held.get(key) != name]
    if wrong:
        raise CheckpointError(f"{index}: names {'; '.join(wrong[:8])}, where it is not; the files are of different models")
    return list(files.values())


def _within(folder: Path, name: Any) -> Path:
    """A file of a folder. Raises CheckpointError where the name or a link leads out of it, but for the hub's cache, whose
    snapshots/<revision>/ are links into blobs/ beside them."""
    if is_plain(name) and folder.parent.name == "snapshots":
        blobs = (folder.parent.parent / "blobs").resolve()
        if (folder / name).resolve().parent == blobs:
            return folder / name
    return folders.inside(folder, name)
