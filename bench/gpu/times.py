"""Layers on one rank's GPU beside torch's: medians by events, torch's time over gingham's (above 1: gingham is faster), and their kernels.

python bench/gpu/times.py [linears | sweeps | gpt | graphs | kernels | host] ...
"""

from __future__ import annotations

import cProfile
import time
from collections.abc import Callable

import torch
from rows import RATES, aside, main, milliseconds, row

import gingham
from gingham import nn
from gingham.commands.gpt import GPT, Shape, parallel_kit, serial_kit


def begin() -> None:
    gingham.init(device="cuda", mode="1d", size=1)


def passes(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, gradient: torch.Tensor) -> Callable[[], None]:
    parameters = list(layer.parameters()) if isinstance(layer, torch.nn.Module) else []

    def run() -> None:
        for each in (*parameters, x):
            each.grad = None
        layer(x).backward(gradient)

    return run


def beside(
    name: str, ours: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor, out: int, flops: float = 0, bytes_: float = 0
) -> None:
    """Forward, then forward and backward. flops, bytes_: of a forward pass; a linear's backward has twice as many."""
    gradient = torch.randn(*x.shape[:-1], out, device="cuda").to(x.dtype)
    inputs = x.clone().requires_grad_()
    for what, run, twin, factor in (
        ("forward", lambda: ours(x), lambda: theirs(x), 1),
        ("forward + backward", passes(ours, inputs, gradient), passes(theirs, inputs, gradient), 3),
    ):
        with torch.set_grad_enabled(what != "forward"):
            mine, others, again = milliseconds(run), milliseconds(twin), milliseconds(run)
        mine = min(mine, again)
        rate = {"tflops": factor * flops / mine / 1e9, "torch_tflops": factor * flops / others / 1e9} if flops else {}
        rate |= {"tbs": factor * bytes_ / mine / 1e9, "torch_tbs": factor * bytes_ / others / 1e9} if bytes_ else {}
        row(f"{name} {what}", mine, unit="ms", torch=others, ratio=others / mine, **rate)


def linears() -> None:
    begin()
    for dtype in (torch.bfloat16, torch.float32):
        for rows, into, out in ((8192, 1024, 4096), (8192, 4096, 1024), (4096, 4096, 4096), (8192, 8192, 8192), (512, 1024, 1024)):
            if dtype == torch.float32 and rows * into * out > 1 << 37:
                continue
            x = torch.randn(rows, into, device="cuda").to(dtype)
            ours, theirs = nn.Linear(into, out).to(dtype), torch.nn.Linear(into, out).to("cuda", dtype)
            beside(f"Linear {rows}x{into}x{out} {RATES[dtype]}", ours, theirs, x, out, flops=2.0 * rows * into * out)
    x = torch.randn(8192, 1024, device="cuda").to(torch.bfloat16)
    twin = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024)).to("cuda", torch.bfloat16)
    beside("MLP 8192x1024x4096 bf16", nn.MLP(1024, 4096).to(torch.bfloat16), twin, x, 1024, flops=4.0 * 8192 * 1024 * 4096)


def sweeps() -> None:
    """What memory bounds: bytes of a forward pass that reads x and writes y once."""
    begin()
    rows, width = 16384, 4096
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(rows, width, device="cuda").to(dtype)
        size = 2.0 * x.nbytes
        kind = RATES[dtype]
        beside(
            f"LayerNorm {rows}x{width} {kind}",
            nn.LayerNorm(width).to(dtype),
            torch.nn.LayerNorm(width).to("cuda", dtype),
            x,
            width,
            bytes_=size,
        )
        beside(
            f"RMSNorm {rows}x{width} {kind}", nn.RMSNorm(width).to(dtype), torch.nn.RMSNorm(width).to("cuda", dtype), x, width, bytes_=size
        )
        beside(f"Dropout {rows}x{width} {kind}", nn.Dropout(0.1), torch.nn.Dropout(0.1), x, width, bytes_=size)
    for dtype in (torch.bfloat16, torch.float32):
        rows, classes = 8192, 50257
        logits = torch.randn(rows, classes, device="cuda").to(dtype).requires_grad_()
        target = torch.randint(classes, (rows,), device="cuda")

        def ours(logits: torch.Tensor = logits, target: torch.Tensor = target) -> None:
            logits.grad = None
            gingham.cross_entropy(logits, target).backward()

        def theirs(logits: torch.Tensor = logits, target: torch.Tensor = target) -> None:
            logits.grad = None
            torch.nn.functional.cross_entropy(logits, target).backward()

        mine, others = milliseconds(ours), milliseconds(theirs)
        row(
            f"cross_entropy {rows}x{classes} {RATES[dtype]} forward + backward",
            mine,
            unit="ms",
            torch=others,
            ratio=others / mine,
            tbs=3 * logits.nbytes / mine / 1e9,
        )


