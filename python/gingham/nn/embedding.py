"""Embedding: a table cut over rows and features of the mesh."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from ..autograd.background import Work, all_reduced, summed
from ..autograd.casts import like, local_of
from ..autograd.gradients import deferring, sum_or_defer
from ..autograd.indices import check_indices
from ..autograd.lookup import rows_of, sums_of_rows
from ..autograd.second_order import gathered, refuse_deferred, replay, shared
from ..checks import row_dim
from ..errors import MeshError, ShapeError
from ..function import Function
from ..graph_ops import KNOWN, Meta, Traced, block_of, find, register, traced
from ..mesh import Mesh, check_local
from ..mesh.layout import Cuts, chunks
from ..plan.formulas import embedding_words, table_axes
from .layer import Layer, size_of
from .parameter import Given, make_parameter


class Embedding(Layer, torch.nn.Embedding):
    """torch.nn.Embedding: ids [...] (cut like rows, mesh.scatter(ids)) -> [..., width], a block in the outer layout.

    weight: a DTensor [count, width]; width lies on outer's feature axes, count on the axes that the activations' rows
    lie on (not depth, where weights are replicated) or, in classic 1d, on tp. Forward gathers this rank's columns of
    the table, backward reduce-scatters their gradient. padding_idx: its row is drawn as 0 and has no gradient.
    max_norm is refused: it renormalises rows of the table in place during forward, and the rows that one rank looks up
    lie on others. given: {"weight": full table}, cut instead of drawn.
    Bytes: count x width words gathered over the row ranks, the same again reduce-scattered, an all-reduce over depth;
    classic 1d: the gather alone. Gradients of 16-bit tables are summed and travel in float32.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mesh: Mesh | None = None,
        dtype: torch.dtype | None = None,
        *,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        given: Given = None,
        device: Any = None,
    ) -> None:
        self.begin(mesh, device)
        count, width = size_of("Embedding", "num_embeddings", num_embeddings), size_of("Embedding", "embedding_dim", embedding_dim)
        self.num_embeddings, self.embedding_dim, self.count, self.width = count, width, count, width
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, norm_type, False, False
        if max_norm is not None:
            raise NotImplementedError(
                f"Embedding: max_norm={max_norm} would renormalise rows of the table in place in forward, rows that lie on other ranks;"
                " renormalise the table after the optimizer's step instead"
            )
        if scale_grad_by_freq or sparse:
            raise NotImplementedError(
                f"Embedding: scale_grad_by_freq={scale_grad_by_freq}, sparse={sparse}: the table's gradient is dense and summed over the"
                " ranks; leave both out"
            )
        if padding_idx is not None and not -count <= padding_idx < count:
            raise ShapeError(f"Embedding({count}): rank {self.mesh.rank} got padding_idx={padding_idx}, expected {-count}..{count - 1}")
        self.padding_idx = None if padding_idx is None else padding_idx % count
        axes, outer = self.mesh.axes, self.mesh.outer
        self.cut, self.summed = table_axes(self.mesh)
        self.cuts = (self.cut + axes.kept, outer.features)
        self.weight = make_parameter(self.mesh, self.cuts, "weight", (count, width), partial(self.draw, "weight"), dtype, given)
        self.place = SimpleNamespace(
            mesh=self.mesh, cut=self.cut, summed=self.summed, count=count, width=width, padding_idx=self.padding_idx, label="Embedding"
        )
        self.place.owner = weakref.ref(self)
        self.handle = register(self.mesh, self.place)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, embeddings: torch.Tensor, freeze: bool = True, padding_idx: int | None = None, mesh: Mesh | None = None, **others: Any
    ) -> Embedding:
        """Of a full table [num_embeddings, embedding_dim], the same on every rank; freeze: it is not trained."""
        if embeddings.dim() != 2:
            raise ShapeError(f"Embedding.from_pretrained: got a tensor {tuple(embeddings.shape)}, expected [num_embeddings, embedding_dim]")
        count, width = embeddings.shape
        made = cls(count, width, mesh, padding_idx=padding_idx, given={"weight": embeddings}, **others)
        made.weight.requires_grad_(not freeze)
        return made

    def draw(self, name: str, full: torch.Tensor) -> None:
        torch.nn.init.normal_(full)
        if self.padding_idx is not None:
            full[self.padding_idx].fill_(0)

    def ends(self, x: torch.Tensor) -> tuple[Cuts, Cuts]:
        outer = self.mesh.outer
        ids = replace(outer, features=())
        dim = row_dim(x, ids, True)
        return ids.cuts(x.dim(), dim, ids=True), outer.cuts(x.dim() + 1, dim)

    def received(self, rows: int, inner: int = 1) -> int:
        return embedding_words(self.mesh, self.count, self.width) * self.weight.element_size()

    def sizes(self) -> tuple[int, ...]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return traced("embedding", [self.handle], [block_of(self.operand("weight")), self._checked(ids)])[0]
        self.place.label, self.place.owner = self.label(), weakref.ref(self)
        try:
            return _Embedding.apply(self.operand("weight"), self._checked(ids), self.place)
        except (ShapeError, MeshError, TypeError) as error:
            raise self.named(error) from None

    def _checked(self, ids: torch.Tensor) -> torch.Tensor:
        check_local(ids, "Embedding's ids", self.mesh)
        if ids.is_floating_point():
            raise TypeError(f"Embedding: got ids of {ids.dtype}, expected an integer dtype")
        return ids

    def extra_repr(self) -> str:
        return f"{self.count}, {self.width}" + ("" if self.padding_idx is None else f", padding_idx={self.padding_idx}")


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor, layer: Any) -> torch.Tensor:
        mesh: Mesh = layer.mesh
        check_indices(mesh, ids, layer.count, None, f"rank {mesh.rank}: an id", partial(_named, layer.owner, layer.label))
        ctx.layer, ctx.weight = layer, weight
        ctx.save_for_backward(ids)
        axis, local = mesh.axis(layer.cut), local_of(weight)
        ctx.label = layer.label
        mesh.say(ctx.label, moves=axis is not None)
        return rows_of(mesh, torch.cat(axis.all_gather(local)) if axis is not None else local, ids)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (ids,), layer, mesh = ctx.saved_tensors, ctx.layer, ctx.layer.mesh
        if torch.is_grad_enabled():
            refuse_deferred("an Embedding", mesh, deferring([ctx.weight]))
            return *replay(lambda block: [_look_up(layer, block, ids)], [ctx.weight], [True], [dy]), None, None
        own = mesh.axis(layer.cut) is not None and not layer.summed  # every rank has all rows of dy, and sums those of its ids
        first, count = mesh.interval(layer.count, layer.cut) if own else (0, layer.count)
        table = sums_of_rows(mesh, dy, ids, first, count, layer.padding_idx)
        if mesh.axis(layer.cut) is not None or mesh.axis(mesh.axes.depth) is not None:
            mesh.say(ctx.label)
        depth = () if mesh.axes.kept else mesh.axes.depth  # else where the pieces of the whole are summed
        if deferring([ctx.weight]):
            table = sum_or_defer(mesh, depth, ctx.weight, _own_rows(layer)(mesh.axis, table), partial(all_reduced(depth), mesh.axis))
            return like(table.to(dy.dtype), ctx.weight), None, None

        def work(axis_of: Any, table: torch.Tensor) -> torch.Tensor:
            return all_reduced(depth)(axis_of, _own_rows(layer)(axis_of, table))

        total = summed(mesh, [ctx.weight], [ctx.next_functions[0][0]], table, work, ctx.label)
        return like(None if total is None else total.to(dy.dtype), ctx.weight), None, None


