"""The plan of parallelize: every layer with its grid, what stays on its rank, its block, bytes and memory, and what stayed serial.

Bytes are what a rank receives, on average, in a forward and backward pass of `tokens` rows (docs/theory.md section 4).
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from .. import nn
from ..autograd.casts import local_of
from ..mesh import Mesh
from ..plan import tables
from ..plan.tables import amount, fold
from .attention import MultiheadAttention
from .layers import Conversion, Line

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
    received = layer.received(tokens) if hasattr(layer, "received") else 0
    stationary = _stationary(mesh, layer)
    return line.path, line.kind, line.layout, stationary, here, whole, f"{received / mesh.size:,.0f}", f"{memory:,}"


def _shape(tensor: Any) -> str:
    return " x ".join(map(str, tensor.shape))


def _stationary(mesh: Mesh, layer: Any) -> str:
    """The operands of a layer's products that do not move."""
    if isinstance(layer, nn.Linear) and layer.group is not None:
        first, plan = layer.group.linears[0], layer.group.plan
        return stationary_of(mesh, plan.swapped) if first is layer else "with the first of its x"
    plan = layer.plans[3] if isinstance(layer, MultiheadAttention) else getattr(layer, "plan", None)
    return "" if plan is None else stationary_of(mesh, plan.swapped)


def stationary_of(mesh: Mesh, swapped: bool) -> str:
    """The operands whose axis has one rank: X moves over n, W over m, Y over k (swapped: n and k trade places)."""
    pm, pn, pk = mesh.grid
    moving = {"X": pk if swapped else pn, "W": pm, "Y": pn if swapped else pk}
    still = [operand for operand, size in moving.items() if size == 1]
    return ", ".join(still) or "none"


def show(made: Conversion, tokens: int, width: int | None = None) -> None:
    """Prints the plan, on rank 0: equal blocks on one line, as wide as the terminal (or `width`)."""
    if made.mesh.index:
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
