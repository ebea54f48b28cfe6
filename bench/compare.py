"""gingham beside single-process torch, DTensor, a Gloo SUMMA and torch's own tensor parallelism, as ratios measured in one run.

    python bench/compare.py                       # all cases of the table in README.md
    python bench/compare.py --case matmul --ranks 4 --sizes 1024,2048 --rounds 15

Every round runs reference, candidates, reference, one after the other on an otherwise idle machine. The reference is torch in one
process with 2 threads; ranks have 1 thread each. A round counts when the reference got >= 1.9 cores in both of its runs; rejected
rounds are counted and shown. The ratio is (time of the reference, mean of its two runs) / (time of the candidate, from the first
rank's start to the last rank's end): 1 is the speed of one process, more is better. CPU seconds are those of all ranks together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Listener

import torch

Run = Callable[[], object]


def timed(run: Run, repeats: int) -> tuple[float, float, float]:
    """(start, end, CPU seconds) of `repeats` runs, on the clock all processes share."""
    cpu, start = time.process_time(), time.clock_gettime(time.CLOCK_MONOTONIC)
    for _ in range(repeats):
        run()
    return start, time.clock_gettime(time.CLOCK_MONOTONIC), time.process_time() - cpu


# --- candidates: built on every rank, each returns the function that is timed


def gingham_matmul(n: int, mode: dict) -> Run:
    import gingham

    mesh = gingham.init(**mode)
    torch.manual_seed(0)
    a, b = torch.randn(n, n), torch.randn(n, n)
    x, w = mesh.scatter(a, operand="a"), mesh.scatter(b, operand="b")
    error = (mesh.gather(gingham.matmul(x, w), operand="c") - a @ b).norm() / (a @ b).norm()
    assert error < 1e-5, error
    return lambda: gingham.matmul(x, w)


def gingham_pair(rows: int, mode: dict) -> Run:
    import gingham

    mesh = gingham.init(**mode)
    first = gingham.nn.Linear(1024, 4096, bias=False, layout="outer->inner", swapped="auto")
    second = gingham.nn.Linear(4096, 1024, bias=False, layout="inner->outer", swapped="auto")
    x = mesh.scatter(torch.randn(rows, 1024)).requires_grad_()
    g = mesh.scatter(torch.randn(rows, 1024))

    def run() -> None:
        x.grad = first.weight.grad = second.weight.grad = None
        second(first(x)).backward(g)

    return run


def dtensor_matmul(n: int, mode: dict) -> Run:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    world = torch.distributed.get_world_size()
    rows = 2 if world == 4 else 4
    mesh = init_device_mesh("cpu", (rows, world // rows))
    a, b = (distribute_tensor(torch.randn(n, n), mesh, [Shard(0), Shard(1)]) for _ in range(2))
    return lambda: (a @ b).redistribute(mesh, [Shard(0), Shard(1)]).to_local()


def gloo_summa(n: int, mode: dict) -> Run:
    """van de Geijn & Watts: q steps, each a broadcast of A's panel along the row and B's along the column, q x q ranks (x depth)."""
    dist = torch.distributed
    rank, world, q = dist.get_rank(), dist.get_world_size(), 2
    depth = world // (q * q)
    d, r, c = rank // (q * q), rank // q % q, rank % q
    rows = {(i, j): dist.new_group([i * q * q + j * q + k for k in range(q)]) for i in range(depth) for j in range(q)}
    cols = {(i, j): dist.new_group([i * q * q + k * q + j for k in range(q)]) for i in range(depth) for j in range(q)}
    a, b = torch.randn(n // q // depth, n // q), torch.randn(n // q, n // q)

    def run() -> torch.Tensor:
        out = torch.zeros(a.shape[0], b.shape[1])
        for step in range(q):
            left = a if step == c else torch.empty_like(a)
            right = b if step == r else torch.empty_like(b)
            dist.broadcast(left, d * q * q + r * q + step, group=rows[d, r])
            dist.broadcast(right, d * q * q + step * q + c, group=cols[d, c])
            out.addmm_(left, right)
        return out

    return run


def torch_pair(rows: int, mode: dict) -> Run:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = torch.nn.Sequential(torch.nn.Linear(1024, 4096, bias=False), torch.nn.Linear(4096, 1024, bias=False))
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return training(model, rows)


def training(model: torch.nn.Module, rows: int) -> Run:
    """Forward and backward of a torch model on the same input."""
    x, g = torch.randn(rows, 1024, requires_grad=True), torch.randn(rows, 1024)

    def run() -> None:
        model.zero_grad()
        x.grad = None
        model(x).backward(g)

    return run


def reference_matmul(n: int) -> Run:
    a, b = torch.randn(n, n), torch.randn(n, n)
    return lambda: a @ b


def reference_pair(rows: int) -> Run:
    return training(torch.nn.Sequential(torch.nn.Linear(1024, 4096, bias=False), torch.nn.Linear(4096, 1024, bias=False)), rows)


CANDIDATES = {
    "matmul": {"gingham": gingham_matmul, "DTensor": dtensor_matmul, "Gloo SUMMA": gloo_summa},
    "pair": {"gingham": gingham_pair, "torch TP over Gloo": torch_pair},
}
REFERENCES = {"matmul": reference_matmul, "pair": reference_pair}


def serve(rank: int, address: str, case: str, size: int, mode: dict, names: list[str]) -> None:
    """A rank: builds the candidates, then times what it is told to until told to stop."""
    import gingham

    torch.manual_seed(rank)
    runs = {name: CANDIDATES[case][name](size, mode) for name in names}
    for run in runs.values():
        run()
    with Client(address, "AF_UNIX") as pipe:
        pipe.send(rank)
        while (command := pipe.recv()) is not None:
            name, repeats = command
            pipe.send(timed(runs[name], repeats))
    gingham.destroy()


def measure(case: str, size: int, ranks: int, mode: dict, options: argparse.Namespace) -> None:
    import gingham

    names = [name for name in CANDIDATES[case] if options.what in name]
    reference = REFERENCES[case](size)
    for _ in range(3):
        reference()
    start, end, _ = timed(reference, 1)
    repeats = max(1, round(0.1 / (end - start)))
    with tempfile.TemporaryDirectory() as folder:
        address = os.path.join(folder, "bench")
        with Listener(address, "AF_UNIX", backlog=ranks) as listener:
            thread = threading.Thread(target=gingham.spawn, args=(serve, ranks, address, case, size, mode, names), daemon=True)
            thread.start()
            pipes = [listener.accept() for _ in range(ranks)]
            for pipe in pipes:
                pipe.recv()
            times, cpus, rejected = play(names, pipes, reference, repeats, options)
            for pipe in pipes:
                pipe.send(None)
            thread.join()
    for name in names:
        show(case, size, ranks, name, times[name], cpus[name], rejected, repeats)


def play(names: list[str], pipes: list, reference: Run, repeats: int, options: argparse.Namespace) -> tuple[dict, dict, int]:
    times: dict[str, list[float]] = {name: [] for name in names}
    cpus: dict[str, list[float]] = {name: [] for name in names}
    rejected, started = 0, time.time()
    while min(len(t) for t in times.values()) < options.rounds and time.time() - started < options.budget:
        for name in names:
            before = timed(reference, repeats)
            for pipe in pipes:
                pipe.send((name, repeats))
            spans = [pipe.recv() for pipe in pipes]
            after = timed(reference, repeats)
            walls = [end - start for start, end, _ in (before, after)]
            if min(cpu / wall for (_, _, cpu), wall in zip((before, after), walls, strict=True)) < options.cores:
                rejected += 1
                continue
            wall = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
            times[name].append(statistics.mean(walls) / wall)
            cpus[name].append(sum(cpu for *_, cpu in spans) / sum(cpu for _, _, cpu in (before, after)) * 2)
    return times, cpus, rejected


def show(case: str, size: int, ranks: int, name: str, ratios: list[float], cpus: list[float], rejected: int, repeats: int) -> None:
    if len(ratios) < 2:
        print(f"| {case} | {size} | {ranks} | {name} | too few rounds ({len(ratios)}, {rejected} rejected) | | |", flush=True)
        return
    low, middle, high = statistics.quantiles(ratios, n=4)
    cpu = statistics.median(cpus)
    counts = f"{len(ratios)} | {rejected} | {repeats}"
    print(f"| {case} | {size} | {ranks} | {name} | {middle:.3f} | {low:.3f} .. {high:.3f} | {cpu:.2f} | {counts} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CANDIDATES, "all"], default="all")
    parser.add_argument("--ranks", type=int, default=0, help="4 (2d) or 8 (2.5d, depth 2); default both")
    parser.add_argument("--sizes", default="1024,2048,4096")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=240, help="seconds a case may take")
    parser.add_argument("--cores", type=float, default=1.9, help="what the reference must have got for a round to count")
    parser.add_argument("--what", default="", help="only the candidates whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(2)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cores = len(os.sched_getaffinity(0))
    print(f"commit {commit}, torch {torch.__version__}, {cores} cores; ratio to torch in one process with 2 threads\n")
    print("| case | size | ranks | what | ratio, median | quartiles | CPU s / reference's | rounds | rejected | repeats |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    modes = {4: {"mode": "2d", "size": 4}, 8: {"mode": "2.5d", "size": 8, "depth": 2}}
    for ranks, mode in modes.items():
        if options.ranks not in (0, ranks):
            continue
        if options.case in ("matmul", "all"):
            for size in map(int, options.sizes.split(",")):
                measure("matmul", size, ranks, mode, options)
        if options.case in ("pair", "all") and ranks == 8:
            measure("pair", 2048, ranks, mode, options)


if __name__ == "__main__":
    main()
