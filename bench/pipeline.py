"""The bubble of each schedule beside its formula: the share of a step in which a rank waits for a message, or at the end for the others.

    python bench/pipeline.py [ranks] [micro-batches] [seconds of a pass]
    python bench/pipeline.py borders

slept: layers that sleep instead of computing, as long for a forward pass as for each half of a backward pass, so that any number of ranks
fits few cores. computed (2 ranks): a GPT of width 256, whose passes take what they take: loss and head in the last stage, unequal halves
of backward passes, and linears that make both gradients at once. Median of 5 steps, the mean over ranks.

borders: what a message between two stages on one host costs as pipeline/wire.py sends it, beside memory which both map (the sender writes
once, the receiver reads once, each spins until it may), in turns; and of a step of the computed GPT the processor's time in the
wire's send and receive, and in the rank's other threads, which copy out of sockets, with the messages that came.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
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
    wait, over_stages = Wire._wait, gingham.Mesh.over_stages

    def timing(call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = call(*arguments)
            waited.append(time.perf_counter() - begun)
            return result

        return timed

    Wire._wait, gingham.Mesh.over_stages = timing(wait), timing(over_stages)  # type: ignore[method-assign]
    shares = []
    try:
        for number in range(1 + STEPS):
            waited.clear()
            begun = time.perf_counter()
            step()
            if number:
                shares.append(sum(waited) / (time.perf_counter() - begun))
    finally:
        Wire._wait, gingham.Mesh.over_stages = wait, over_stages  # type: ignore[method-assign]
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
TURNS, REPEATS = 7, 20


def handed(rank: int, path: str) -> list[tuple[list[float], list[float]]]:
    """Seconds one way, by size: through the wire, and through memory that both map."""
    mesh = gingham.init(parallel=dict(pipeline=2))
    wire, flags = Wire(mesh, [0, 1], 1), torch.from_file(path, shared=True, size=SIZES[-1] << 8, dtype=torch.float32)
    turn = torch.from_file(f"{path}.turn", shared=True, size=8, dtype=torch.int64)
    found = []
    for size in SIZES:
        x, y = torch.ones(size << 8), mesh.empty([size << 8], torch.float32)

        def over_wire(x: torch.Tensor = x, size: int = size) -> None:
            for mine in (rank == 0, rank == 1):
                if mine:
                    wire.send(x, 1 - rank, size, size)
                else:
                    wire.wait(wire.receive(1 - rank, size, size))
            wire.finish()

        def through_memory(x: torch.Tensor = x, y: torch.Tensor = y) -> None:
            both = flags[: len(x)]
            for mine in (rank == 0, rank == 1):
                before = int(turn[0])
                if mine:
                    both.copy_(x)
                    turn[0] = before + 1
                    while int(turn[0]) == before + 1:
                        time.sleep(0)
                else:
                    while int(turn[0]) % 2 == 0:
                        time.sleep(0)
                    y.copy_(both)
                    turn[0] += 1

        rounds: tuple[list[float], list[float]] = ([], [])
        for at in range(1 + TURNS):
            for times, call in zip(rounds, (over_wire, through_memory), strict=True):
                mesh.over_stages(torch.zeros(1), "bench")
                begun = time.perf_counter()
                for _ in range(REPEATS):
                    call()
                if at:
                    times.append((time.perf_counter() - begun) / (2 * REPEATS))
        found.append(rounds)
    gingham.destroy()
    return found


def inside(rank: int, schedule: str, parts: int) -> tuple[float, float, float, int]:
    """Of a step: its seconds, this rank's in the wire's send and receive, the processor's of all of the rank's threads but the main one
    (Gloo's, which copy out of sockets, and the wire's), and the messages that it receives."""
    mesh = gingham.init(parallel=dict(pipeline=2))
    torch.manual_seed(0)
    model = gingham.pipeline(GPT(parallel_kit(mesh), Shape(layers=8, width=256, heads=8, context=128, dropout=0.0)), mesh, parts, schedule)
    ids = torch.randint(256, (2 * parts, 128), generator=torch.Generator().manual_seed(0))
    spent: list[float] = []
    send, receive = Wire.send, Wire.receive

    def timing(call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            begun = time.thread_time()
            result = call(*arguments)
            spent.append(time.thread_time() - begun)
            return result

        return timed

    Wire.send, Wire.receive = timing(send), timing(receive)  # type: ignore[method-assign]
    rounds = []
    try:
        for _ in range(1 + STEPS):
            spent.clear()
            mesh.traffic(reset=True)
            clocks = time.perf_counter(), time.process_time(), time.thread_time()
            model.step(ids, ids)
            whole, process, main = (
                now - begun for now, begun in zip((time.perf_counter(), time.process_time(), time.thread_time()), clocks, strict=True)
            )
            rounds.append((whole, sum(spent), process - main))
    finally:
        Wire.send, Wire.receive = send, receive  # type: ignore[method-assign]
    messages = mesh.traffic()["pipeline"]["messages"]
    gingham.destroy()
    whole, own, others = (statistics.median(each) for each in zip(*rounds[1:], strict=True))
    return whole, own, others, messages


def borders() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="gingham-bench-") as folder:
        path = f"{folder}/memory"
        for name, size in ((path, SIZES[-1] << 10), (f"{path}.turn", 64)):
            with open(name, "wb") as file:
                file.truncate(size)
        found = gingham.spawn(handed, 2, path)[0]
    print("| KB | wire, us | quartiles | mapped memory, us | quartiles | saved at most, us |\n|---|---|---|---|---|---|")
    for size, rounds in zip(SIZES, found, strict=True):
        cells, middles = [], []
        for times in rounds:
            low, middle, high = (1e6 * each for each in statistics.quantiles(times, n=4))
            middles.append(middle)
            cells += [f"{middle:.0f}", f"{low:.0f} to {high:.0f}"]
        print(f"| {size} | {' | '.join(cells)} | {middles[0] - middles[1]:.0f} |")
    print(
        "\n| schedule | step, ms | in send and receive, processor ms | in other threads, processor ms | messages |\n|---|---|---|---|---|"
    )
    for schedule in ("1f1b", "interleaved"):
        for rank, (step, own, others, messages) in enumerate(gingham.spawn(inside, 2, schedule, 8)):
            print(f"| {schedule}, rank {rank} | {1e3 * step:.0f} | {1e3 * own:.2f} | {1e3 * others:.2f} | {messages} |")


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
