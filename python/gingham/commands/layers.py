"""The layers of a model, what each holds here and what a training step of it receives: the table of `python -m gingham train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import nn
from ..mesh import Mesh
from ..plan.formulas import cross_entropy_bytes, embedding_sums, feature_words, linear_saved, targets_bytes
from ..plan.pipeline import border_bytes, sizes_of_parts, usual_stages
from .arguments import parts_in


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


def plan(
    model: torch.nn.Module, mesh: Mesh, batch: int, time: int, loss: tuple[str, int] | None = None, grid: Mapping[str, Any] | None = None
) -> list[Layer]:
    """Every layer of a model of gingham.nn layers, fed [batch, time] tokens a step; loss: (layout, vocabulary). grid: of
    arguments.mesh_arguments, whose micro-batches pay for sums over replicas once, and whose stages hand on what they have made."""
    rows = sizes_of_parts(batch, parts_in(grid or {}))
    layers = list(_layers(model, mesh, rows, time, "pipeline" in (grid or {})))
    if loss is not None:
        ends = mesh.layout(loss[0])
        received = sum(cross_entropy_bytes(mesh, each * time, ends) for each in rows)
        received += sum(targets_bytes(mesh, each, time, ends) for each in rows) if grid is not None and "pipeline" in grid else 0
        layers.append(Layer("loss", "cross-entropy", "", "", "", 0, received))
    if grid is not None and mesh.pipeline.size > 1:
        size, schedule = grid["pipeline"]["size"], grid["pipeline"]["schedule"]
        width = next(module.width for module in model.modules() if isinstance(module, nn.Embedding))
        received = border_bytes(mesh, batch * time, [width] * size * usual_stages(schedule), size, schedule)
        layers.append(Layer("borders", f"{size} stages, {schedule}", "", "", "", 0, received))
    return layers


def _layers(model: torch.nn.Module, mesh: Mesh, rows: Sequence[int], time: int, accumulates: bool) -> Iterator[Layer]:
    projections = {part for module in model.modules() if isinstance(module, nn.SelfAttention) for part in (module.q, module.k, module.v)}

    def received(call: Callable[[int, int], int], saved: int) -> int:
        return sum(call(each, time) for each in rows) - saved

    def saved(plan: Any, layer: Any) -> int:
        words = linear_saved(mesh, plan.k, plan.n, plan.swapped, layer.bias is not None, len(rows)) if accumulates else 0
        return int(words * layer.weight.element_size())

    for name, module in model.named_modules():
        if isinstance(module, nn.SelfAttention):
            parts = [module.q, module.k, module.v]
            yield _linear(f"{name}.q,k,v", parts, module.plan, mesh, received(module.projected, saved(module.plan, module.q)))
            if mesh.outer.time:
                passed = sum(module.passed(each, time) for each in rows)
                yield Layer(f"{name}.kv", f"attention, {module.way}", "", "", "", 0, passed)
        elif isinstance(module, nn.Linear) and module not in projections:
            yield _linear(name, [module], module.plan, mesh, received(module.received, saved(module.plan, module)))
        elif isinstance(module, nn.Embedding):
            width = mesh.interval(module.width, mesh.outer.features)[1]
            once = embedding_sums(mesh, module.count, module.width) * module.weight.element_size()
            yield _layer(name, "embedding", [module], f"ids -> {width}", received(module.received, (len(rows) - 1) * once))
        elif isinstance(module, nn.LayerNorm):
            width = mesh.interval(module.features, mesh.layout(module.layout).features)[1]
            held = [each.element_size() for each in module.parameters()]
            once = len(held) * max(4, *held) * feature_words(mesh, module.features, mesh.layout(module.layout))
            yield _layer(name, "layer norm", [module], f"{width} -> {width}", received(module.received, (len(rows) - 1) * once))


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
