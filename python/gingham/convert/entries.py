"""What a call is given beside tensors that may have an entry for each sample: lists, tuples and NumPy arrays as long as the batch.

    lengths=[5, 3, 4, 2]  names=("a", "b", "c", "d")  an array [4, ..]    cut like the batch, lists and tuples with a word (once)
    size=(224, 224), with 2 samples                                       whole on every rank, with a word

Models of transformers take what has an entry for each sample in tensors; a list of theirs (eos_token_id) is whole, with a word.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy
import torch

ENTRIES = (str, bytes, int, float, numpy.generic, numpy.ndarray)


def as_long(value: Any, samples: int) -> bool:
    """Whether a value that is no tensor may have an entry for each sample."""
    if not samples:
        return False
    if isinstance(value, numpy.ndarray):
        return value.ndim > 0 and len(value) == samples
    return (
        type(value) in (list, tuple)
        and len(value) == samples
        and all(_is_data(each) for each in value)
        and any(each is not None for each in value)
    )


def _is_data(entry: Any) -> bool:
    return entry is None or isinstance(entry, ENTRIES) or type(entry) in (list, tuple) and all(_is_data(each) for each in entry)


def cut(border: Any, path: str, value: Any) -> Any:
    """This rank's part of it, noted in border.rows; the value itself where it is whole."""
    samples, mesh = border.size, border.mesh
    if not samples or border._is_whole(path) or not border._cuts_rows() or not as_long(value, samples):
        return value
    array = isinstance(value, numpy.ndarray)
    if border.hugging or type(value) is tuple and all(isinstance(each, int | float) for each in value):
        what = f"an array of {samples} rows" if array else f"a {type(value).__name__} of {samples} entries"
        way = "a tensor" if border.hugging else "a list or a tensor"
        tell(border, path, f"argument {path!r}, {what}, is whole on every rank: give {way} where it has an entry for each sample")
        return value
    if samples > 1 and (not array or value.ndim == 1):
        tell(border, path, f"argument {path!r} of {samples} entries is cut like the batch, since it is as long")
    start, count = mesh.interval(samples + border.missing, border._rows())
    padded = numpy.concatenate([value, value[:1].repeat(border.missing, 0)]) if array else value + value[:1] * border.missing
    part = padded[start : start + count]
    border.rows.append(part)
    return part


def tell(border: Any, path: str, words: str) -> None:
    if path not in border.told:
        border.told.add(path)
        _warn(f"{words}; where it is one for all samples, say parallelize(..., whole=({path!r},))")


@torch.compiler.assume_constant_result
def _warn(words: str) -> None:
    """In a compiled program once, when it is traced."""
    warnings.warn(words, stacklevel=4)


def last(value: Any, rows: int) -> Any:
    """`rows` rows like the last one."""
    if isinstance(value, torch.Tensor):
        return value[-1:].expand(rows, *value.shape[1:]).clone()
    return value[-1:].repeat(rows, 0) if isinstance(value, numpy.ndarray) else value[-1:] * rows
