"""Weights that are cut over data at rest and stand whole while they are used: parallel=dict(data=dict(size=, shard="state")), ZeRO-1 and 2.

A parameter, its gradient and the optimizer's states are this rank's piece. The first use after the parameter changed gathers the
others' pieces over data into one tensor that later uses, forward, backward and in all micro-batches, read; its gradient is
reduce-scattered over data, after no_sync once for all micro-batches. Words a rank, of w words in the whole: w (d-1)/d each way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..errors import MeshError
from ..function import Function
from ..graph_ops import KNOWN, Meta, Traced, block_of, find, names_of, traced
from ..mesh import Mesh, writes
from ..mesh.layout import Cuts, Names, chunks, position
from . import background, gradients
from .casts import like, local_of
from .second_order import alias, check_versions, refuse_deferred, scattered, summed, to_parameter, versions_of


@dataclass
class Whole:
    """What stands for a parameter while it is used."""

    key: Any = None  # of the parameter as it was gathered
    tensor: torch.Tensor | None = None
    used: Any = None  # weakly, the tensor of the graph that uses now share
    part: torch.Tensor | None = None  # of the gradient, of micro-batches under no_sync
    version: int = 0  # of the gradient after them

    def __reduce__(self) -> Any:
        """A parameter's copy, or one that is read from a file, has none of its own yet."""
        return Whole, ()


def kept(parameter: Any, mesh: Mesh, cuts: Cuts, shape: Sequence[int]) -> Any:
    """The parameter, or where the mesh keeps weights whole over data, this rank's block of it as steps use it: a plain tensor, cut over
    the other axes. parameter: of the global `shape`, a DTensor, or a plain block cut as `cuts`, which is gathered at each call. Raises
    MeshError in a later backward pass where its gradient was changed under no_sync."""
    find_dim = _kept_dim if torch.compiler.is_compiling() else _known_dim
    if parameter is None or (where := find_dim(mesh.axes.kept, cuts)) is None or mesh.parts(mesh.axes.kept) == 1:
        return parameter
    dim, names = where
    if torch.compiler.is_compiling():
        return traced("kept", [mesh.handle, str(dim), ",".join(names), str(shape[dim])], [block_of(parameter)])[0]
    size = shape[dim]
    if not isinstance(parameter, DTensor) or not (parameter.requires_grad and torch.is_grad_enabled()):
        return _Kept.apply(parameter, mesh, dim, names, size)
    whole = _whole_of(parameter)
    used = None if whole.used is None else whole.used()
    if used is None or used.key != key_of(parameter):  # not whole.key, which a use without gradients brings up to date
        used = _Kept.apply(parameter, mesh, dim, names, size)
        used.kept, used.key = whole.tensor, whole.key
        whole.used = weakref.ref(used)
    return used


def _kept_dim(kept: Names, cuts: Cuts) -> tuple[int, Names] | None:
    """The dim that axes which weights are kept whole over cut, and all axes that cut it."""
    found = [(dim, names) for dim, names in enumerate(cuts) if set(names) & set(kept)]
    if not found:
        return None
    (one,) = found
    return one


_known_dim = cache(_kept_dim)


def _whole_of(parameter: torch.Tensor) -> Whole:
    found: Whole | None = parameter.__dict__.get("_kept_whole")
    if found is None:
        found = parameter._kept_whole = Whole()  # type: ignore[attr-defined]
    return found


def key_of(parameter: Any) -> Any:
    """Of its values: what changes a parameter counts up one of these, or is a write to a DTensor of ours."""
    local = parameter._local_tensor
    return id(local), local._version, parameter._version, local.dtype, writes.last_write(parameter)


def _lengths(mesh: Mesh, names: Names, size: int) -> list[int]:
    """Of the pieces that make this rank's whole block of a dim of `size` cut over `names`, the last of which is kept."""
    return _pieces(size, tuple(mesh.sizes[name] for name in names), position(names[:-1], mesh.sizes, mesh.coordinates))


@cache
def _pieces(size: int, parts: tuple[int, ...], place: int) -> list[int]:
    return chunks(size, list(parts))[place * parts[-1] : (place + 1) * parts[-1]]


