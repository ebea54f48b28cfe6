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
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import gingham

from ..launch.parallel_config import parse_parallel
from ..launch.spawn import start_server
from ..mesh.modes import Axes
from ..native import device_report, max_host_ranks
from . import layers
from .arguments import init_arguments, mesh_arguments, parts_in, stage_axes, stages_in
from .gpt import GPT, VOCABULARY, Kit, Shape, batches, parallel_kit, read_text, serial_kit
from .report import describe, plot, show_plan, show_result, world_of


def train(options: Namespace) -> int:
    """The command; returns its exit code. Under torchrun (RANK is set) this process is one rank, else ranks are started."""
    try:
        grid = mesh_arguments(options)
        check(options, stage_axes(grid), stages_in(grid))
        parse_parallel(init_arguments(grid).get("parallel", {}))
        text = read_text(options.text)
        batches(text, options.batch, options.context, options.seed)
        _make_folder(options.save)
    except (ValueError, OSError, NotImplementedError) as error:
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
        print(f"gingham train: interrupted after step {report['first'] + len(report['losses'])}{saved}", file=sys.stderr)
        return 130
    console = Console()
    serial = train_serial(options, console, parts_in(grid)) if options.compare_serial else None
    show_result(console, report, serial)
    if options.plot:
        plot(options.plot, report["losses"], serial["losses"][report["first"] :] if serial else None, report["mesh"], report["first"])
        console.print(f"wrote {options.plot}")
    if options.sample:
        console.print("\n[bold]sample of generated text[/]")
        console.print(report["sample"], markup=False, highlight=False)
    return 0


FAULTS = (
    *(gingham.MeshError, gingham.ShapeError, gingham.CheckpointError, gingham.PeerDied, gingham.PeerStalled, gingham.PeerOutOfMemory),
    *(MemoryError, OSError),
)


def check(options: Namespace, axes: Axes, stages: int = 1) -> None:
    """Raises ValueError for options that do not fit together."""
    ranks = prod(axes.sizes[name] for name in axes.inner.features)
    if options.width % options.heads:
        raise ValueError(f"--heads {options.heads} must divide --width {options.width}")
    if options.heads % ranks:
        raise ValueError(f"--heads {options.heads} must be a multiple of {ranks}, the ranks that cut features on this grid")
    if stages * axes.size > max_host_ranks and "WORLD_SIZE" not in os.environ:
        raise ValueError(f"--ranks {stages * axes.size}: a host has at most {max_host_ranks} ranks; start several with torchrun")
    if stages > 1 and options.device == "cuda":
        raise ValueError("--device cuda with --pipeline: messages between stages have tags, which NCCL ignores; use --data and the grid")
    if options.save == "":
        raise ValueError("--save '': expected a folder; leave it out for no checkpoint")
    if options.resume is not None and not os.path.isdir(options.resume):
        raise ValueError(f"--resume {options.resume!r}: no such folder; expected what --save wrote")
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
            report: dict[str, Any] = gingham.spawn(run, stages_in(grid) * stage_axes(grid).size, options, grid, str(noted))[0]
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
        job = world_of(self.mesh)
        return any(count for (count,) in job.world.sizes([int(here)])) if job.size > 1 else here

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
    job, shape = world_of(mesh), shape_of(options)
    with torch.device("meta") if mesh.whole is not None else nullcontext():  # gingham.pipeline makes this rank's stages alone
        model = build(parallel_kit(mesh), shape, options)
    planned = layers.plan(model, mesh, options.batch, options.context, ("inner", VOCABULARY), grid)
    if "pipeline" in grid:
        model = gingham.pipeline(model, mesh)
    optimizer = optimizer_of(model, options)
    console = Console(quiet=rank != 0, force_terminal=None)
    show_plan(console, mesh, planned, options)
    draw = batches(read_text(options.text), options.batch, options.context, options.seed)
    train_on = pipelined(model) if "pipeline" in grid else scattered(model, mesh)
    first = resumed(model, optimizer, options)
    mesh.traffic(reset=True)
    interruption = Interruption(mesh, noted)
    try:
        losses, seconds = loop(optimizer, draw, train_on, options, console, f"{job.size} ranks", interruption.agreed, first)
        if options.save:
            gingham.save(model, optimizer, options.save, step=first + len(losses))
    finally:
        interruption.end()
    if first + len(losses) < options.steps:
        return {"losses": losses, "first": first, "interrupted": True}
    received = sum(axis["bytes_received"] for axis in mesh.traffic(reset=True).values())
    memory = mesh.job.memory()
    figures = {
        "received": received / len(losses),
        "tensors": sum(tensor_bytes(model, optimizer).values()),
        "workspace": memory["workspace_peak"],
    }
    everyone: list[Any] = [None] * job.size
    dist.all_gather_object(everyone, figures)
    return {
        "interrupted": False,
        "mesh": describe(mesh),
        "losses": losses,
        "first": first,
        "seconds": seconds,
        "ranks": everyone,
        "formula": sum(layer.received for layer in planned) / job.size,
        "sample": sample(model, mesh, shape, options, grid) if options.sample else "",
    }


