"""The bubble of each schedule beside its formula: the share of a step in which a rank waits for a message, or at the end for the others.

    python bench/pipeline.py [ranks] [micro-batches] [seconds of a pass]
    python bench/pipeline.py borders

slept: layers that sleep instead of computing, as long for a forward pass as for each half of a backward pass, so that any number of ranks
fits few cores. computed (2 ranks): a GPT of width 256, whose passes take what they take: loss and head in the last stage, unequal halves
of backward passes, and linears that make both gradients at once. Median of 5 steps, the mean over ranks.

borders: what a message between two stages on one host costs through the memory that they share (pipeline/by_memory.py) and as one of
torch.distributed's over Gloo (pipeline/by_messages.py, the way between hosts), in turns; and, each way in turns, of a step of the computed
GPT its time, the processor's time of the whole rank, and that of its threads but the main one.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

import gingham
from gingham.autograd import gradients
from gingham.commands.gpt import GPT, Shape, parallel_kit
from gingham.pipeline.orders import stages_of
from gingham.pipeline.wire import Wire
from gingham.plan.pipeline import SCHEDULES, bubble

STEPS = 5


class Sleeping(torch.autograd.Function):
    """A layer's times: forward, gradient of inputs, gradient of weights."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, seconds: float) -> torch.Tensor:
        time.sleep(seconds)
        ctx.seconds = seconds
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        time.sleep(ctx.seconds)
        if gradients.put_off is None:
            time.sleep(ctx.seconds)
        else:
            gradients.put_off.append(lambda: time.sleep(ctx.seconds))
        return grad, torch.zeros(1), None


