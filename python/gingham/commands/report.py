"""What `python -m gingham train` shows: the plan before the run, the result after it, the loss curve."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from rich.console import Console

from ..plan import tables
from ..plan.tables import amount
from . import layers


def describe(mesh: Any) -> str:
    axes = mesh.sizes if mesh.whole is None else mesh.whole.sizes
    named = " x ".join(f"{name} {size}" for name, size in axes.items())
    return f"{world_of(mesh).size} ranks: {named}"


def world_of(mesh: Any) -> Any:
    """The mesh of all the job's ranks: with a pipeline the one around the stages'."""
    return mesh.whole or mesh


def show_plan(console: Console, mesh: Any, planned: list[layers.Layer], options: Namespace) -> None:
    """Of every layer its blocks, weights and bytes a step."""
    title = f"{describe(mesh)}, grid m x n x k = {' x '.join(map(str, mesh.grid))}, rank 0 of each shape"
    headings = ("layer", "kind", "weight here", "of", "X here -> Y here", "weights", "received a step")
    size = world_of(mesh).size
    rows = [
        (each.name, each.kind, each.local, each.whole, each.blocks, amount(each.weight), amount(each.received / size)) for each in planned
    ]
    weight, received = sum(layer.weight for layer in planned), sum(layer.received for layer in planned) / size
    tables.show(console, title, headings, tables.fold(rows), headings[5:], ("all", "", "", "", "", amount(weight), amount(received)))
    console.print(
        f"batch {options.batch} x {options.context} tokens, AdamW at {options.lr:g}, dropout {options.dropout:g}; bytes are one rank's"
        + ("" if mesh.whole is None else ", each layer's on the ranks of its stage, bytes received on average over all")
    )


def show_result(console: Console, report: dict[str, Any], serial: dict[str, Any] | None) -> None:
    """Losses, seconds, bytes and memory; beside those of one process where it was trained too. Bytes in units (tables.amount)."""
    ranks, losses = report["ranks"], report["losses"]
    received = sum(rank["received"] for rank in ranks) / len(ranks)
    rows: list[tuple[str, str, str, str]] = []
    first = report["first"]
    others = serial["losses"][first:] if serial else []
    for step in sorted({0, len(losses) // 4, len(losses) // 2, 3 * len(losses) // 4, len(losses) - 1}):
        compared = (f"{others[step]:.6f}", f"{difference(losses[step], others[step]):.1e} relative") if serial else ("", "")
        rows.append((f"loss at step {first + step + 1}", f"{losses[step]:.6f}", *compared))
    if serial:
        rows.append(("largest of all steps", "", "", f"{max(map(difference, losses, others)):.1e} relative"))
    ratio = f"{serial['seconds'] / report['seconds']:.2f} x serial speed" if serial and report["seconds"] and not first else ""
    rows.append(("seconds", f"{report['seconds']:.1f}", f"{serial['seconds']:.1f}" if serial else "", ratio))
    over = received - report["formula"]
    agree = "equal to the formula" if not over else f"{amount(abs(over))} {'above' if over > 0 else 'below'} the formula"
    rows.append(("received a rank and step", amount(received), "", agree))
    tensors, workspace = (max(rank[key] for rank in ranks) for key in ("tensors", "workspace"))
    share = f"{tensors / serial['tensors']:.3f} of serial" if serial else ""
    rows.append(("weights, gradients, optimizer state", amount(tensors), amount(serial["tensors"]) if serial else "", share))
    rows.append(("workspace at most", amount(workspace), "0 B" if serial else "", ""))
    headings = ("", report["mesh"], "serial torch.nn", "compared")
    kept = [index for index in range(len(headings)) if serial or index != 2]
    tables.show(console, "result", [headings[i] for i in kept], [[row[i] for i in kept] for row in rows], [headings[i] for i in kept[1:]])


def difference(mine: float, other: float) -> float:
    return abs(mine - other) / abs(other)


def plot(path: str, losses: list[float], serial: list[float] | None, name: str, first: int = 0) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2 if serial else 1, 1, sharex=True, figsize=(7, 6 if serial else 4), squeeze=False)
    steps = range(first + 1, first + len(losses) + 1)
    if serial:
        axes[0][0].plot(steps, serial, color="0.6", linewidth=4, label="serial torch.nn")
        axes[1][0].semilogy(steps, [difference(a, b) or float("nan") for a, b in zip(losses, serial, strict=True)], ".")
        axes[1][0].set(xlabel="step", ylabel="relative difference (equal bits: no dot)")
    axes[0][0].plot(steps, losses, color="tab:red", linewidth=1.2, label=name)
    axes[0][0].set(ylabel="loss (nats a byte)")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
