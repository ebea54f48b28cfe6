"""What one call costs: gingham.matmul on 64 x 64 blocks beside torch.mm, on 1 rank and on 4, median of 10,000 calls.

    python bench/call_cost.py

1 rank: the cost above raw BLAS is (gingham.matmul - torch.mm) + (torch.mm - BLAS), and torch.mm's own cost stands beside it.
4 ranks (2d, each with 64 x 64 blocks of 128 x 128): beside one Gloo broadcast of the same block over two ranks, which is what a
SUMMA step would pay four times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import gingham

CALLS = 10_000


def median_us(run: Callable[[], object], calls: int = CALLS) -> float:
    for _ in range(200):
        run()
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


def one_rank(rank: int) -> dict[str, float]:
    mesh = gingham.init()
    a, b, out = torch.randn(64, 64), torch.randn(64, 64), torch.empty(64, 64)
    x, w = mesh.scatter(a, operand="a"), mesh.scatter(b, operand="b")
    result = {
        "gingham.matmul": median_us(lambda: gingham.matmul(x, w)),
        "torch.mm": median_us(lambda: torch.mm(a, b)),
        "torch.mm into out= (nearest to raw BLAS)": median_us(lambda: torch.mm(a, b, out=out)),
    }
    gingham.destroy()
    return result


def four_ranks(rank: int) -> dict[str, float]:
    mesh = gingham.init(mode="2d", size=4)
    dist = torch.distributed
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    x, w = mesh.scatter(torch.randn(128, 128), operand="a"), mesh.scatter(torch.randn(128, 128), operand="b")
    block = torch.randn(64, 64)
    result = {
        "gingham.matmul": median_us(lambda: gingham.matmul(x, w), 3000),
        "Gloo broadcast of one block": median_us(lambda: dist.broadcast(block, rank // 2 * 2, group=pairs[rank // 2]), 3000),
    }
    gingham.destroy()
    return result


def main() -> None:
    for ranks, body in ((1, one_rank), (4, four_ranks)):
        results = gingham.spawn(body, ranks)
        print(f"{ranks} rank{'s' * (ranks > 1)}, 64 x 64 blocks, fp32, median us a call")
        for name in results[0]:
            print(f"  {name:45s} {statistics.median(r[name] for r in results):8.1f}")


if __name__ == "__main__":
    main()
