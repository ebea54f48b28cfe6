"""Attention over a cut sequence, forward and backward, beside torch's in one process on the same cores, and its overlap behind a link.

python bench/attention.py           4 ranks, 8192 places, 8 heads of 64, one process of 2 threads: efficiency = its time / theirs
python bench/attention.py --link    8 ranks behind a link on which keys, values take as long as the products: time / the slower

Rounds are interleaved, so that a busy machine is so for all; ranks that have nothing to do sleep. Medians, and quartiles.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import gingham
from gingham import native
from gingham.autograd.ring import CutSequence, Way
from gingham.mesh.layout import chunks
from gingham.nn.sequence import attend_sequence
from gingham.plan.formulas import WAYS


def both(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], dy: torch.Tensor) -> Callable[[], None]:
    """A forward and backward pass."""

    def run() -> None:
        leaves = [each.detach().requires_grad_() for each in tensors]
        torch.autograd.grad(function(*leaves), leaves, dy)

    return run


def seconds(mesh: Any, run: Callable[[], None]) -> tuple[float, float]:
    """Until the last rank has ended; and the processors' seconds of all ranks, which a busy machine does not change."""
    mesh.world.sizes([0])
    start, used = time.perf_counter(), time.process_time()
    run()
    told = mesh.world.sizes([int(1e6 * (time.process_time() - used))])
    return time.perf_counter() - start, sum(each for (each,) in told) / 1e6


def serially(places: int, heads: int, width: int, causal: bool, threads: int) -> Callable[[], None]:
    q, k, v, dy = (torch.randn(1, heads, places, width) for _ in range(4))
    run = both(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), [q, k, v], dy)

    def threaded() -> None:
        torch.set_num_threads(threads)
        run()
        torch.set_num_threads(1)

    return threaded


def cut(mesh: Any, places: int, heads: int, width: int, causal: bool, way: str) -> Callable[[], None]:
    lengths = chunks(places, [mesh.size])
    at = CutSequence(mesh, ("m",), tuple(lengths), mesh.index, zigzag=causal)
    q, k, v, dy = (mesh.empty([lengths[mesh.index], 1, heads, width], torch.float32).normal_() for _ in range(4))

    return both(lambda q, k, v: attend_sequence(way, q, k, v, None, Way(at, causal, width**-0.5)), [q, k, v], dy)


def efficiency(rank: int, options: Any) -> list[str]:
    mesh, lines = gingham.init(grid=(options.ranks, 1, 1), timeout=600.0), []
    for causal in (False, True):
        sizes = (options.places, options.heads, options.width, causal)
        alone = serially(*sizes, options.threads)
        ways = {
            "one process": (lambda alone=alone: alone()) if rank == 0 else (lambda: None),
            **{way: cut(mesh, *sizes, way) for way in WAYS if way != "heads" or options.heads >= options.ranks},
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for each in range(options.rounds + 1):
            for name, run in ways.items():
                took = seconds(mesh, run)
                if each:
                    found[name].append(took)
        for name, times in found.items():
            wall, used = (sorted(alone[at] / took[at] for alone, took in zip(found["one process"], times, strict=True)) for at in (0, 1))
            quartiles = f"{wall[len(wall) // 4]:.2f} to {wall[-1 - len(wall) // 4]:.2f}"
            words = f"{statistics.median(took for took, _ in times):.3f} s, efficiency {statistics.median(wall):.2f} ({quartiles})"
            words += f", by processors' seconds {statistics.median(used):.2f}"
            lines.append(f"{'causal, zigzag' if causal else 'not causal'}, {name}: {words}")
    return lines


def overlap(rank: int, options: Any, bandwidth: float, source: str) -> tuple[float, float]:
    """Seconds of a forward pass, and bytes received; bandwidth 0: no link."""
    mesh = gingham.init(grid=(options.ranks, 1, 1), link=(0.0, bandwidth) if bandwidth else None, source=source, timeout=600.0)
    lengths = chunks(options.places, [mesh.size])
    q, k, v = (mesh.empty([lengths[mesh.index], 1, options.heads, options.width], torch.float32).normal_() for _ in range(3))
    mesh.traffic(reset=True)
    call = native.Attention(mesh.program, mesh.axis(("m",)), lengths, mesh.index, None, False, options.width**-0.5)
    call.forward(q, k, v)
    received = mesh.traffic()["m"]["bytes_received"]
    took = statistics.median(seconds(mesh, lambda: call.forward(q, k, v))[0] for _ in range(options.rounds))
    gingham.destroy()
    return took, received


def behind_a_link(options: Any) -> list[str]:
    lines = []
    for source in ("window", "ring"):
        found = []
        for _ in range(options.tries):
            free, received = gingham.spawn(overlap, options.ranks, options, 0.0, source)[0]
            took, _ = gingham.spawn(overlap, options.ranks, options, received / free, source)[0]
            found.append((took / free, free, took))
        ratio, free, took = sorted(found)[len(found) // 2]
        lines.append(f"{source}: products {free:.3f} s = travel; together {took:.3f} s, {ratio:.2f} x the slower")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", action="store_true")
    for name, value in dict(ranks=None, places=8192, heads=8, width=64, rounds=5, threads=2, tries=3).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    given.ranks = given.ranks or (8 if given.link else 4)
    for line in behind_a_link(given) if given.link else gingham.spawn(efficiency, given.ranks, given)[0]:
        print(line)
