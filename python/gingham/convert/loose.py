"""Parameters that stand in a module of the original model, not in a layer of ours, and that its own code reads by name.

The parameter is a DTensor, cut or copied; the module's code must see this rank's block as a plain tensor, and the block's
gradient must be summed over the ranks that hold other rows. So the module's class is replaced by a subclass of it in which
the name is a property; the state dict still holds the DTensor under its own name. Outside of the model's calls, where every
rank has whole tensors, the property gives that DTensor too, to optimizers, hooks and a loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..autograd.casts import like, local_of
from ..autograd.relayout import reshard
from ..autograd.second_order import alias, check_versions, summed, to_parameter, versions_of
from ..errors import ShapeError
from ..function import Function
from ..graph_ops import KNOWN, Traced, block_of, find, names_of, own, traced
from ..mesh import Mesh, promised
from ..mesh.layout import Cuts, Names


def hold(
    module: torch.nn.Module, name: str, mesh: Mesh, cuts: Cuts, summed: Names, held: torch.nn.Parameter | None = None
) -> torch.nn.Parameter:
    """Makes `module.name` a DTensor cut as `cuts` whose block the module's code reads, its gradient all-reduced over `summed`.
    held: the DTensor that another layer has made of the same parameter; cut otherwise, its block is fetched at each read, which
    needs the same gradient from every rank, as the sum over `summed` gives.

    Bytes: 2 (g-1)/g of the block, backward, over the g ranks of `summed`; of a table held by others what this rank has not.
    """
    old = module._parameters[name]
    assert old is not None
    if held is None:
        parameter = promised.parameter(mesh, old.data, cuts)
        parameter.requires_grad_(old.requires_grad)
    else:
        parameter = held
    module._parameters[name] = parameter
    own(module)
    module.__class__ = _reading(type(module))
    module.__dict__.setdefault("_loose", {})[name] = (mesh, summed, cuts, parameter.shape)
    _readable(type(module), name)
    return parameter


def give_outside(model: torch.nn.Module, inside: Any) -> None:
    """Whatever reads one of these parameters outside of the model's calls, which `inside` tells, gets the parameter itself."""
    for module in model.modules():
        for name in module.__dict__.get("_loose", ()):
            module.__dict__["_inside"] = inside
            if module._parameters.get(name) is not None:
                module._parameters[name].read_by_name = inside  # type: ignore[union-attr]


def cuts_of(mesh: Mesh, parameter: Any) -> Cuts:
    """Which axes cut each dim of a DTensor on the mesh."""
    cuts: list[Names] = [()] * parameter.dim()
    for axis, placement in zip(mesh.sizes, parameter.placements, strict=True):
        if placement.is_shard():
            cuts[placement.dim] += (axis,)
    return tuple(cuts)


_subclasses: dict[type, type] = {}


def _reading(cls: type) -> type:
    """A subclass of `cls` of the same name whose properties read blocks."""
    if "_reads_blocks" in cls.__dict__:
        return cls
    if cls not in _subclasses:
        made = type(cls.__name__, (cls,), {"_reads_blocks": True, "__module__": cls.__module__, "__doc__": cls.__doc__})
        if issubclass(cls, torch.nn.RNNBase):
            made._flat_weights = property(  # type: ignore[attr-defined]
                lambda self: [getattr(self, name) for name in self._flat_weights_names], lambda self, value: None
            )
        _subclasses[cls] = made
    return _subclasses[cls]


def _readable(cls: type, name: str) -> None:
    if name in cls.__dict__:
        return

    def read(self: torch.nn.Module) -> Any:
        if name not in self._parameters:  # it was taken out
            if name in self.__dict__:
                return self.__dict__[name]
            raise AttributeError(name)  # upon which Python asks Module.__getattr__
        parameter: Any = self._parameters[name]
        loose = self.__dict__.get("_loose", {})
        if name not in loose or parameter is None:
            return parameter
        inside = self.__dict__.get("_inside")
        mesh, summed, cuts, shape = loose[name]
        if inside is not None and not inside.is_here():
            # a graph has no operation of a DTensor and a plain tensor, nor a mean of the data ranks' gradients
            plain = torch.compiler.is_compiling() and isinstance(parameter, DTensor) and not any(cuts) and mesh.data.size == 1
            return block_of(parameter) if plain else parameter
        if not isinstance(parameter, DTensor):  # torch.func.functional_call put it there
            if parameter.shape != shape:
                got = f"{type(self).__name__}: rank {mesh.rank} got a plain tensor {tuple(parameter.shape)} for {name}"
                raise ShapeError(f"{got}, expected the full one, {tuple(shape)}, the same on every rank")
            parameter = reshard(parameter, mesh, ((),) * len(shape), cuts, shape)
        elif cuts_of(mesh, parameter) != cuts:
            parameter = reshard(parameter, mesh, cuts_of(mesh, parameter), cuts)
        if torch.compiler.is_compiling():
            return traced("block", [mesh.handle, ",".join(summed)], [block_of(parameter)])[0]
        return _Block.apply(parameter, mesh, summed)

    def write(self: torch.nn.Module, value: Any) -> None:  # of what Module.__setattr__ has no other place for
        self.__dict__[name] = value

    def delete(self: torch.nn.Module) -> None:
        if name not in self.__dict__:
            raise AttributeError(name)
        del self.__dict__[name]

    setattr(cls, name, property(read, write, delete))


def shared_gradient(x: torch.Tensor, mesh: Mesh, summed: Names) -> torch.Tensor:
    """x as it is, the same on the ranks of the axes `summed`, each of which uses it in a way of its own: its gradient is their sum."""
    if torch.compiler.is_compiling():
        return traced("block", [mesh.handle, ",".join(summed)], [x])[0]
    return _Block.apply(x, mesh, summed)


class _Block(Function):
    """A DTensor's own block; backward sums its gradient over the axes `summed`."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, mesh: Mesh, summed: Names) -> torch.Tensor:
        ctx.parameter, ctx.mesh, ctx.summed = parameter, mesh, summed
        # the module's own operations save this block, whose version no in-place operation on the parameter counts up
        ctx.versions = versions_of([("parameter", parameter)])
        return alias(local_of(parameter))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        check_versions("a module kept whole", ctx.mesh, ctx.versions)
        if torch.is_grad_enabled():
            return to_parameter(summed(grad, ctx.mesh, ctx.summed), ctx.parameter), None, None
        axis = ctx.mesh.axis(ctx.summed)
        if axis is not None:
            grad = grad.contiguous().clone()
            axis.all_reduce_(grad)
        return like(grad.contiguous(), ctx.parameter), None, None


def _arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    return [tensors[0], find(words[0]), names_of(words[1])]


KNOWN["block"] = Traced(_Block, _arguments, lambda words, tensors: [(tensors[0].shape, tensors[0].dtype)], reads=lambda words, needs: (0,))
