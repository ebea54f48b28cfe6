"""Gradients that are sums over ranks: made at once, left out inside no_sync, or put off to the end of a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..mesh import Mesh
from ..mesh.layout import Names

_inside = WeakIdKeyDictionary()  # parameters in a no_sync block
_owed = WeakIdKeyDictionary()  # parameters whose .grad holds this rank's part of a sum, with the function that makes it


@contextmanager
def no_sync(module: torch.nn.Module) -> Iterator[None]:
    """Gradient accumulation: backward passes inside leave out the sums of parameters' gradients over ranks that hold other
    rows; the first backward pass after it makes them once, over all that has accumulated. Named as
    DistributedDataParallel's; every rank must enter and leave it alike, or all raise MeshError.

        with gingham.no_sync(model):
            for ids, target in micro_batches[:-1]:
                (loss(model(ids), target) / n).backward()
        (loss(model(last_ids), last_target) / n).backward()

    Left out: the sum over depth of the weights of linears and embeddings, and the sums over the row axes of the biases of
    linears and of norms' parameters. Made each time: the reduce-scatter of weights' gradients over the row axes, since a
    rank keeps no more than its block of a gradient and the step adds straight into the owner's; sums of parameters that
    parallelize left whole; everything in compiled graphs. No memory is added. Until that backward pass .grad holds
    parts, which clip_grad_norm_ refuses; zero_grad() drops them.
    """
    entered = [parameter for parameter in module.parameters() if parameter not in _inside]
    for parameter in entered:
        _inside[parameter] = True
    try:
        yield
    finally:
        for parameter in entered:
            del _inside[parameter]


def deferring(parameters: Iterable[torch.Tensor | None]) -> bool:
    """Whether the sum of one of these parameters' gradients is to be left out, or made of more than this gradient."""
    return bool(_inside or _owed) and any(each is not None and (each in _inside or each in _owed) for each in parameters)


def owing(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether a .grad among these is a part of a sum that no_sync left out."""
    return bool(_owed) and any(each in _owed and each.grad is not None for each in parameters)


@torch.no_grad()
def make_sums(parameters: Iterable[torch.Tensor]) -> None:
    """The sums that no_sync left out of these parameters' gradients, now and not in a next backward pass; in their order, which is the
    same on all ranks."""
    for parameter in parameters:
        total = _owed.pop(parameter, None)
        if total is not None and parameter.grad is not None:
            held = getattr(parameter.grad, "_local_tensor", parameter.grad)
            held.copy_(total(held.float() if held.dtype.itemsize == 2 else held.clone(memory_format=torch.contiguous_format)))


def sum_over_depth(mesh: Mesh, gradient: torch.Tensor) -> torch.Tensor:
    """Where weights are replicated over depth; 16-bit parts travel and are added in float32."""
    axis = mesh.axis(mesh.axes.depth)
    if axis is None:
        return gradient
    wide = gradient.float() if gradient.dtype.itemsize == 2 else gradient
    axis.all_reduce_(wide)
    return wide.to(gradient.dtype)


put_off: list[Callable[[], None]] | None = None  # products of weights' gradients of this backward pass, where it is split


@contextmanager
def weights_later() -> Iterator[list[Callable[[], None]]]:
    """Backward passes inside make the gradients of inputs, biases, norms and tables; those of linears' weights are made, and added to
    .grad, by calling the functions of the list."""
    global put_off
    before, put_off = put_off, []
    try:
        yield put_off
    finally:
        put_off = before


def inside_no_sync(parameter: torch.Tensor) -> bool:
    return parameter in _inside


def owe(parameter: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A part of a sum is held back, which total(.grad's own block) makes; settle_owed: it has been made."""
    _owed[parameter] = total


def settle_owed(parameter: torch.Tensor) -> None:
    _owed.pop(parameter, None)


def sum_or_defer(
    mesh: Mesh, names: Names, parameter: torch.Tensor, part: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """total(part), the sum over the axes `names`; inside no_sync the part; after it the total of all parts so far."""
    if parameter not in _inside and parameter not in _owed:
        return total(part)
    held = None if parameter.grad is None else getattr(parameter.grad, "_local_tensor", parameter.grad)
    if parameter in _inside:
        # a gradient that is complete already: one of those who will be summed keeps it
        if parameter not in _owed and held is not None and any(mesh.coordinates[name] for name in names):
            held.zero_()
        _owed[parameter] = total
        return part
    del _owed[parameter]
    if held is not None:
        part = part + held
        held.zero_()  # autograd adds the total to it
    return total(part)