class _Kept(Function):
    """This rank's piece -> the whole; the gradient is reduce-scattered, and summed over depth."""

    @staticmethod
    def forward(ctx: Any, parameter: Any, mesh: Mesh, dim: int, names: Names, size: int) -> torch.Tensor:
        ctx.parameter, ctx.mesh, ctx.dim, ctx.names, ctx.size = parameter, mesh, dim, names, size
        ctx.versions = versions_of([("weight", parameter)])
        if not isinstance(parameter, DTensor):
            return _gathered(parameter, mesh, dim, _lengths(mesh, names, size))
        whole = _whole_of(parameter)
        key = key_of(parameter)
        if whole.tensor is None or whole.key != key:
            whole.tensor = None  # its memory may serve again
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext(), torch.no_grad():
                whole.tensor = _gathered(parameter._local_tensor, mesh, dim, _lengths(mesh, names, size))
            whole.key = key
        return alias(whole.tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        mesh, dim, parameter = ctx.mesh, ctx.dim, ctx.parameter
        check_versions("a layer kept whole over data", mesh, ctx.versions)
        lengths = _lengths(mesh, ctx.names, ctx.size)
        if torch.is_grad_enabled():
            refuse_deferred("a weight kept whole over data", mesh, gradients.deferring([parameter]))
            piece = scattered(grad.transpose(0, dim), mesh, mesh.axes.kept, lengths).transpose(0, dim)
            return to_parameter(summed(piece, mesh, mesh.axes.depth), parameter), *[None] * 4
        wide = grad if grad.dtype == torch.float64 else grad.float()
        work, label = _sum_of(mesh, dim, lengths), "the gradient of a weight kept whole over data"
        if gradients.deferring([parameter]):
            total = _taken_up(parameter, wide, partial(work, mesh.axis))
            if total is None:
                return like(torch.zeros_like(local_of(parameter)), parameter), *[None] * 4
            mesh.say(label)
            total = work(mesh.axis, total)
        else:
            mesh.say(label)
            total = background.summed(mesh, [parameter], [ctx.next_functions[0][0]], wide, work, label)
        return like(None if total is None else total.to(grad.dtype), parameter), *[None] * 4


def _gathered(block: torch.Tensor, mesh: Mesh, dim: int, lengths: list[int]) -> torch.Tensor:
    mesh.say("a weight kept whole over data")
    if dim == 0:
        whole = mesh.empty([sum(lengths), *block.shape[1:]], block.dtype)
        mesh.joint(mesh.axes.kept).all_gather_into(block.contiguous(), whole.split(lengths))
        return whole
    parts = mesh.joint(mesh.axes.kept).all_gather(block.contiguous())
    shape = list(block.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return torch.cat(parts, dim, out=mesh.empty(shape, block.dtype))


def _sum_of(mesh: Mesh, dim: int, lengths: list[int]) -> background.Work:
    """The work of the sum over data and depth, of which this rank gets its piece."""

    def work(axis_of: background.AxisOf, grad: torch.Tensor) -> torch.Tensor:
        kept = axis_of(mesh.axes.kept)
        assert kept is not None, mesh
        piece = kept.reduce_scatter(grad.transpose(0, dim).contiguous(), lengths).transpose(0, dim).contiguous()
        return background.all_reduced(mesh.axes.depth)(axis_of, piece)

    return work


def _taken_up(parameter: Any, grad: torch.Tensor, total_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    """Inside no_sync None, the gradient added to those before; after it their sum. total_of: its sum over ranks."""
    whole = _whole_of(parameter)
    if whole.part is not None and parameter.grad is None:
        whole.part = None  # zero_grad
    if whole.part is not None and parameter.grad._version != whole.version:
        raise MeshError(
            f"a weight {tuple(parameter.shape)} kept whole over data: its gradient was changed while no_sync held parts of it back;"
            " zero_grad() drops them (set_to_none=True), else leave .grad alone until the backward pass after no_sync"
        )
    total = grad if whole.part is None else whole.part.add_(grad)
    if not gradients.inside_no_sync(parameter):
        whole.part = None
        gradients.settle_owed(parameter)
        return total
    whole.part = total.clone() if whole.part is None else total
    gradients.owe(parameter, partial(_made_up, weakref.ref(parameter), total_of))
    torch.autograd.Variable._execution_engine.queue_callback(partial(_note, weakref.ref(parameter)))
    return None


def _made_up(parameter: Any, total_of: Callable[[torch.Tensor], torch.Tensor], held: torch.Tensor) -> torch.Tensor:
    """For gradients.make_sums: what .grad holds, and the sum of the parts."""
    whole = _whole_of(parameter())
    part, whole.part = whole.part, None
    return held if part is None else held + total_of(part).to(held.dtype)


def _note(parameter: Any) -> None:
    held = parameter()
    if held is not None and held.grad is not None:
        _whole_of(held).version = held.grad._version


def _arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    return [tensors[0], find(words[0]), int(words[1]), names_of(words[2]), int(words[3])]


def _results(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    block, mesh, dim, names, size = _arguments(words, tensors)
    shape = list(block.shape)
    shape[dim] = sum(_lengths(mesh, names, size))
    return [(shape, block.dtype)]


KNOWN["kept"] = Traced(_Kept, _arguments, _results, reads=lambda words, needs: (0,))
