"""Full tensors to blocks and back, as autograd functions: the gradient of each is the other."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ShapeError
from ..function import Function
from ..graph_ops import KNOWN, Meta, Traced, find
from .layout import Block, Cuts, block, blocks_from_shapes, slices


class Scatter(Function):
    """Full -> block `mine`; the gradient is gathered from the ranks' blocks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Any, cuts: Cuts, mine: Block) -> torch.Tensor:
        ctx.mesh, ctx.cuts = mesh, cuts
        return mesh.empty([length for _, length in mine], x.dtype).copy_(x[slices(mine)])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return Gather.apply(grad, ctx.mesh, ctx.cuts), None, None, None


class Gather(Function):
    """Blocks -> full; the gradient is this rank's block of the full one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Any, cuts: Cuts) -> torch.Tensor:
        parts = mesh.world.all_gather(x.contiguous(), counted=False)
        try:
            total, blocks = blocks_from_shapes([part.shape for part in parts], cuts, mesh.sizes)
        except ValueError as error:
            raise ShapeError(f"gather: {error}") from None
        ctx.mesh, ctx.cuts, ctx.mine = mesh, cuts, blocks[mesh.index]
        full = x.new_empty(total)
        for part, place in zip(parts, blocks, strict=True):
            full[slices(place)] = part
        return full

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return Scatter.apply(grad, ctx.mesh, ctx.cuts, ctx.mine), None, None


def own_cuts(cuts: Cuts) -> Cuts:
    """Of a batch that is one data rank's alone."""
    return tuple(tuple(name for name in names if name != "data") for names in cuts)


def _gather_arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    x, mesh = tensors[0], find(words[0])
    return [x, mesh, mesh.cuts(words[1], x.dim(), int(words[2]))]


def _scatter_arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    x, mesh, cuts = _gather_arguments(words, tensors)
    if len(words) > 3 and words[3] == "1":  # this data rank's own
        cuts = own_cuts(cuts)
    return [x, mesh, cuts, block(x.shape, cuts, mesh.sizes, mesh.coordinates)]


def _gathered(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    x, mesh, cuts = _gather_arguments(words, tensors)
    shape = [length * mesh.parts(names) for length, names in zip(x.shape, cuts, strict=True)]
    features = int(words[3])
    if features and mesh.interval(features, cuts[-1])[1] == x.shape[-1]:
        shape[-1] = features
    return [(shape, x.dtype)]


def _scattered(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    x, _, _, mine = _scatter_arguments(words, tensors)
    return [([length for _, length in mine], x.dtype)]


KNOWN["scatter"] = Traced(Scatter, _scatter_arguments, _scattered, saves=False)
KNOWN["gather"] = Traced(Gather, _gather_arguments, _gathered, saves=False)
