"""What it costs that every call says whose it is (labels and keys that ranks compare): a step of Linear with labels beside one without,
in turns on one mesh of 4 ranks in 2d, each with 256 x 256 blocks.

    python bench/label_cost.py
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import gingham

ROUNDS, STEPS, SIZE = 60, 20, 512


def measure(rank: int) -> list[tuple[float, float]]:
    """Seconds of STEPS steps with and without labels, of each round."""
    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    layer = gingham.nn.Linear(SIZE, SIZE)
    x = mesh.scatter(torch.randn(SIZE, SIZE)).detach().requires_grad_()
    dy = mesh.scatter(torch.randn(SIZE, SIZE)).detach()
    layer(x).backward(dy)
    say = mesh.say

    def run() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            layer(x).backward(dy)
        return time.perf_counter() - start

    def silent(*_: Any, **__: Any) -> None:
        pass

    found = []
    for number in range(ROUNDS + 3):
        pair = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            mesh.say = silent if which else say  # type: ignore[method-assign]
            mesh.world.all_reduce_(torch.zeros(1))
            pair[which] = run()
        found.append((pair[0], pair[1]))
    gingham.destroy()
    return found[3:]


def main() -> None:
    ratios = [with_labels / without for with_labels, without in gingham.spawn(measure, 4)[0]]
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"4 ranks, Linear on {SIZE // 2} x {SIZE // 2} blocks, forward and backward, {ROUNDS} pairs of {STEPS} steps in turns")
    print(f"  with labels / without: median {statistics.median(ratios):.4f}, quartiles {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    main()
