"""The main job: train a GPT on text over a grid of ranks, and prove that it computes what one process would.

Every rank runs `run`; rank 0 shows the plan and the progress. At the end the loss curve stands beside that of the same
torch.nn model trained in one process, and the bytes that the ranks counted beside the formula.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import gingham

from ..launch.spawn import start_server
from ..mesh import axes_of
from ..mesh.modes import Axes
from ..native import device_report, max_host_ranks
from ..plan import tables
from ..plan.tables import amount
from . import layers
from .arguments import init_arguments, mesh_arguments
from .gpt import GPT, VOCABULARY, Kit, Shape, batches, parallel_kit, read_text, serial_kit


def train(options: Namespace) -> int:
    """The command; returns its exit code. Under torchrun (RANK is set) this process is one rank, else ranks are started."""
    try:
        grid = mesh_arguments(options)
        check(options, axes_of(**grid))
        text = read_text(options.text)
        batches(text, options.batch, options.context, options.seed)
        _make_folder(options.save)
    except (ValueError, OSError) as error:
        print(f"gingham train: {error}", file=sys.stderr)
        return 2
    try:
        return _train(options, grid)
    except FAULTS as error:
        first = str(error).strip().partition("\n")[0]
        print(f"gingham train: {type(error).__name__}: {first}", file=sys.stderr)
        return 1


def _train(options: Namespace, grid: dict[str, Any]) -> int:
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        report = run(int(os.environ["RANK"]), options, grid)
        gingham.destroy()
        if int(os.environ["RANK"]) != 0:
            return 130 if report["interrupted"] else 0
    else:
        report = _spawned(options, grid)
    if report["interrupted"]:
        saved = f"; checkpoint in {options.save}" if options.save else ""
        print(f"gingham train: interrupted after step {len(report['losses'])}{saved}", file=sys.stderr)
        return 130
    console = Console()
    serial = train_serial(options, console) if options.compare_serial else None
    show_result(console, report, serial)
    if options.plot:
        plot(options.plot, report["losses"], serial["losses"] if serial else None, report["mesh"])
        console.print(f"wrote {options.plot}")
    if options.sample:
        console.print("\n[bold]sample of generated text[/]")
        console.print(report["sample"], markup=False, highlight=False)
    return 0


FAULTS = (
    *(gingham.MeshError, gingham.ShapeError, gingham.CheckpointError, gingham.PeerDied, gingham.PeerStalled, gingham.PeerOutOfMemory),
    *(MemoryError, OSError),
)


def check(options: Namespace, axes: Axes) -> None:
    """Raises ValueError for options that do not fit together."""
    ranks = prod(axes.sizes[name] for name in axes.inner.features)
    if options.width % options.heads:
        raise ValueError(f"--heads {options.heads} must divide --width {options.width}")
    if options.heads % ranks:
        raise ValueError(f"--heads {options.heads} must be a multiple of {ranks}, the ranks that cut features on this grid")
    if prod(axes.sizes.values()) > max_host_ranks and "WORLD_SIZE" not in os.environ:
        raise ValueError(f"--ranks {prod(axes.sizes.values())}: a host has at most {max_host_ranks} ranks; start several with torchrun")
    if options.save == "":
        raise ValueError("--save '': expected a folder; leave it out for no checkpoint")
    if options.plot:
        _check_plot(options)
    if options.device == "cuda" and not device_report()["devices"]:
        raise ValueError("--device cuda: there is no GPU here; leave it out, or see python -m gingham doctor")


def _make_folder(save: str | None) -> None:
    """What cannot be written is told before the first step."""
    if save is None:
        return
    try:
        os.makedirs(save, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--save {save}: no folder, and none can be made there: {error.strerror}") from None
    if not os.access(save, os.W_OK):
        raise ValueError(f"--save {save}: the folder cannot be written")


def _check_plot(options: Namespace) -> None:
    folder, suffix = os.path.dirname(options.plot) or ".", os.path.splitext(options.plot)[1][1:]
    if not os.path.isdir(folder):
        raise ValueError(f"--plot {options.plot}: the folder {folder} does not exist")
    if os.path.isdir(options.plot) or not os.access(folder, os.W_OK):
        raise ValueError(f"--plot {options.plot}: expected a file in a folder that can be written")
    if suffix == "":
        options.plot += ".png"
    elif suffix != "png":
        from matplotlib.backend_bases import FigureCanvasBase

        known = sorted(FigureCanvasBase.get_supported_filetypes())
        if suffix not in known:
            raise ValueError(f"--plot {options.plot}: matplotlib writes no .{suffix}, expected one of {', '.join(known)}")


def _spawned(options: Namespace, grid: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's report. Ranks started from here ignore Ctrl-C until they can end at a step's end; what comes before, this process, which
    waits for them, notes in a file."""
    with tempfile.TemporaryDirectory(prefix="gingham-") as folder:
        noted = Path(folder) / "interrupted"
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            start_server()
            signal.signal(signal.SIGINT, lambda *_: noted.touch())
            report: dict[str, Any] = gingham.spawn(run, axes_of(**grid).size, options, grid, str(noted))[0]
        finally:
            signal.signal(signal.SIGINT, before)
        return report


