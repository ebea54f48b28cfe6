"""What gingham.nn.Linear costs on one rank beside torch.nn.Linear: forward and backward, then a step of AdamW(fused=True).

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python bench/layer_overhead.py [rounds]

Both run in one process in turns, so that a busy machine slows both alike; a line gives the medians, the median of the ratios of
neighbouring calls and the ratio of the shortest calls. Rows x in x out, fp32, torch's own number of threads in both.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

import gingham

CASES = [(64, 256, 256, 1500, 2.5), (2048, 1024, 1024, 40, 1.05)]  # rows, in, out, rounds, what is asked of the ratio


def passes(layer: torch.nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(gradient)

    return run


def in_turns(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float, float, float]:
    """Medians in us, the median ratio of neighbours, the ratio of the shortest; who goes first alternates."""
    times: tuple[list[int], list[int]] = ([], [])
    for turn in range(-max(3, rounds // 10), rounds):
        order = ((ours, times[0]), (theirs, times[1]))
        for run, found in order if turn % 2 else order[::-1]:
            start = time.perf_counter_ns()
            run()
            took = time.perf_counter_ns() - start
            if turn >= 0:
                found.append(took)
    medians = [statistics.median(found) / 1e3 for found in times]
    return medians[0], medians[1], statistics.median(a / b for a, b in zip(*times, strict=True)), min(times[0]) / min(times[1])


def main() -> None:
    factor = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    set_to = [name for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE") if name in os.environ]
    if set_to:
        raise SystemExit(f"{', '.join(set_to)} would slow the BLAS that both use: unset it")
    gingham.init()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for rows, into, out, rounds, asked in CASES:
        torch.manual_seed(0)
        layers = [gingham.nn.Linear(into, out), torch.nn.Linear(into, out)]
        gradient = torch.randn(rows, out)
        runs = [passes(layer, torch.randn(rows, into).requires_grad_(), gradient) for layer in layers]
        report(f"{rows} x {into} x {out} forward + backward", in_turns(*runs, int(rounds * factor)), asked)
        steps = [torch.optim.AdamW(layer.parameters(), fused=True).step for layer in layers]
        report(f"{into} x {out} AdamW(fused=True) step", in_turns(*steps, int(rounds * factor)), None)
    gingham.destroy()


def report(name: str, found: tuple[float, float, float, float], asked: float | None) -> None:
    ours, theirs, ratio, shortest = found
    wanted = "" if asked is None else f"   asked <= {asked}"
    print(f"{name:40s} gingham {ours:9.1f} us   torch {theirs:9.1f} us   ratio {ratio:5.3f}   of the shortest {shortest:5.3f}{wanted}")


if __name__ == "__main__":
    main()
