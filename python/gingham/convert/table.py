"""The plan of parallelize: every layer with its grid, what stays on its rank, its block, bytes and memory, and what stayed serial.

Bytes are what a rank receives, on average, in a forward and backward pass of `tokens` rows (docs/theory.md section 4).
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from .. import nn
from ..autograd.casts import local_of
from ..autograd.linear import LinearPlan
from ..mesh import Mesh
from ..mesh.layout import Cuts, block, coordinates_of, intersection, volume
from ..plan import formulas, tables
from ..plan.tables import amount, fold
from . import costs
from .attention import MultiheadAttention
from .layers import Conversion, FusedLinears, Line

COLUMNS = ("layer", "kind", "layout", "stationary", "weight here", "of", "received", "memory")


def rows(made: Conversion, tokens: int) -> list[tuple[str, ...]]:
    """One row a layer, as COLUMNS; received in bytes a rank and step, memory in bytes of this rank's parameters."""
    return [_row(made, line, tokens) for line in made.lines if line.kind != "dropout"]


def _row(made: Conversion, line: Line, tokens: int) -> tuple[str, ...]:
    mesh, layer = made.mesh, line.layer
    if layer is None:
        owner, _, name = line.path.rpartition(".")
        parameters = [made.model.get_submodule(owner)._parameters[name]]
    else:
        parameters = [parameter for parameter in layer.parameters() if parameter is not None]
    first: Any = parameters[0] if parameters else None
    here, whole = ("-", "-") if first is None else (_shape(local_of(first)), _shape(first))
    memory = sum(local_of(parameter).numel() * parameter.element_size() for parameter in parameters if parameter is not None)
    if line.kind == "classifier, tied":
        memory -= local_of(first).numel() * first.element_size()  # the embedding's
    if line.reason:
        return line.path or "(the model)", line.kind, "serial", "", here, whole, "", f"{memory:,}"
    received, stationary = _traffic(mesh, layer, tokens)
    return line.path, line.kind, line.layout, stationary, here, whole, f"{received / mesh.size:,.0f}", f"{memory:,}"


def _shape(tensor: Any) -> str:
    return " x ".join(map(str, tensor.shape))


def _traffic(mesh: Mesh, layer: Any, tokens: int) -> tuple[int, str]:
    """Bytes of all ranks together, and the operands that do not move."""
    if isinstance(layer, nn.Linear):
        linears, plan = [layer], layer.plan
        if layer.group is not None:
            linears, plan = layer.group.linears, layer.group.plan
            if linears[0] is not layer:
                return 0, "with the first of its x"
        moved = 0
        if isinstance(layer, nn.Classifier) and layer.tied_cuts is not None:
            moved = reshard_bytes(mesh, layer.weight, layer.tied_cuts, layer.plan.weight_cuts, tuple(layer.weight.shape))
        return _linear_bytes(mesh, plan, tokens, linears[0]) + moved, stationary_of(mesh, plan.swapped)
    if isinstance(layer, nn.PatchEmbedding):
        moved = reshard_bytes(mesh, layer.weight, (layer.names, ()), layer.plan.weight_cuts, (layer.width, layer.fan_in))
        return _linear_bytes(mesh, layer.plan, tokens, layer) + moved, stationary_of(mesh, layer.plan.swapped)
    if isinstance(layer, FusedLinears):
        return _linear_bytes(mesh, layer.plan, tokens, layer.q), stationary_of(mesh, layer.plan.swapped)
    if isinstance(layer, MultiheadAttention):
        both = _linear_bytes(mesh, layer.plans[3], tokens, layer.q) + _linear_bytes(mesh, layer.out_proj.plan, tokens, layer.out_proj)
        return both, stationary_of(mesh, layer.plans[3].swapped)
    if isinstance(layer, nn.Embedding):
        return costs.embedding_words(mesh, layer) * layer.weight.element_size(), ""
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        parameters = [parameter for parameter in layer.parameters() if parameter is not None]
        item = max([4, *(parameter.element_size() for parameter in parameters)])
        sums = 2 if isinstance(layer, nn.LayerNorm) else 1
        return formulas.norm_bytes(mesh, tokens, layer.features, item, mesh.layout(layer.layout), sums, len(parameters)), ""
    return 0, ""


def _linear_bytes(mesh: Mesh, plan: LinearPlan, tokens: int, layer: Any) -> int:
    words = costs.linear_words(mesh, tokens, plan.k, list(plan.n), plan.swapped, layer.bias is not None)
    for source, target, features in [(*plan.x, plan.k), *[(plan.y[1], plan.y[0], size) for size in plan.n]]:
        words += costs.relayout_words(mesh, tokens, features, source, target) + costs.relayout_words(mesh, tokens, features, target, source)
    return words * layer.weight.element_size()


def reshard_bytes(mesh: Mesh, weight: Any, source: Cuts, target: Cuts, shape: tuple[int, ...]) -> int:
    """Forward and backward: what every rank's new block has and its old one had not, and the other way round."""
    words = 0
    for rank in range(mesh.size):
        place = coordinates_of(rank, mesh.sizes)
        old, new = (block(shape, cuts, mesh.sizes, place) for cuts in (source, target))
        words += volume(old) + volume(new) - 2 * volume(intersection(old, new))
    return words * weight.element_size()


def stationary_of(mesh: Mesh, swapped: bool) -> str:
    """The operands whose axis has one rank: X moves over n, W over m, Y over k (swapped: n and k trade places)."""
    pm, pn, pk = mesh.grid
    moving = {"X": pk if swapped else pn, "W": pm, "Y": pn if swapped else pk}
    still = [operand for operand, size in moving.items() if size == 1]
    return ", ".join(still) or "none"


def show(made: Conversion, tokens: int, width: int | None = None) -> None:
    """Prints the plan, on rank 0: equal blocks on one line, as wide as the terminal (or `width`)."""
    if made.mesh.rank:
        return
    console, mesh = Console(width=width), made.mesh
    every = rows(made, tokens)
    totals = [sum(int(row[index].replace(",", "") or 0) for row in every) for index in (6, 7)]
    grid = " x ".join(map(str, mesh.grid))
    title = f"{type(made.model).__name__} on {dict(mesh.sizes)}, grid m x n x k = {grid}, {tokens} rows a step"
    cells = [(*row[:6], *(amount(int(cell.replace(",", ""))) if cell else "" for cell in row[6:])) for row in every]
    tables.show(console, title, COLUMNS, fold(cells), COLUMNS[6:], ("all", "", "", "", "", "", *map(amount, totals)))
    for name, reason in fold([(line.path or "the model itself", line.reason) for line in made.lines if line.reason]):
        console.print(f"serial: {name}: {reason}", markup=False, highlight=False)