def gpt_steps() -> dict[str, Callable[[], None]]:
    """A training step of the same GPT by gingham and by torch, all in place, so that a CUDA graph can hold it."""
    begin()
    mesh = gingham.mesh.current()
    shape = Shape(layers=4, width=1024, heads=16, context=512, dropout=0.0)
    models = {"gingham": GPT(parallel_kit(mesh), shape).to(torch.bfloat16), "torch": GPT(serial_kit(), shape).to("cuda", torch.bfloat16)}
    tokens = torch.randint(256, (16, shape.context + 1), device="cuda")
    ids, target = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step_of(model: torch.nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=True)

        def step() -> None:
            optimizer.zero_grad()
            model.loss(model(ids), target).backward()
            optimizer.step()

        return step

    return {name: step_of(model) for name, model in models.items()}


def gpt() -> None:
    steps, times = gpt_steps(), {}
    for name, step in steps.items():
        times[name] = milliseconds(step)
        profiled(f"GPT step, {name}", step, 14)
    both_of("GPT 4 x 1024, 8192 tokens, bf16, a step", times)


def graphs() -> None:
    """The same steps as CUDA graphs: without the host."""
    times = {}
    for name, step in gpt_steps().items():
        with aside():
            for _ in range(3):
                step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        times[name] = milliseconds(graph.replay)
    both_of("GPT 4 x 1024, 8192 tokens, bf16, a step in a CUDA graph", times)


def both_of(name: str, times: dict[str, float]) -> None:
    row(name, times["gingham"], unit="ms", torch=times["torch"], ratio=times["torch"] / times["gingham"])


def profiled(name: str, run: Callable[[], object], most: int = 8) -> None:
    """The kernels of one call, by time on the device."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        run()
        torch.cuda.synchronize()
    host = torch.autograd.DeviceType.CPU
    kernels = [each for each in seen.key_averages() if each.self_device_time_total > 0 and each.device_type != host]
    kernels = [each for each in kernels if not each.key.startswith(("gingham::", "Optimizer"))]  # ranges, which hold kernels
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    table = [[event.key[:90], event.count, round(event.self_device_time_total, 1)] for event in kernels[:most]]
    row(f"kernels of {name}", total, unit="us", kernels=table)
    calls = sorted((each for each in seen.key_averages() if each.key.startswith("cu")), key=lambda each: -each.self_cpu_time_total)
    row(
        f"calls of CUDA of {name}",
        sum(each.count for each in calls),
        calls=[[c.key, c.count, round(c.self_cpu_time_total, 1)] for c in calls[:6]],
    )


def kernels() -> None:
    begin()
    x = torch.randn(8192, 1024, device="cuda").to(torch.bfloat16).requires_grad_()
    gradient = torch.randn(8192, 4096, device="cuda").to(torch.bfloat16)
    for name, layer in (
        ("gingham", nn.Linear(1024, 4096).to(torch.bfloat16)),
        ("torch", torch.nn.Linear(1024, 4096).to("cuda", torch.bfloat16)),
    ):
        profiled(f"Linear 8192x1024x4096 bf16, {name}", passes(layer, x, gradient))
    for name, layer in (
        ("LayerNorm", nn.LayerNorm(4096).to(torch.bfloat16)),
        ("torch LayerNorm", torch.nn.LayerNorm(4096).to("cuda", torch.bfloat16)),
    ):
        y = torch.randn(16384, 4096, device="cuda").to(torch.bfloat16).requires_grad_()
        profiled(f"{name} 16384x4096 bf16", passes(layer, y, torch.randn_like(y)))
    logits = torch.randn(8192, 50257, device="cuda").to(torch.bfloat16).requires_grad_()
    target = torch.randint(50257, (8192,), device="cuda")
    profiled("cross_entropy 8192x50257 bf16", lambda: gingham.cross_entropy(logits, target).backward())


def host() -> None:
    """Microseconds of the host for one small call, the device far behind: what a step must not be bound by."""
    begin()
    x = torch.randn(64, 256, device="cuda").to(torch.bfloat16).requires_grad_()
    gradient = torch.randn(64, 256, device="cuda").to(torch.bfloat16)
    layers = {"gingham": nn.Linear(256, 256).to(torch.bfloat16), "torch": torch.nn.Linear(256, 256).to("cuda", torch.bfloat16)}
    for name, layer in layers.items():
        both = passes(layer, x, gradient)
        row(f"host, Linear forward, {name}", host_microseconds(lambda layer=layer: layer(x)), unit="us")
        row(f"host, Linear forward + backward, {name}", host_microseconds(both), unit="us")
        with torch.autograd.set_multithreading_enabled(False):
            row(f"host, the same in one thread, {name}", host_microseconds(both), unit="us")
        where = cProfile.Profile()
        where.runcall(lambda both=both: [both() for _ in range(100)])
        torch.cuda.synchronize()
        entries = sorted(where.getstats(), key=lambda entry: -entry.inlinetime)[:12]
        places = [[str(entry.code)[:70], entry.callcount // 100, round(entry.inlinetime * 1e4, 1)] for entry in entries]
        row(f"host, where the time of {name} goes", "calls and us a pass, under the profiler", places=places)


def host_microseconds(run: Callable[[], object], rounds: int = 200) -> float:
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    took = (time.perf_counter() - start) / rounds * 1e6
    torch.cuda.synchronize()
    return took


PARTS = {"linears": linears, "sweeps": sweeps, "gpt": gpt, "graphs": graphs, "kernels": kernels, "host": host}
if __name__ == "__main__":
    main(PARTS)
