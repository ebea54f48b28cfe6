"""Data parallelism beside torch's: a training step (forward, backward, AdamW) of the demo's GPT and of a wide MLP on 2 and 4 ranks.

    python bench/data.py [--ranks 2,4] [--rounds 15] [--case gpt,mlp] [--phases]

Every candidate of a case lives in the same processes, one thread a rank, and each round runs all of them, one after the other, between
barriers; the time of a run is that of the slowest rank. Candidates: gingham with weights replicated over data, kept whole for the step
(shard="state") and cut (shard="all"); torch's DistributedDataParallel over Gloo, and FSDP2 (fully_shard) over Gloo, which cuts them.
Bytes are what a rank of gingham received in a step. --phases: the medians of forward, backward and the optimizer's step, of rank 0. All
start from the same weights, and their losses are compared first.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gingham
from gingham.commands.gpt import GPT, Shape, parallel_kit, serial_kit

Run = Callable[[], float]
SHARDS = {"gingham": None, "gingham state": "state", "gingham all": "all"}
GPT_SHAPE, GPT_ROWS, WIDTH, HIDDEN, MLP_ROWS = Shape(dropout=0.0), 4, 1024, 4096, 256


def stepping(model: Any, loss: Callable[[], torch.Tensor]) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> float:
        optimizer.zero_grad()
        at = [time.perf_counter()]
        value = loss()
        at.append(time.perf_counter())
        value.backward()
        at.append(time.perf_counter())
        optimizer.step()
        at.append(time.perf_counter())
        phases.append([end - begin for begin, end in itertools.pairwise(at)])
        return float(value.detach())

    phases: list[list[float]] = []
    run.phases = phases  # type: ignore[attr-defined]
    return run


def of_torch(case: str, wrap: str) -> Run:
    torch.manual_seed(0)
    rank = dist.get_rank()
    if case == "gpt":
        model: Any = GPT(replace(serial_kit(), dropout=torch.nn.Dropout), GPT_SHAPE)
        parts, loss = [*model.blocks, model], model.loss
        x, target = (each[rank * GPT_ROWS : (rank + 1) * GPT_ROWS] for each in tokens(dist.get_world_size()))
    else:
        model = torch.nn.Sequential(torch.nn.Linear(WIDTH, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, WIDTH))
        parts, loss = [model[0], model[2], model], F.mse_loss
        x, target = (each[rank * MLP_ROWS : (rank + 1) * MLP_ROWS] for each in matrices(dist.get_world_size()))
    if wrap == "FSDP2":
        for part in parts:
            fully_shard(part)
    else:
        model = DistributedDataParallel(model)
    return stepping(model, lambda: loss(model(x), target))


def of_gingham(case: str, world: int, shard: str | None, meshes: list[Any]) -> Run:
    mesh = gingham.init(parallel=dict(data=dict(size=world, shard=shard)), default=not meshes)
    meshes.append(mesh)
    torch.manual_seed(0)
    if case == "gpt":
        model: Any = GPT(parallel_kit(mesh), GPT_SHAPE)
        x, target = (mesh.scatter(each) for each in tokens(world))
        return stepping(model, lambda: model.loss(model(x), target))
    first, second = gingham.nn.Linear(WIDTH, HIDDEN, mesh=mesh), gingham.nn.Linear(HIDDEN, WIDTH, mesh=mesh)
    model = torch.nn.Sequential(first, torch.nn.GELU(), second)
    x, target = (mesh.scatter(each) for each in matrices(world))

    def loss() -> torch.Tensor:  # of this rank's rows: the job's is the sum of all ranks'
        return (model(x) - target).square().sum() / target.numel() / world

    return stepping(model, loss)


def tokens(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(256, (GPT_ROWS * world, GPT_SHAPE.context + 1), generator=torch.Generator().manual_seed(1))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def matrices(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(MLP_ROWS * world, WIDTH, generator=generator), torch.randn(MLP_ROWS * world, WIDTH, generator=generator)


def serve(rank: int, ranks: int, case: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, int], dict[str, list[float]]]:
    """Seconds of each candidate's rounds, bytes received, and the medians of its phases."""
    torch.set_num_threads(1)
    meshes: list[Any] = []
    runs: dict[str, Run] = {name: of_gingham(case, ranks, shard, meshes) for name, shard in SHARDS.items()}
    runs |= {name: of_torch(case, name) for name in ("DDP", "FSDP2")}
    losses = {name: [run() for _ in range(2)][1] for name, run in runs.items()}
    for name in losses if case == "mlp" else ("DDP", "FSDP2"):
        mean = torch.tensor([losses[name] / (1 if name in SHARDS else ranks)])
        dist.all_reduce(mean)
        losses[name] = mean.item()
    assert max(losses.values()) - min(losses.values()) < 1e-4, losses
    bytes_received = {}
    for (name, run), mesh in zip(list(runs.items())[: len(meshes)], meshes, strict=True):
        mesh.traffic(reset=True)
        run()
        bytes_received[name] = sum(count["bytes_received"] for count in mesh.traffic().values())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for at in range(-2, rounds):
        for name, run in runs.items():
            dist.barrier()
            begin = time.perf_counter()
            run()
            spent = torch.tensor([time.perf_counter() - begin])
            dist.all_reduce(spent, dist.ReduceOp.MAX)
            if at >= 0:
                times[name].append(spent.item())
    gingham.destroy()
    phases: dict[str, Any] = {name: run.phases[-rounds:] for name, run in runs.items()}  # type: ignore[attr-defined]
    return times, bytes_received, {name: [statistics.median(each) for each in zip(*found, strict=True)] for name, found in phases.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--case", default="gpt,mlp")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--phases", action="store_true")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"commit {commit}, torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, {options.rounds} rounds\n")
    print("| case | ranks | what | ms, median | quartiles | of DDP's time | of FSDP2's | bytes received a step |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for case in options.case.split(","):
        for ranks in map(int, options.ranks.split(",")):
            times, received, phases = gingham.spawn(serve, ranks, ranks, case, options.rounds)[0]
            middles = {name: statistics.median(each) for name, each in times.items()}
            for name, each in times.items():
                low, middle, high = (f"{1e3 * value:.1f}" for value in statistics.quantiles(each, n=4))
                ratios = " | ".join(f"{middles[name] / middles[other]:.2f}" for other in ("DDP", "FSDP2"))
                print(
                    f"| {case} | {ranks} | {name} | {middle} | {low} .. {high} | {ratios} | {received.get(name, '')} |",
                    flush=True,
                )
            for name, each in phases.items() if options.phases else ():
                print(f"{name}: forward, backward, step {', '.join(f'{1e3 * value:.1f}' for value in each)} ms", flush=True)


if __name__ == "__main__":
    main()