class Interruption:
    """Ctrl-C noted, here or in the file that a caller touches: all ranks end after the same step. From the third on it is Python's
    KeyboardInterrupt again."""

    def __init__(self, mesh: Any, noted: str | None = None) -> None:
        self.mesh, self.count, self.noted = mesh, 0, noted
        self.handles = threading.current_thread() is threading.main_thread()
        self.before = signal.signal(signal.SIGINT, self.note) if self.handles else None

    def note(self, *_: Any) -> None:
        self.count += 1
        if self.count > 2:
            raise KeyboardInterrupt

    def agreed(self) -> bool:
        """Whether any rank was interrupted; a control message."""
        here = self.count > 0 or self.noted is not None and os.path.exists(self.noted)
        return any(count for (count,) in self.mesh.world.sizes([int(here)])) if self.mesh.size > 1 else here

    def end(self) -> None:
        if self.handles:
            signal.signal(signal.SIGINT, self.before)


def shape_of(options: Namespace) -> Shape:
    return Shape(options.layers, options.width, options.heads, options.context, options.dropout)


def flops(shape: Shape, batch: int) -> int:
    """Forward and backward of one step: 6 per weight and token, and the two products of attention."""
    weights = 12 * shape.layers * shape.width**2 + shape.width * VOCABULARY
    return batch * shape.context * (6 * weights + 12 * shape.layers * shape.width * shape.context)


def run(rank: int, options: Namespace, grid: dict[str, Any], noted: str | None = None) -> dict[str, Any]:
    """One rank's training run; only rank 0's report is looked at. noted: the file that says Ctrl-C."""
    mesh = gingham.init(**init_arguments(grid), device=options.device)
    shape = shape_of(options)
    model, optimizer = build(parallel_kit(mesh), shape, options)
    planned = layers.plan(model, mesh, options.batch, options.context, ("inner", VOCABULARY))
    console = Console(quiet=rank != 0, force_terminal=None)
    show_plan(console, mesh, planned, options)
    draw = batches(read_text(options.text), options.batch, options.context, options.seed)

    def block(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, target = (part.to(mesh.device) for part in draw(step))
        # the loss takes logits in the inner layout, whose rows are whole where outer's are cut over the feature ranks
        return mesh.scatter(ids), mesh.scatter(target) if mesh.inner.rows else target

    mesh.traffic(reset=True)
    interruption = Interruption(mesh, noted)
    try:
        losses, seconds = loop(model, optimizer, block, options, console, f"{mesh.size} ranks", interruption.agreed)
        if options.save:
            gingham.save(model, optimizer, options.save, step=len(losses))
    finally:
        interruption.end()
    if len(losses) < options.steps:
        return {"losses": losses, "interrupted": True}
    received = sum(axis["bytes_received"] for axis in mesh.traffic(reset=True).values())
    memory = mesh.job.memory()
    figures = {
        "received": received / max(1, options.steps),
        "tensors": sum(tensor_bytes(model, optimizer).values()),
        "workspace": memory["workspace_peak"],
    }
    everyone: list[Any] = [None] * mesh.size
    dist.all_gather_object(everyone, figures)
    return {
        "interrupted": False,
        "mesh": describe(mesh),
        "losses": losses,
        "seconds": seconds,
        "ranks": everyone,
        "formula": sum(layer.received for layer in planned) / mesh.size,
        "sample": sample(model, mesh, shape, options) if options.sample else "",
    }


def build(kit: Kit, shape: Shape, options: Namespace) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(options.seed)
    model = GPT(kit, shape)
    return model, torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)


