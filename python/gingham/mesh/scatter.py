"""Full tensors to blocks and back, as autograd functions: the gradient of each is the other."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ShapeError
from ..function import Function
from ..graph_ops import KNOWN, Meta, Traced, find
from .layout import Block, Cuts, block, blocks_from_shapes, slices


class Scatter(Function):
    """Full -> block `mine`; the gradient is gathered from the ranks' blocks. own: full is this data rank's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Any, cuts: Cuts, mine: Block, own: bool = False) -> torch.Tensor:
        ctx.mesh, ctx.cuts, ctx.own = mesh, cuts, own
        return mesh.empty([length for _, length in mine], x.dtype).copy_(x[slices(mine)])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return Gather.apply(grad, ctx.mesh, ctx.cuts, ctx.own), None, None, None, None


class Gather(Function):
    """Blocks -> full; the gradient is this rank's block of the full one. own: of the ranks of this data rank alone, cuts as own_cuts
    gives them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Any, cuts: Cuts, own: bool = False) -> torch.Tensor:
        sizes = {name: size for name, size in mesh.sizes.items() if not own or name != "data"}
        axis = mesh.axis(tuple(sizes)) if own else mesh.world
        parts = [x] if axis is None else axis.all_gather(x.contiguous(), counted=False)
        try:
            total, blocks = blocks_from_shapes([part.shape for part in parts], cuts, sizes)
        except ValueError as error:
            raise ShapeError(f"gather: {error}") from None
        ctx.mesh, ctx.cuts, ctx.own, ctx.mine = mesh, cuts, own, blocks[0 if axis is None else axis.rank]
        full = x.new_empty(total)
        for part, place in zip(parts, blocks, strict=True):
            full[slices(place)] = part
        return full

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return Scatter.apply(grad, ctx.mesh, ctx.cuts, ctx.mine, ctx.own), None, None, None


def own_cuts(cuts: Cuts) -> Cuts:
    """Of a batch that is one data rank's alone."""
    return tuple(tuple(name for name in names if name != "data") for names in cuts)


def _gather_arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    """words: the mesh, the operand, its dim, "1" where it is this data rank's own, and for gather the features it has."""
    x, mesh, own = tensors[0], find(words[0]), words[3] == "1"
    cuts = mesh.cuts(words[1], x.dim(), int(words[2]))
    return [x, mesh, own_cuts(cuts) if own else cuts, own]


def _scatter_arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    x, mesh, cuts, own = _gather_arguments(words, tensors)
    return [x, mesh, cuts, block(x.shape, cuts, mesh.sizes, mesh.coordinates), own]


def _gathered(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    x, mesh, cuts, _ = _gather_arguments(words, tensors)
    shape = [length * mesh.parts(names) for length, names in zip(x.shape, cuts, strict=True)]
    features = int(words[4])
    if features and mesh.interval(features, cuts[-1])[1] == x.shape[-1]:
        shape[-1] = features
    return [(shape, x.dtype)]


def _scattered(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    x, *_, mine, _ = _scatter_arguments(words, tensors)
    return [([length for _, length in mine], x.dtype)]


KNOWN["scatter"] = Traced(Scatter, _scatter_arguments, _scattered, saves=False)
KNOWN["gather"] = Traced(Gather, _gather_arguments, _gathered, saves=False)
