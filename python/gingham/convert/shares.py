"""Samples of data ranks, of which each calls a converted model with its own, and what they weigh in the job.

A loss that the caller takes is the mean over the samples of one data rank; the job's is the mean over all. Outside of a model
gradients are those of the rank's own loss, as torch's DistributedDataParallel has them. Inside they are those of the job's, so that
they can be summed over data: what comes in backward at an output is multiplied by w = samples / samples of all data ranks, what
leaves at an input divided by it, and one model may follow another.

    outside in:  y as it is, backward times w      inside out:  x as it is, backward through w

Second gradients: a gradient g outside stands for w g. A map of gradients, g -> w g from the outside in, so has as its own gradient
the identity, by which gradients of gradients (penalties of one rank's samples, Hessians of the job's loss) are right in every order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..autograd.second_order import alias
from ..function import Function
from ..graph_ops import KNOWN, Traced, find, traced
from ..mesh import Mesh


@dataclass(frozen=True)
class Share:
    """Of one call with `samples` of this data rank."""

    mesh: Mesh
    samples: int

    def weight(self) -> float:
        """A control message over data of 8 bytes, backward."""
        self.mesh.say("parallelize: samples of all data ranks")
        total = sum(count for (count,) in self.mesh.joint(("data",)).sizes([self.samples]))
        return self.samples / total if self.samples else 1.0


def outward(y: torch.Tensor, share: Share) -> torch.Tensor:
    """y, an output, as it is; its gradient goes into the model."""
    return _of(y, share, True)


def inward(x: torch.Tensor, share: Share) -> torch.Tensor:
    """x, an input, as it is; its gradient comes out of the model."""
    return _of(x, share, False)


def _of(x: torch.Tensor, share: Share, enters: bool) -> torch.Tensor:
    if not x.is_floating_point() or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    if torch.compiler.is_compiling():
        return traced("share", [share.mesh.handle, str(share.samples), str(int(enters))], [x])[0]
    return _Share.apply(x, share, enters)


class _Share(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, share: Share, enters: bool) -> torch.Tensor:
        ctx.share, ctx.enters = share, enters
        return alias(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Weighed.apply(grad, ctx.share, ctx.enters), None, None


class _Weighed(Function):
    """A gradient that enters the model, or leaves it."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, share: Share, enters: bool) -> torch.Tensor:
        ctx.share, ctx.enters = share, enters
        return grad * share.weight() if enters else grad / share.weight()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Share.apply(grad, ctx.share, ctx.enters), None, None


KNOWN["share"] = Traced(
    _Share,
    lambda words, tensors: [tensors[0], Share(find(words[0]), int(words[1])), words[2] == "1"],
    lambda words, tensors: [(tensors[0].shape, tensors[0].dtype)],
    saves=False,
)
