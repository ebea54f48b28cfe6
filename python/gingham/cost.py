"""What a training step of a model must receive, and what its layers hold, from THEORY.md: the formula beside the count.

Bytes are summed over all ranks, which is exact for sizes that do not divide too. A linear map Y[M,N] = X[M,K] W[K,N] on
pm x pn x pk ranks receives, forward and backward, 3 MK(pn-1) + 3 KN(pm-1) + 2 MN(pk-1) words; swapped, n and k trade.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import nn
from .layout import Layout, coordinates_of, interval
from .mesh import Mesh


@dataclass(frozen=True)
class Layer:
    """One line of the plan. local, whole: a weight here and in full; blocks: an activation in and out, here; weight:
    bytes of parameters here; received: bytes of a step, all ranks together."""

    name: str
    kind: str
    local: str
    whole: str
    blocks: str
    weight: int
    received: int


def plan(model: torch.nn.Module, mesh: Mesh, batch: int, time: int, loss: tuple[str, int] | None = None) -> list[Layer]:
    """Every layer of a model of gingham.nn layers, fed [batch, time] tokens a step; loss: (layout, vocabulary)."""
    layers = list(_layers(model, mesh, batch, time))
    if loss is not None:
        layers.append(Layer("loss", "cross-entropy", "", "", "", 0, cross_entropy_bytes(mesh, batch * time, mesh.layout(loss[0]))))
    return layers


def _layers(model: torch.nn.Module, mesh: Mesh, batch: int, time: int) -> Iterator[Layer]:
    projections = {part for module in model.modules() if isinstance(module, nn.SelfAttention) for part in (module.q, module.k, module.v)}
    for name, module in model.named_modules():
        if isinstance(module, nn.SelfAttention):
            yield _linear(f"{name}.q,k,v", [module.q, module.k, module.v], module.plan, mesh, batch, time)
        elif isinstance(module, nn.Linear) and module not in projections:
            yield _linear(name, [module], module.plan, mesh, batch, time)
        elif isinstance(module, nn.Embedding):
            item = module.weight.element_size()
            width = mesh.interval(module.width, mesh.outer.features)[1]
            yield _layer(name, "embedding", [module], f"ids -> {width}", item * embedding_words(mesh, module))
        elif isinstance(module, nn.LayerNorm):
            width = mesh.interval(module.features, mesh.layout(module.layout).features)[1]
            yield _layer(name, "layer norm", [module], f"{width} -> {width}", norm_bytes(mesh, batch * time, module))


def _layer(name: str, kind: str, modules: list[Any], blocks: str, received: int) -> Layer:
    weights = [module.weight for module in modules]
    held = [tensor for module in modules for tensor in module.parameters()]
    local, whole = (" x ".join(map(str, shape)) for shape in (weights[0].to_local().shape, weights[0].shape))
    size = sum(tensor.to_local().numel() * tensor.element_size() for tensor in held)
    return Layer(name, kind, local, whole, blocks, size, received)


def _linear(name: str, modules: list[Any], plan: Any, mesh: Mesh, batch: int, time: int) -> Layer:
    words = linear_words(mesh, batch * time, plan.k, list(plan.n), plan.swapped, modules[0].bias is not None)
    ways = [(*plan.x, plan.k), *[(plan.y[1], plan.y[0], size) for size in plan.n]]
    for source, target, features in ways:
        words += time * (relayout_words(mesh, batch, features, source, target) + relayout_words(mesh, batch, features, target, source))
    k, n = (mesh.interval(size, layout.features)[1] for size, layout in ((plan.k, plan.x[0]), (plan.n[0], plan.y[0])))
    kind = f"linear{' x 3' if len(modules) == 3 else ''}{', swapped' if plan.swapped else ''}"
    return _layer(name, kind, modules, f"{k} -> {n}", words * modules[0].weight.element_size())


def linear_words(mesh: Mesh, m: int, k: int, n: list[int], swapped: bool, bias: bool) -> int:
    """Forward and backward of linear maps that share X, without relayouts."""
    pm, pn, pk = mesh.grid
    px, py = (pk, pn) if swapped else (pn, pk)
    depth = mesh.parts(mesh.axes.depth)
    x, y, w = m * k, m * sum(n), k * sum(n)
    # classic 1d: X is whole on every rank, so that of its three passages only dX's sum, an all-reduce, remains
    again, layout = set(mesh.axes.k if swapped else mesh.axes.n), mesh.inner if swapped else mesh.outer
    whole = not again <= {*layout.features, *layout.rows}
    words = (2 if whole else 3) * x * (px - 1) + 2 * y * (py - 1)
    words += 3 * w * (pm - depth) + 2 * w * (depth - 1)
    return words + (2 * sum(n) * py * (pm - 1) if bias else 0)


def relayout_words(mesh: Mesh, rows: int, features: int, source: Layout, target: Layout) -> int:
    """What every rank's new block has and its old one had not; nothing for ranks that hold the new block already."""
    words = 0
    for rank in range(mesh.size if source != target else 0):
        place = coordinates_of(rank, mesh.sizes)
        old, new = (
            [interval(size, names, mesh.sizes, place) for size, names in ((rows, layout.rows), (features, layout.features))]
            for layout in (source, target)
        )
        both = [max(0, min(a + p, b + q) - max(a, b)) for (a, p), (b, q) in zip(old, new, strict=True)]
        words += new[0][1] * new[1][1] - both[0] * both[1]
    return words


def embedding_words(mesh: Mesh, layer: nn.Embedding) -> int:
    """The table gathered forward and its gradient scattered backward over the row ranks; then summed over depth."""
    table, depth = layer.count * layer.width, mesh.parts(mesh.axes.depth)
    ranks = mesh.parts(layer.cut)
    passages = 2 if layer.summed else 1
    return passages * table * depth * (ranks - 1) + 2 * table * (depth - 1)


def norm_bytes(mesh: Mesh, rows: int, layer: nn.LayerNorm) -> int:
    """Two float64 sums a row each way over the feature ranks; gamma's and beta's gradients summed over the row ranks."""
    layout = mesh.layout(layer.layout)
    features, over_rows = mesh.parts(layout.features), mesh.parts(layout.rows)
    item = max(4, layer.weight.element_size()) if layer.weight is not None else 0
    copies = features // mesh.parts(layer.stored)
    gradients = 4 * layer.features * (over_rows - 1) * copies + 4 * layer.features * (copies - 1) * over_rows
    return 2 * 16 * rows * features * (features - 1) + item * gradients


def cross_entropy_bytes(mesh: Mesh, rows: int, layout: Layout) -> int:
    """Four float64 numbers a row over the feature ranks, and two in all over the row ranks."""
    features, over_rows = mesh.parts(layout.features), mesh.parts(layout.rows)
    return 32 * rows * features * (features - 1) + 16 * (over_rows - 1) * mesh.size