def _named(owner: Any, label: str, error: ShapeError) -> ShapeError:
    """With the name of the layer whose ids they are."""
    layer = owner()
    return ShapeError(f"{label}: {error}") if layer is None else layer.named(error)


def _own_rows(layer: Any) -> Work:
    """The work of the sum of a table's gradient over the ranks that cut its rows: to each its own."""
    lengths = chunks(layer.count, [layer.mesh.sizes[name] for name in layer.cut])

    def work(axis_of: Any, table: torch.Tensor) -> torch.Tensor:
        axis = axis_of(layer.cut) if layer.summed else None
        return table if axis is None else axis.reduce_scatter(table, lengths)

    return work


def _look_up(layer: Any, block: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The forward pass in functions whose gradients have gradients."""
    mesh, ids = layer.mesh, ids.long()
    if mesh.job.has_gpu:  # what forward has found stops no kernel here
        ids = ids.clamp(0, layer.count - 1)
    lengths = chunks(layer.count, [mesh.sizes[name] for name in layer.cut])
    block = block if mesh.axes.kept else shared(block, mesh, mesh.axes.depth)
    table = gathered(block, mesh, layer.cut, lengths, bool(layer.summed))
    rows = table[ids]
    if layer.padding_idx is None:
        return rows
    return torch.where((ids == layer.padding_idx).unsqueeze(-1), rows.detach(), rows)


def _results(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    layer, (weight, ids) = find(words[0]), tensors
    return [((*ids.shape, layer.mesh.interval(layer.width, layer.mesh.outer.features)[1]), weight.dtype)]


KNOWN["embedding"] = Traced(_Embedding, lambda words, tensors: [*tensors, find(words[0])], _results)
