"""Does a model's code mix samples? On a part of the batch a mean or a softmax over it, or x @ x.T, would be of this rank's part.

The first call of a model with code that nothing vouches for (in training and not, with gradients and without) runs once more on
this rank's rows, all made equal to the last one: what comes out for the last sample must be the same. In eval mode it must be
the same too where one such row less or more comes before it, and what comes out for the others, so that code that goes by the
number of samples or by a sample's place is seen. A rank's only sample is compared in eval mode, alone and behind one made of
its own numbers. Generators, buffers, attributes and dropout's numbers are put back, so that the call itself sees what it would
have seen. After it, buffers that it changed must be the same on all ranks, and numbers with a gradient that it left in
attributes are refused. Code that mixes samples after such calls only is not seen, nor what a rank's only sample does in
training only; where hooks listen nothing is, which is told.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch.distributed.tensor import DTensor

from ..autograd.casts import local_of
from ..mesh import Mesh
from ..mesh.carried import numbers_of_all
from ..mesh.checksums import checksum
from ..mesh.layout import Names, chunks
from .entries import last
from .late import hooked
from .nested import joined, leaves, mapped
from .wrappers import is_foreign

OF_TORCH = frozenset(vars(torch.nn.Module()))
TOLERANCE = 1e-3  # relative: products of the same shapes agree to rounding


def is_needed(model: torch.nn.Module, mesh: Mesh, known: bool) -> bool:
    """Whether nothing vouches for some code in the model, on a mesh that cuts rows. known: whether the code of transformers in it was
    compared."""
    strange = any(is_foreign(each) or not known and type(each).__module__.startswith("transformers.") for each in model.modules())
    return bool(mesh.outer.rows) and strange


def is_heard(model: torch.nn.Module, mesh: Mesh) -> bool:
    """Whether a caller's hooks listen to the model's calls on any rank, which would hear of calls that nobody made: told on every rank.
    A control message of 8 bytes."""
    hearing = [rank for rank, (heard,) in enumerate(mesh.world.sizes([int(bool(hooked(model)))])) if heard]
    if hearing:
        warnings.warn(
            f"{type(model).__name__}: forward hooks listen on rank {hearing[0]}, so that its first call is not compared with one beside"
            " other samples: code that mixes samples, as a mean over the batch, is not seen. Register them after the first call",
            stacklevel=2,
        )
    return bool(hearing)


@dataclass(frozen=True)
class Rows:
    """Of a call: this rank's, and of all ranks, which call the function as often, the least and the most."""

    here: int
    least: int
    most: int

    @staticmethod
    def of(mesh: Mesh, size: int, cuts: Names, own: bool) -> Rows:
        """Of `size` samples that the axes cut; own: of this data rank, of which others may have more or less."""
        held = chunks(size, [mesh.sizes[name] for name in cuts])
        counts = [[min(held), max(held)]]
        if own:
            counts = [list(each) for each in mesh.joint(("data",)).sizes(counts[0])]
        return Rows(mesh.interval(size, cuts)[1], min(least for least, _ in counts), max(most for _, most in counts))

    @property
    def more(self) -> int:
        """By how many rows another call differs. A model may have room for so many samples and no more."""
        return -1 if self.least > 1 and self.most > 2 else 1


def run(function: Callable[..., Any], model: torch.nn.Module, args: Any, kwargs: Any, rows: Rows, cut: Sequence[Any], mesh: Mesh) -> Any:
    """What the function gives for this rank's rows, all like the last one, and in eval mode for as many and for one less or more; cut: the
    tensors, lists and arrays that have these rows. None: not to be compared. A control message of 8 bytes."""
    with torch.autograd.graph.saved_tensors_hooks(_same, _same):  # those of activation checkpointing count what a call saves
        return _run(function, model, args, kwargs, rows, cut, mesh)


def _same(x: Any) -> Any:
    return x


def _run(function: Callable[..., Any], model: torch.nn.Module, args: Any, kwargs: Any, counts: Rows, cut: Sequence[Any], mesh: Mesh) -> Any:
    rows = counts.here
    before = {id(x) for x in cut if rows and len(x) == rows}

    def alike(more: int) -> Any:
        changed = mapped(
            lambda _, x: _rows_of(x, rows, more) if id(x) in before else x, (args, kwargs), is_leaf=lambda value: id(value) in before
        )
        return mapped(lambda _, y: y.detach() if isinstance(y, torch.Tensor) else y, function(model, *changed[0], **changed[1]))

    found = None
    if counts.most > 1:
        with _restored(model):
            found = alike(0)
    kept = any(x.dim() and len(x) == rows for _, _, x in _attributes(model))  # of samples that came before, which are not alike
    if any(flag for (flag,) in mesh.world.sizes([int(kept)])):
        return found, None
    with _in_eval(model):
        state = torch.get_rng_state()
        with _restored(model):
            one = alike(0)
            drew = not torch.equal(state, torch.get_rng_state())
        with _restored(model):
            other = alike(counts.more)
    return found, None if drew else (one, other)