def build(kit: Kit, shape: Shape, options: Namespace) -> GPT:
    torch.manual_seed(options.seed)
    return GPT(kit, shape)


def optimizer_of(model: torch.nn.Module, options: Namespace) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)


def resumed(model: torch.nn.Module, optimizer: torch.optim.Optimizer, options: Namespace) -> int:
    """The step at which --resume's run ended, whose weights, states and counts of dropout's masks are the model's from now on; else 0."""
    if options.resume is None:
        return 0
    first = int(gingham.load(model, optimizer, options.resume) or 0)
    if first >= options.steps:
        raise gingham.CheckpointError(f"--resume {options.resume}: its run has made {first} steps; give --steps above {first}")
    return first


Train = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (ids, target), full, to the loss: forward and backward


def scattered(model: GPT, mesh: Any) -> Train:
    def train(ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ids, target = ids.to(mesh.device), target.to(mesh.device)
        # the loss takes logits in the inner layout, whose rows are whole where outer's are cut over the feature ranks
        loss = model.loss(model(mesh.scatter(ids)), mesh.scatter(target) if mesh.inner.rows else target)
        loss.backward()
        return loss

    return train


def pipelined(model: Any) -> Train:
    return lambda ids, target: model.step(ids, target)


def accumulated(model: GPT, microbatches: int) -> Train:
    """In one process: what every schedule computes, micro-batch by micro-batch, each with masks of its own."""

    def train(ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=ids.device)
        for x, labels in zip(ids.tensor_split(microbatches), target.tensor_split(microbatches), strict=True):
            loss = model.loss(model(x), labels) * (labels.numel() / target.numel())
            loss.backward()
            total += loss.detach()
        return total

    return train


def loop(
    optimizer: Any,
    draw: Any,
    train: Train,
    options: Namespace,
    console: Console,
    name: str,
    stop: Callable[[], bool] = lambda: False,
    first: int = 0,
) -> tuple[list[float], float]:
    """Trains from step `first`; returns the losses and the seconds of all steps but the first, which pays for memory and threads. Ends
    early where `stop`, asked after each step, says so."""
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
        task = progress.add_task(name, total=options.steps, completed=first, figures="")
        for step in range(first, options.steps):
            ids, target = draw(step)
            optimizer.zero_grad()
            loss = train(ids, target)
            optimizer.step()
            losses.append(loss.item())
            if step + 1 < options.steps and stop():
                break
            if step == first:
                begin = time.perf_counter()
                continue
            pace = (step - first) / (time.perf_counter() - begin)
            figures = f"loss {losses[-1]:.3f}  {pace * tokens:,.0f} tokens/s  {pace * work / 1e9:.1f} GFLOP/s"
            progress.update(task, completed=step + 1, figures=figures)
    return losses, time.perf_counter() - begin


def train_serial(options: Namespace, console: Console, microbatches: int = 1) -> dict[str, Any]:
    """The torch.nn model in this process, with all cores, on the same batches, cut into as many micro-batches."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = build(serial_kit(), shape_of(options), options)
    optimizer = optimizer_of(model, options)
    draw = batches(read_text(options.text), options.batch, options.context, options.seed)
    losses, seconds = loop(optimizer, draw, accumulated(model, microbatches), options, console, "serial")
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
def sample(model: Any, mesh: Any, shape: Shape, options: Namespace, grid: dict[str, Any]) -> str:
    """Text that the model continues from "def ". Every row of the batch, at least one a rank and micro-batch, holds the same text."""
    model.eval()
    generator = torch.Generator().manual_seed(options.seed)
    text = list(b"def ")
    rows = parts_in(grid) * max(1, mesh.parts(tuple(name for name in mesh.outer.rows if name not in mesh.outer.time)))
    for _ in range(options.sample):
        ids = torch.tensor(text[-shape.context :], device=mesh.device).repeat(rows, 1)
        logits = model(ids) if "pipeline" in grid else _logits(model, mesh, ids)
        last = logits[0, -1].cpu()
        text.append(int(torch.multinomial(torch.softmax(last / 0.8, -1), 1, generator=generator)))
    return bytes(text).decode(errors="replace")


def _logits(model: Any, mesh: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the last token at least: what all have is not gathered."""
    mine = model(mesh.scatter(ids))
    return mesh.gather(mine if mesh.outer.time else mine[:, -1:].contiguous(), operand="inner")
