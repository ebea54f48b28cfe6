"""torch's own tools on one rank's GPU: a training loop beside torch's, autocast, GradScaler, CUDA graphs, torch.compile, checkpoints.

python bench/gpu/tools.py [train | waits | threads | indices | autocast | scaler | graph | compiled | saved] ...
"""

from __future__ import annotations

import copy
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rows import PLACE, aside, error_of, main, row, whole

import gingham
from gingham.commands.gpt import GPT, Shape, parallel_kit, serial_kit

SHAPE = Shape(layers=2, width=256, heads=8, context=128, dropout=0.0)


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights in gingham's GPT and torch's."""
    mesh = gingham.init(device="cuda", mode="1d", size=1)
    torch.manual_seed(3)
    ours = GPT(parallel_kit(mesh), SHAPE).to(PLACE)
    theirs = GPT(serial_kit(), SHAPE).to(PLACE)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.copy_(whole(own[name]))
    return ours, theirs


def batch(step: int, rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(256, (rows, SHAPE.context + 1), generator=generator).to(PLACE)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    ids, target = batch(step)
    return model.loss(model(ids), target)


def train() -> None:
    """20 steps of AdamW: losses of both beside each other; the first gradients beside float64."""
    ours, theirs = models()
    exact = copy.deepcopy(theirs).double()
    loss_of(ours, 0).backward()
    loss_of(exact, 0).backward()
    truth = dict(exact.named_parameters())
    worst = max((error_of(whole(w.grad), truth[name].grad), name) for name, w in ours.named_parameters() if not name.endswith("k.bias"))
    row("GPT, first gradients beside float64", worst[0], 5e-6, worst=worst[1])
    ours.zero_grad()
    pairs = [(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)) for model in (ours, theirs)]
    largest = 0.0
    for step in range(20):
        losses = []
        for model, optimizer in pairs:
            loss = loss_of(model, step)
            optimizer.zero_grad()
            loss.backward()
            (gingham.clip_grad_norm_ if model is ours else torch.nn.utils.clip_grad_norm_)(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        largest = max(largest, abs(losses[0] - losses[1]) / losses[1])
    row("GPT, 20 steps of AdamW beside torch", largest, 1e-4, last=losses[0])


def waits() -> None:
    """Steps in which torch would have to wait for the device: 0 are meant."""
    ours, _ = models()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, fused=True)
    ids, target = batch(0)

    def step() -> None:
        loss = ours.loss(ours(ids), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{Path(each.filename).name}:{each.lineno}" for each in seen if "synchroniz" in str(each.message)})
    row("waits of the host in a step", float(len(places)), 0.0, places=places)


def threads() -> None:
    """Backward runs in the thread that calls it while there is a mesh, and where torch would run it after destroy."""
    ours, _ = models()
    seen: list[int] = []
    ours.token.weight.register_post_accumulate_grad_hook(lambda _: seen.append(threading.get_ident()))
    loss_of(ours, 0).backward()
    row("backward passes in other threads", float(seen != [threading.get_ident()]), 0.0)
    gingham.destroy()
    seen.clear()
    x = torch.ones(3, device=PLACE, requires_grad=True)
    x.register_post_accumulate_grad_hook(lambda _: seen.append(threading.get_ident()))
    x.sum().backward()
    row("backward passes in this thread after destroy", float(PLACE == "cuda" and seen == [threading.get_ident()]), 0.0)


def indices() -> None:
    """A target or id that is no class: the error names rank and value, by the call itself or by the next; until then the loss is NaN."""
    ours, _ = models()
    ids, target = batch(0)
    wrong = target.clone()
    wrong[1, 3] = 300

    def told(call: Callable[[], torch.Tensor], value: str, name: str) -> None:
        torch.cuda._sleep(100_000_000)  # the device has not got there when the call ends
        said, result = "nothing", call()
        try:
            result = result.isnan().any().item()
            loss_of(ours, 1)
        except gingham.ShapeError as error:
            said = str(error)
        row(f"{name}, NaN", float(result is not True), 0.0)
        row(f"{name}, told by the next call", float(not ("rank 0" in said and value in said)), 0.0, said=said)

    told(lambda: ours.loss(ours(ids), wrong), "300", "a wrong target")
    told(lambda: ours(torch.where(ids == ids[0, 0], 999, ids)), "999", "a wrong id")


def autocast() -> None:
    ours, theirs = models()
    exact = copy.deepcopy(theirs).double()
    truth = loss_of(exact, 0)
    truth.backward()
    reference = dict(exact.named_parameters())
    for dtype in (torch.bfloat16, torch.float16):
        errors = []
        for model in (ours, theirs):
            model.zero_grad()
            with torch.autocast(PLACE, dtype):
                loss = loss_of(model, 0)
            loss.backward()
            worst = max(error_of(whole(w.grad), reference[n].grad) for n, w in model.named_parameters() if not n.endswith("k.bias"))
            errors.append((error_of(loss, truth.detach()), worst))
        row(f"autocast {dtype}, loss", errors[0][0], max(2 * errors[1][0], 1e-3), torch=errors[1][0])
        row(f"autocast {dtype}, gradients", errors[0][1], max(2 * errors[1][1], 1e-2), torch=errors[1][1])


def scaler() -> None:
    ours, _ = models()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-2)
    scale = gingham.GradScaler(PLACE, init_scale=2.0**16)
    for step in range(3):
        with torch.autocast(PLACE, torch.float16):
            loss = loss_of(ours, step)
        optimizer.zero_grad()
        scale.scale(loss).backward()
        scale.unscale_(optimizer)
        norm = gingham.clip_grad_norm_(ours.parameters(), 1.0)
        scale.step(optimizer)
        scale.update()
    row("GradScaler, a finite norm", float(not torch.isfinite(norm).item()), 0.0, scale=scale.get_scale())


def graph() -> None:
    """A step captured in a CUDA graph after the usual warm-up: its replays are the eager step's."""
    ours, _ = models()
    ids, target = batch(0)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    start = {name: whole(w).detach().clone() for name, w in ours.named_parameters()}

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = ours.loss(ours(ids), target)
        loss.backward()
        optimizer.step()
        return loss

    def back() -> None:
        with torch.no_grad():
            for name, w in ours.named_parameters():
                (w.to_local() if hasattr(w, "to_local") else w).copy_(start[name])

    eager = []
    with aside():
        for _ in range(4):
            eager.append(step().item())
    back()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        loss = step()
    replayed = []
    for _ in range(4):
        captured.replay()
        replayed.append(loss.item())
    row(
        "graph, losses of 4 replays beside eager",
        max(abs(a - b) for a, b in zip(eager, replayed, strict=True)),
        0.0,
        eager=eager,
        replayed=replayed,
    )
    row("graph, an eager step after it", error_of(step(), torch.tensor(replayed[-1], device=PLACE, dtype=torch.float64)), 1.0)


def compiled() -> None:
    ours, _ = models()
    ids, target = batch(0)
    eager = ours.loss(ours(ids), target)
    fast = torch.compile(ours, fullgraph=True)
    loss = ours.loss(fast(ids), target)
    loss.backward()
    row("torch.compile, loss beside eager", error_of(loss, eager.detach().double()), 1e-6)


def saved() -> None:
    ours, _ = models()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, fused=True)

    def step(number: int) -> float:
        loss = loss_of(ours, number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    with tempfile.TemporaryDirectory() as folder:
        step(0)
        gingham.save(ours, optimizer, f"{folder}/gpt")
        first = [step(1), step(2)]
        gingham.load(ours, optimizer, f"{folder}/gpt")
        second = [step(1), step(2)]
    row("checkpoint, losses after loading", max(abs(a - b) for a, b in zip(first, second, strict=True)), 0.0, losses=first)


PARTS: dict[str, Callable[[], None]] = {
    "train": train,
    "waits": waits,
    "threads": threads,
    "indices": indices,
    "autocast": autocast,
    "scaler": scaler,
    "compiled": compiled,
    "saved": saved,
    "graph": graph,
}
if __name__ == "__main__":
    main(PARTS)