def _rows_of(x: Any, rows: int, more: int) -> Any:
    """As many rows like the last one; beside a rank's only one another, of its numbers in another order, or of half of them."""
    if rows > 1 or more < 1 or not isinstance(x, torch.Tensor) or x.dtype == torch.bool or x.dim() < 2:
        return last(x, rows + more)
    other = x.flatten().roll(1).view(x.shape)
    if x.is_floating_point() and torch.equal(other, x):
        other = x / 2
    return torch.cat([other, x]).detach()


@contextmanager
def _in_eval(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _restored(model: torch.nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    held = [(module, {name: (value, _items(value)) for name, value in vars(module).items()}) for module in model.modules()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, values in held:
            for name in vars(module).keys() - values.keys():
                del vars(module)[name]
            for name, (value, items) in values.items():
                vars(module)[name] = value
                if items is not None:
                    value.clear()
                    value.extend(items) if isinstance(value, list) else value.update(items)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _items(value: Any) -> Any:
    return copy.copy(value) if type(value) in (list, dict, set) else None


class State:
    """What a call may leave in a model: buffers and attributes, as they were before."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.buffers = {name: buffer.clone() for name, buffer in _buffers(model)}
        self.attributes = {(path, name): value for path, name, value in _attributes(model)}
        self.numbers = _numbers(model)

    def check(self, what: str, mesh: Mesh, model: torch.nn.Module, rows: int | None) -> None:
        """Raises NotImplementedError on every rank for a buffer that now goes by the rank, and for a number with a gradient. Warns of
        tensors of this rank's `rows` samples; rows: None where they are the caller's."""
        left = [(f"{path}.{name}".lstrip("."), x) for path, name, x in _attributes(model) if self.attributes.get((path, name)) is not x]
        if rows is not None:
            self._tell_numbers(what, mesh, model)
        for name, value in left:
            if value.requires_grad and value.dim() == 0:
                raise NotImplementedError(
                    f"{what}: {name} is a number with a gradient that forward left in the model, made of this"
                    " rank's samples or weights only; return a value for each sample and reduce them outside of the model"
                )
        parts = [f"{name} {tuple(x.shape)}" for name, x in left if x.requires_grad or x.dim() and len(x) == rows]
        if parts and rows is not None:
            warnings.warn(
                f"{what}: {', '.join(parts)}, which forward left in the model, is of this rank's part of samples and features, so that a"
                " loss or a statistic of it is this rank's only; return it from forward, whose outputs are whole",
                stacklevel=5,
            )
        self._check_buffers(what, mesh, model)

    def _tell_numbers(self, what: str, mesh: Mesh, model: torch.nn.Module) -> None:
        """Warns of numbers without a gradient that forward left and that differ between ranks. Control messages of 16 bytes, and where they
        differ of 8 bytes a number."""
        left = {name: value for name, value in _numbers(model).items() if self.numbers.get(name) != value}
        names = crc32(repr(list(left)).encode())
        told = mesh.world.sizes([names, crc32(repr(list(left.values())).encode())])
        if len({values for _, values in told}) == 1:
            return
        odd = list(left)
        if left and all(theirs == names for theirs, _ in told):
            columns = zip(*numbers_of_all(mesh, list(left.values())), strict=True)
            odd = [name for name, (one, *others) in zip(left, columns, strict=True) if any(other != one for other in others)]
        warnings.warn(
            f"{what}: {', '.join(odd) or 'a number on another rank'}, which forward left in the model, differs between ranks, as what is"
            " made of this rank's samples or features does; make it of the model's outputs, which are whole",
            stacklevel=6,
        )

    def _check_buffers(self, what: str, mesh: Mesh, model: torch.nn.Module) -> None:
        buffers = dict(_buffers(model))
        changed = {name: x for name, x in buffers.items() if name not in self.buffers or not torch.equal(x, self.buffers[name])}
        sums = [checksum(changed[name]) if name in changed else 0 for name in buffers]
        if len({tuple(each) for each in mesh.world.sizes([crc32(repr(sums).encode())])}) > 1:
            raise NotImplementedError(
                f"{what}: buffers ({', '.join(changed) or 'of another rank'}) were changed by this rank's samples, which are a part of the"
                " batch (running means, codebooks): update them outside of the model, from its full outputs, or use a mesh that leaves rows"
                " whole"
            )


def _buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Those that every rank holds whole, as plain tensors: blocks, as a parametrization makes of a DTensor, differ by right."""
    for name, buffer in model.named_buffers():
        if not isinstance(buffer, DTensor):
            yield name, buffer
        elif all(place.is_replicate() for place in buffer.placements):
            yield name, local_of(buffer)


def _attributes(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Tensors, in lists and dicts too."""
    return ((path, name, x) for path, name, x in _left(model) if isinstance(x, torch.Tensor))


def _numbers(model: torch.nn.Module) -> dict[str, float]:
    """Numbers without a gradient: Python's, and tensors of no dims."""
    found = {}
    for path, name, x in _left(model):
        single = isinstance(x, torch.Tensor) and not x.dim() and not x.requires_grad and type(x) is torch.Tensor
        if single or isinstance(x, float | int):
            found[f"{path}.{name}".lstrip(".")] = float(x)
    return found


def _left(model: torch.nn.Module) -> Iterator[tuple[str, str, Any]]:
    """All attributes but those that every module of torch's has."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in OF_TORCH:
                continue
            if type(value) in (list, tuple, dict):
                yield from ((path, joined(name, at), x) for at, x in leaves(value))
            else:
                yield path, name, value


def check(what: str, mesh: Mesh, output: Any, probed: Any, counts: Rows) -> None:
    """Raises NotImplementedError on every rank where one's last sample came out in another way beside other samples, or other ones."""
    (alike, two), rows = probed, counts.here
    others = rows + counts.more
    placed = two is not None and (_differs(two[0], two[1], rows, others) or _differs_by_place(two[0], two[1], rows, others))
    flags = mesh.world.sizes([int(_differs(output, alike, rows, rows)), int(placed and rows > 1), int(placed and rows == 1)])
    odd, other, lone = ([rank for rank, flag in enumerate(flags) if flag[index]] for index in range(3))
    if other and not odd:
        raise NotImplementedError(
            f"{what}: its code goes by the number of samples or by a sample's place among them, which on rank {other[0]} are those of its"
            " part of the batch (x.shape[0], torch.arange(len(x)), enumerate(x)). Do that outside of the model, give it as an argument, or"
            " use a mesh that leaves rows whole"
        )
    if lone and not odd:
        raise NotImplementedError(
            f"{what}: its code mixes samples (a mean, softmax, sort or product over the batch) or goes by their number: on rank {lone[0]},"
            " which has one sample of the batch, the result of that sample is another where a second one is beside it. Do that outside of"
            " the model, on its full outputs, or use a mesh that leaves rows whole"
        )
    if odd:
        raise NotImplementedError(
            f"{what}: its code mixes samples (a mean, softmax, sort or product over the batch): on rank {odd[0]} the result of a sample"
            f" depends on the {rows} samples beside it there, which are a part of the batch. Do that outside of the model, on its full"
            " outputs, or use a mesh that leaves rows whole"
        )


def _differs(output: Any, probed: Any, rows: int, others: int) -> bool:
    """Of an output for `rows` samples and one for `others`, the last."""
    return any(_apart(*(each[-(len(y) // rows) :] for each in (y, other))) for y, other in _of_samples(output, probed, rows, others))


def _differs_by_place(output: Any, probed: Any, rows: int, others: int) -> bool:
    """Whether samples that are alike have come out in several ways."""
    found = (y.reshape(rows, -1) for y, _ in _of_samples(output, probed, rows, others))
    return any(_apart(samples, samples[-1:].expand_as(samples)) for samples in found)


def _of_samples(output: Any, probed: Any, rows: int, others: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors of two outputs that have as many rows for each sample, by their shapes."""
    for (_, y), (_, other) in zip(leaves(output), leaves(probed), strict=False):
        if not isinstance(y, torch.Tensor) or not isinstance(other, torch.Tensor) or not y.dim() or y.dim() != other.dim():
            continue
        if not rows or len(y) % rows or not y.is_floating_point() or len(y) // rows * others != len(other):
            continue
        if y.shape[1:] == other.shape[1:]:
            yield y, other


def _apart(x: torch.Tensor, y: torch.Tensor) -> bool:
    x, y = (each.detach().double() for each in (x, y))
    both = torch.isfinite(x) & torch.isfinite(y)
    if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
        return True
    return float((x - y)[both].norm()) > TOLERANCE * max(float(x[both].norm()), 1e-6)
