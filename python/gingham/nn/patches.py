"""PatchEmbedding: a convolution whose kernel is its stride, as one linear map of the patches."""

from __future__ import annotations

from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..autograd.kept import kept
from ..autograd.linear import linear, linear_plan
from ..autograd.relayout import relayout, reshard
from ..errors import ShapeError
from ..mesh import Mesh, check_local
from ..mesh.layout import Cuts, Layout
from ..plan.formulas import reshard_words
from .layer import Layer, bound_of
from .parameter import Given, make_parameter

Pair = int | tuple[int, int]


class PatchEmbedding(Layer):
    """images [rows, channels, height, width], this rank's rows and all channels (mesh.scatter(images, operand="rows")),
    -> [rows, patches, width], a block in the outer layout; patches in the order of Conv2d(..).flatten(2).

    weight [width, channels, p, p] and bias: DTensors of torch.nn.Conv2d's shapes and initial bits. The step wants the
    flattened input, channels x p x p, cut at torch.chunk's points, which are no cuts of a 4-dimensional tensor: at rest
    the weight is cut over `width` by all axes but depth, and resharded for each call. image_size: what is expected of
    height and width; None: any multiple of patch_size. given: full "weight" and "bias", cut instead of drawn.
    Bytes: those of a Linear, at most w/P words a rank of the weight and as many of its gradient for the reshard, and
    where images have a gradient a gather of it over the feature axes. Raises ShapeError where images do not fit.
    """

    def __init__(
        self,
        image_size: Pair | None,
        patch_size: Pair,
        channels: int,
        width: int,
        bias: bool = True,
        mesh: Mesh | None = None,
        *,
        swapped: bool | str | None = None,
        dtype: torch.dtype | None = None,
        given: Given = None,
        device: Any = None,
    ) -> None:
        self.begin(mesh, device)
        self.channels, self.width = channels, width
        self.patch_size = _pair(patch_size)
        self.image_size = None if image_size is None else _pair(image_size)
        if self.image_size is not None and any(size % patch for size, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ShapeError(
                f"PatchEmbedding: rank {self.mesh.rank} got images of {self.image_size}, expected multiples of {self.patch_size}"
            )
        self.fan_in = channels * prod(self.patch_size)
        self.plan = linear_plan(self.mesh, self.fan_in, [width], "outer->outer", swapped, "patches").owned_by(self)
        self.names = tuple(name for name, size in self.mesh.sizes.items() if size > 1 and name not in self.mesh.axes.depth)
        shape = (width, channels, *self.patch_size)
        self.weight = make_parameter(self.mesh, (self.names, (), (), ()), "weight", shape, partial(self.draw, "weight"), dtype, given)
        self.bias: torch.nn.Parameter | None = None
        if bias:
            self.bias = make_parameter(self.mesh, self.plan.bias_cuts, "bias", (width,), partial(self.draw, "bias"), dtype, given)

    def draw(self, name: str, full: torch.Tensor) -> None:
        if name == "weight":
            torch.nn.init.kaiming_uniform_(full, a=sqrt(5))
        else:
            torch.nn.init.uniform_(full, -bound_of(self.fan_in), bound_of(self.fan_in))

    def ends(self, x: torch.Tensor) -> tuple[Cuts, Cuts]:
        return Layout(self.mesh.outer.rows, ()).cuts(x.dim()), self.mesh.outer.cuts(3)

    def received(self, rows: int, inner: int = 1) -> int:
        """Of images without a gradient; and the weight, stored whole in its features, cut anew."""
        words = reshard_words(self.mesh, (self.width, self.fan_in), (self.names, ()), self.plan.weight_cuts)
        return words * self.weight.element_size() + self.plan.received(self, rows, inner, need_x=False)

    def sizes(self) -> tuple[int, ...]:
        return self.channels, self.width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mesh, outer = self.mesh, self.mesh.outer
        check_local(images, "PatchEmbedding's images", mesh)
        if not self._fits(images):
            sizes = self.image_size or tuple(f"a multiple of {patch}" for patch in self.patch_size)
            raise ShapeError(
                f"PatchEmbedding: rank {mesh.rank} got images of shape {tuple(images.shape)}, expected [rows, {self.channels}, {sizes[0]},"
                f" {sizes[1]}], whole images of this rank's rows: mesh.scatter(images, operand='rows')"
            )
        (high, wide), rows = self.patch_size, len(images)
        grid = (images.shape[2] // high, images.shape[3] // wide)
        patches = images.reshape(rows, self.channels, grid[0], high, grid[1], wide)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, prod(grid), self.fan_in)
        x = relayout(patches, mesh, Layout(outer.rows, ()), outer, self.fan_in)
        weight = self.placed("weight")
        weight = weight if isinstance(weight, DTensor) else weight.flatten(1)
        weight = reshard(weight, mesh, (self.names, ()), self.plan.weight_cuts, (self.width, self.fan_in))
        weight = kept(weight, mesh, self.plan.weight_cuts, (self.width, self.fan_in))
        return linear(x, [weight], [self.operand("bias")], self.plan)[0]

    def _fits(self, images: torch.Tensor) -> bool:
        if images.dim() != 4 or images.shape[1] != self.channels:
            return False
        size = tuple(images.shape[2:])
        return size == self.image_size if self.image_size else all(s % p == 0 for s, p in zip(size, self.patch_size, strict=True))

    def extra_repr(self) -> str:
        sizes = f"image_size={self.image_size}, patch_size={self.patch_size}, bias={self.bias is not None}"
        return f"{self.channels}, {self.width}, {sizes}, swapped={self.plan.swapped}"


def _pair(size: Pair) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
