"""The linear pair 1024 -> 4096 -> 1024, forward and backward in bfloat16, on GPUs: gingham over NCCL beside torch on one GPU.

    python bench/gpu_pair.py [--rows 8192] [--rounds 30]

One rank a GPU. The ratio is torch's time on one GPU over gingham's on all: the number of GPUs would be a perfect speed-up. Results are
compared with torch's first; a difference of more than 2 % stops the run.
"""

import argparse
import statistics
from typing import Any

import torch

import gingham

WIDTH, INNER = 1024, 4096


def timed(run: Any, rounds: int) -> float:
    """Median milliseconds of one call, by CUDA events."""
    times = []
    for _ in range(rounds + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def serial(rows: int, rounds: int) -> tuple[float, torch.Tensor]:
    torch.manual_seed(0)
    pair = torch.nn.Sequential(torch.nn.Linear(WIDTH, INNER, bias=False), torch.nn.Linear(INNER, WIDTH, bias=False)).to(
        "cuda", torch.bfloat16
    )
    x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(1), requires_grad=True)

    def run() -> torch.Tensor:
        y = pair(x)
        y.backward(torch.ones_like(y))
        return y

    return timed(run, rounds), run().detach().float().cpu()


def ours(rank: int, rows: int, rounds: int, options: dict[str, Any], expected: torch.Tensor) -> float:
    mesh = gingham.init(device="cuda", **options)
    torch.manual_seed(0)
    first = gingham.nn.Linear(WIDTH, INNER, bias=False, layout="outer->inner", swapped="auto").to(torch.bfloat16)
    second = gingham.nn.Linear(INNER, WIDTH, bias=False, layout="inner->outer", swapped="auto").to(torch.bfloat16)
    full = torch.randn(rows, WIDTH, device=mesh.device, dtype=torch.bfloat16, generator=torch.Generator(mesh.device).manual_seed(1))
    x = mesh.scatter(full).requires_grad_()

    def run() -> torch.Tensor:
        y = second(first(x))
        y.backward(torch.ones_like(y))
        return y

    got = mesh.gather(run().detach()).float().cpu()
    error = (got - expected).norm() / expected.norm()
    if error > 0.02:
        raise RuntimeError(f"{options}: differs from torch by {error:.3e}")
    return timed(run, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=30)
    chosen = parser.parse_args()
    gpus = torch.cuda.device_count()
    base, expected = serial(chosen.rows, chosen.rounds)
    print(f"torch, 1 GPU: {base:.3f} ms")
    grids: list[tuple[int, dict[str, Any]]] = [(1, {"mode": "1d", "size": 1})]
    grids += [(n, {"mode": "1d", "size": n}) for n in (2, 4, 8) if n <= gpus]
    grids += [(4, {"mode": "2d", "size": 4})] if gpus >= 4 else []
    grids += [(8, {"mode": "2.5d", "size": 8, "depth": 2}), (8, {"mode": "3d", "size": 8})] if gpus >= 8 else []
    for ranks, options in grids:
        times = gingham.spawn(ours, ranks, chosen.rows, chosen.rounds, options, expected)
        print(f"gingham, {ranks} GPU(s), {options}: {max(times):.3f} ms, {base / max(times):.2f} x torch on one")


if __name__ == "__main__":
    main()