def loop(
    model: GPT, optimizer: Any, block: Any, options: Namespace, console: Console, name: str, stop: Callable[[], bool] = lambda: False
) -> tuple[list[float], float]:
    """Trains; returns the losses and the seconds of all steps but the first, which pays for memory and threads. Ends early where
    `stop`, asked after each step, says so."""
    losses: list[float] = []
    tokens, work = options.batch * options.context, flops(shape_of(options), options.batch)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    begin = time.perf_counter()
    # ranks beside rank 0 compute only: a progress bar's thread would take a share of their core
    with Progress(*columns, console=console, disable=console.quiet, refresh_per_second=2) as progress:
        task = progress.add_task(name, total=options.steps, figures="")
        for step in range(options.steps):
            ids, target = block(step)
            loss = model.loss(model(ids), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step + 1 < options.steps and stop():
                break
            if step == 0:
                begin = time.perf_counter()
                continue
            pace = step / (time.perf_counter() - begin)
            figures = f"loss {losses[-1]:.3f}  {pace * tokens:,.0f} tokens/s  {pace * work / 1e9:.1f} GFLOP/s"
            progress.update(task, completed=step + 1, figures=figures)
    return losses, time.perf_counter() - begin


def train_serial(options: Namespace, console: Console) -> dict[str, Any]:
    """The torch.nn model in this process, with all cores, on the same batches."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, optimizer = build(serial_kit(), shape_of(options), options)
    draw = batches(read_text(options.text), options.batch, options.context, options.seed)
    losses, seconds = loop(model, optimizer, draw, options, console, "serial")
    return {"losses": losses, "seconds": seconds, "tensors": sum(tensor_bytes(model, optimizer).values())}


def tensor_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that this process holds of weights, gradients and optimizer state."""

    def held(tensor: Any) -> int:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return local.numel() * local.element_size()

    weights = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return {
        "weights": sum(map(held, weights)),
        "gradients": sum(held(weight.grad) for weight in weights if weight.grad is not None),
        "optimizer": sum(map(held, states)),
    }


@torch.no_grad()
def sample(model: GPT, mesh: Any, shape: Shape, options: Namespace) -> str:
    """Text that the model continues from "def ". Every row of the batch, at least one a rank, holds the same text."""
    model.eval()
    generator = torch.Generator().manual_seed(options.seed)
    text = list(b"def ")
    rows = max(1, mesh.parts(mesh.outer.rows))
    for _ in range(options.sample):
        ids = torch.tensor(text[-shape.context :], device=mesh.device).repeat(rows, 1)
        last = mesh.gather(model(mesh.scatter(ids))[:, -1].contiguous(), operand="inner")[0].cpu()
        text.append(int(torch.multinomial(torch.softmax(last / 0.8, -1), 1, generator=generator)))
    return bytes(text).decode(errors="replace")


def describe(mesh: Any) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in mesh.sizes.items())
    return f"{mesh.size} ranks: {axes}"


def show_plan(console: Console, mesh: Any, planned: list[layers.Layer], options: Namespace) -> None:
    title = f"{describe(mesh)}, grid m x n x k = {' x '.join(map(str, mesh.grid))}, rank 0 of each shape"
    headings = ("layer", "kind", "weight here", "of", "X here -> Y here", "weights", "received a step")
    rows = [
        (each.name, each.kind, each.local, each.whole, each.blocks, amount(each.weight), amount(each.received / mesh.size))
        for each in planned
    ]
    weight, received = sum(layer.weight for layer in planned), sum(layer.received for layer in planned) / mesh.size
    tables.show(console, title, headings, tables.fold(rows), headings[5:], ("all", "", "", "", "", amount(weight), amount(received)))
    console.print(
        f"batch {options.batch} x {options.context} tokens, AdamW at {options.lr:g}, dropout {options.dropout:g}; bytes are one rank's"
    )


def show_result(console: Console, report: dict[str, Any], serial: dict[str, Any] | None) -> None:
    """Losses, seconds, bytes and memory; beside those of one process where it was trained too. Bytes in units (shown.amount)."""
    ranks, losses = report["ranks"], report["losses"]
    received = sum(rank["received"] for rank in ranks) / len(ranks)
    rows: list[tuple[str, str, str, str]] = []
    others = serial["losses"] if serial else []
    for step in sorted({0, len(losses) // 4, len(losses) // 2, 3 * len(losses) // 4, len(losses) - 1}):
        compared = (f"{others[step]:.6f}", f"{difference(losses[step], others[step]):.1e} relative") if serial else ("", "")
        rows.append((f"loss at step {step + 1}", f"{losses[step]:.6f}", *compared))
    if serial:
        rows.append(("largest of all steps", "", "", f"{max(map(difference, losses, others)):.1e} relative"))
    ratio = f"{serial['seconds'] / report['seconds']:.2f} x serial speed" if serial and report["seconds"] else ""
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


def plot(path: str, losses: list[float], serial: list[float] | None, name: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2 if serial else 1, 1, sharex=True, figsize=(7, 6 if serial else 4), squeeze=False)
    steps = range(1, len(losses) + 1)
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
