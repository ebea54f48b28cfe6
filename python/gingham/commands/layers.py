"""The layers of a model, what each holds here and what a training step of it receives: the table of `python -m gingham train`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import nn
from ..mesh import Mesh
from ..plan.formulas import cross_entropy_bytes


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
            parts = [module.q, module.k, module.v]
            yield _linear(f"{name}.q,k,v", parts, module.plan, mesh, module.projected(batch, time))
        elif isinstance(module, nn.Linear) and module not in projections:
            yield _linear(name, [module], module.plan, mesh, module.received(batch, time))
        elif isinstance(module, nn.Embedding):
            width = mesh.interval(module.width, mesh.outer.features)[1]
            yield _layer(name, "embedding", [module], f"ids -> {width}", module.received(batch, time))
        elif isinstance(module, nn.LayerNorm):
            width = mesh.interval(module.features, mesh.layout(module.layout).features)[1]
            yield _layer(name, "layer norm", [module], f"{width} -> {width}", module.received(batch, time))


def _layer(name: str, kind: str, modules: list[Any], blocks: str, received: int) -> Layer:
    weights = [module.weight for module in modules]
    held = [tensor for module in modules for tensor in module.parameters()]
    local, whole = (" x ".join(map(str, shape)) for shape in (weights[0].to_local().shape, weights[0].shape))
    size = sum(tensor.to_local().numel() * tensor.element_size() for tensor in held)
    return Layer(name, kind, local, whole, blocks, size, received)


def _linear(name: str, modules: list[Any], plan: Any, mesh: Mesh, received: int) -> Layer:
    k, n = (mesh.interval(size, layout.features)[1] for size, layout in ((plan.k, plan.x[0]), (plan.n[0], plan.y[0])))
    kind = f"linear{' x 3' if len(modules) == 3 else ''}{', swapped' if plan.swapped else ''}"
    return _layer(name, kind, modules, f"{k} -> {n}", received)