class Layer(torch.nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight, self.seconds = torch.nn.Parameter(torch.ones(1)), seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sleeping.apply(x, self.weight, self.seconds)


def measured(step: Any) -> float:
    """The share of a step that this rank waits."""
    waited: list[float] = []
    wait, release, over_stages = Wire.wait, Wire._release, gingham.Mesh.over_stages

    def timing(call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = call(*arguments)
            waited.append(time.perf_counter() - begun)
            return result

        return timed

    Wire.wait, Wire._release, gingham.Mesh.over_stages = timing(wait), timing(release), timing(over_stages)  # type: ignore[method-assign]
    shares = []
    try:
        for number in range(1 + STEPS):
            waited.clear()
            begun = time.perf_counter()
            step()
            if number:
                shares.append(sum(waited) / (time.perf_counter() - begun))
    finally:
        Wire.wait, Wire._release, gingham.Mesh.over_stages = wait, release, over_stages  # type: ignore[method-assign]
    return statistics.median(shares)


def slept(rank: int, size: int, schedule: str, parts: int, seconds: float) -> float:
    mesh = gingham.init(parallel=dict(pipeline=size))
    stages = stages_of(schedule, None)
    # as many stages of one layer as the schedule has; a layer's time is that of its share of the model
    layers = [Layer(seconds / stages) for _ in range(size * stages)]
    loss = lambda y, target: y.square().mean()  # noqa: E731
    model = gingham.pipeline(torch.nn.Sequential(*layers), mesh, parts, schedule, loss=loss)
    x = torch.ones(parts, 4)
    share = measured(lambda: model.step(x, x))
    gingham.destroy()
    return share


def computed(rank: int, schedule: str, parts: int) -> float:
    mesh = gingham.init(parallel=dict(pipeline=2))
    torch.manual_seed(0)
    model = gingham.pipeline(GPT(parallel_kit(mesh), Shape(layers=8, width=256, heads=8, context=128, dropout=0.0)), mesh, parts, schedule)
    ids = torch.randint(256, (2 * parts, 128), generator=torch.Generator().manual_seed(0))
    share = measured(lambda: model.step(ids, ids))
    gingham.destroy()
    return share


SIZES = (4, 64, 256, 1024, 4096)  # KB
TURNS, REPEATS = 11, 20
WAYS = {"memory": False, "messages": True}  # of one host: whether the wire takes the other rank for one of another


def take_way(wire: Wire, way: str) -> None:
    wire.elsewhere = [WAYS[way]] * len(wire.elsewhere)
    wire.mesh.borders.setdefault("bytes_crossed", 0)


def handed(rank: int) -> list[list[list[float]]]:
    """Seconds one way, by size, way and turn."""
    mesh = gingham.init(parallel=dict(pipeline=2))
    wire = Wire(mesh, [0, 1], len(SIZES))
    found: list[list[list[float]]] = []
    for tag, size in enumerate(SIZES):
        x = mesh.empty([size << 8], torch.float32)
        found.append([[] for _ in WAYS])
        for at in range(1 + TURNS):
            for way, times in zip(WAYS, found[-1], strict=True):
                take_way(wire, way)
                mesh.over_stages(torch.zeros(1), "bench")
                begun = time.perf_counter()
                for _ in range(REPEATS):
                    for mine in (rank == 0, rank == 1):
                        if mine:
                            wire.send(x, 1 - rank, tag, size)
                        else:
                            wire.wait(wire.receive(1 - rank, tag, size))
                    wire.finish()
                if at:
                    times.append((time.perf_counter() - begun) / (2 * REPEATS))
    gingham.destroy()
    return found


def inside(rank: int, schedule: str, parts: int) -> tuple[dict[str, list[float]], int]:
    """Of a step, by way: its seconds, the processor's of this rank and of its threads but the main one; and the messages that come."""
    mesh = gingham.init(parallel=dict(pipeline=2))
    torch.manual_seed(0)
    model = gingham.pipeline(GPT(parallel_kit(mesh), Shape(layers=8, width=256, heads=8, context=128, dropout=0.0)), mesh, parts, schedule)
    ids = torch.randint(256, (2 * parts, 128), generator=torch.Generator().manual_seed(0))
    rounds: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for at in range(1 + TURNS):
        for way, found in rounds.items():
            take_way(model._pipeline.runner.wire, way)
            mesh.traffic(reset=True)
            clocks = time.perf_counter(), time.process_time(), time.thread_time()
            model.step(ids, ids)
            ended = time.perf_counter(), time.process_time(), time.thread_time()
            whole, process, main = (now - begun for now, begun in zip(ended, clocks, strict=True))
            if at:
                found.append((whole, process, process - main))
    messages = mesh.traffic()["pipeline"]["messages"]
    gingham.destroy()
    return {way: [statistics.median(each) for each in zip(*found, strict=True)] for way, found in rounds.items()}, messages


def borders() -> None:
    print("| KB | memory, us | quartiles | messages, us | quartiles | ratio |\n|---|---|---|---|---|---|")
    for size, by_way in zip(SIZES, gingham.spawn(handed, 2)[0], strict=True):
        cells, middles = [], []
        for times in by_way:
            low, middle, high = (1e6 * each for each in statistics.quantiles(times, n=4))
            middles.append(middle)
            cells += [f"{middle:.0f}", f"{low:.0f} to {high:.0f}"]
        print(f"| {size} | {' | '.join(cells)} | {middles[0] / middles[1]:.2f} |")
    print("\n| schedule | way | step, ms | processor, ms | in other threads, ms | messages |\n|---|---|---|---|---|---|")
    for schedule in SCHEDULES:
        for rank, (found, messages) in enumerate(gingham.spawn(inside, 2, schedule, 8)):
            for way, (step, whole, others) in found.items():
                print(f"| {schedule}, rank {rank} | {way} | {1e3 * step:.1f} | {1e3 * whole:.1f} | {1e3 * others:.2f} | {messages} |")


def main() -> None:
    if sys.argv[1:] == ["borders"]:
        borders()
        return
    size, parts, seconds = (
        given(sys.argv[at]) if len(sys.argv) > at else usual for at, given, usual in ((1, int, 4), (2, int, 8), (3, float, 0.1))
    )
    print(f"{size} ranks, {parts} micro-batches, passes of {seconds:g} s")
    print("| schedule | formula | slept | formula, 2 ranks | computed, 2 ranks |\n|---|---|---|---|---|")
    for schedule in SCHEDULES:
        stages = stages_of(schedule, None)
        share = statistics.mean(gingham.spawn(slept, size, size, schedule, parts, seconds))
        real = statistics.mean(gingham.spawn(computed, 2, schedule, parts))
        expected = [bubble(schedule, ranks, parts, stages) for ranks in (size, 2)]
        print(f"| {schedule} | {expected[0]:.3f} | {share:.3f} | {expected[1]:.3f} | {real:.3f} |", flush=True)


if __name__ == "__main__":
    main()
