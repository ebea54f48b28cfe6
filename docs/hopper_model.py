"""What blocks of several tiles are worth to the Hopper product (csrc/kernels/gemm_sm90.cu) on one H100: computed, not measured.

    python docs/hopper_model.py     the tables of docs/cuda_kernels.md

Two models, which know of nothing but what they name. A multiprocessor: a thread loads stages, two warpgroups multiply each of them with one
tensor core between them, and store; the ring, the order of loads and what waits for what are the kernel's. Of two that could multiply the
one that is behind does, which is the worst for their overlap: where the hardware lets one run ahead, a tile costs up to half a microsecond
less. A device: blocks start in order wherever one has ended, on 132 multiprocessors, or on 116 while messages hold 16. Times in us:

  STEP      0.65 for 64 of k of a tile of 128 x 256; it has the clock's sinking under load in it
  LATENCY   0.9 from a released stage to a full one
  FEED      0.45 between two full stages at least: 48 KiB each, 14 TB/s over the device
  STORE     1.2 of a warpgroup for its 64 rows in 16 bits, 2.0 in fp32
  EDGE      0.9 from the end of a block to its successor's first load
  HBM       3.0 TB/s; A and B are read once (L2 has the rest), C is written, or read and written

One tile a block comes out at 107, 178 and 1379 us for 8192 x 4096 x 1024, 4096^3 and 8192^3 with results in 16 bits; 107, 181 and 1388 were
measured. Not in it: whatever made a fixed share of 4 tiles a block slower than single ones at 4096^3 on an H100 (196 us for 182). It is
why a block has at most 64 steps of K: what is gained beyond that is small, and unsafe.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

STEP, LATENCY, FEED, EDGE, HBM = 0.65, 0.9, 0.45, 0.9, 3.0e6
STORE = {"16 bits": 1.2, "+= fp32": 2.0}
STAGES, WAVE, MOST, STEPS_OF_BLOCK = 4, 132, 4, 64
CUBLAS = 798e6  # flops a us: the best of torch.mm in bf16
SHAPES = (
    (8192, 4096, 512), (8192, 4096, 1024), (4096, 4096, 1024), (8192, 1024, 1024), (8192, 8192, 1024), (4096, 11008, 1024),
    (8192, 4096, 2048), (4096, 4096, 4096), (8192, 1024, 4096), (8192, 8192, 8192),
)  # fmt: skip


@dataclass
class Group:
    """A warpgroup: the step it is at, counted over tiles, and when it is free to begin it."""

    turn: int = 0
    free: float = 0.0


class Multiprocessor:
    def __init__(self, tiles: int, steps: int, store: float, together: bool) -> None:
        self.total, self.steps, self.store, self.together = tiles * steps, steps, store, together
        self.groups = (Group(), Group())
        self.full: list[float] = []
        self.done = [[math.inf, math.inf] for _ in range(self.total)]  # of each step, by group
        self.core = 0.0

    def filled(self, turn: int) -> float:
        """When its stage is full; infinite while a group has still to release what was there."""
        while len(self.full) <= turn:
            at = len(self.full)
            free = 0.0 if at < STAGES else max(self.done[at - STAGES])
            if free == math.inf:
                return math.inf
            self.full.append(max(free + LATENCY, self.full[-1] + FEED if self.full else 0.0))
        return self.full[turn]

    def run(self) -> float:
        """When the last sum has been stored."""
        while any(group.turn < self.total for group in self.groups):
            ready = [
                (max(group.free, self.filled(group.turn)), group.turn, which) if group.turn < self.total else (math.inf, 0, which)
                for which, group in enumerate(self.groups)
            ]
            when, turn, which = min(ready)
            group, other = self.groups[which], self.groups[1 - which]
            self.core = max(self.core, when) + STEP / 2
            self.done[turn][which] = group.free = self.core
            group.turn += 1
            if group.turn % self.steps == 0:  # its part of a tile is stored
                if not self.together:
                    group.free += self.store
                elif other.turn == group.turn:
                    group.free = other.free = self.core + self.store
                else:
                    group.free = math.inf
        return max(group.free for group in self.groups)


def chunks_of(tiles: int, wave: int, most: int) -> list[int]:
    """Tiles of every block, as csrc/kernels/gemm_sm90_chunks.cuh deals them."""
    dealt: list[int] = []
    behind = tiles
    for count in range(most, 1, -1):
        waves = max(0, behind - (count - 1) * wave) // (count * wave)
        dealt += [count] * (waves * wave)
        behind -= waves * count * wave
    return dealt + [1] * behind


def makespan(chunks: Sequence[int], times: dict[int, float], multiprocessors: int) -> float:
    """Each block goes where one has ended first."""
    free, last = [0.0] * multiprocessors, 0.0
    for chunk in chunks:
        end = free[0] + EDGE + times[chunk]
        heapq.heapreplace(free, end)
        last = max(last, end)
    return last


def most_of(steps: int) -> int:
    return min(MOST, max(1, STEPS_OF_BLOCK // steps))


def product(m: int, n: int, k: int, way: str, multiprocessors: int, most: int, together: bool = False) -> float:
    tiles, steps = math.ceil(m / 128) * math.ceil(n / 256), math.ceil(k / 64)
    times = {count: Multiprocessor(count, steps, STORE[way], together).run() for count in range(1, most + 1)}
    return makespan(chunks_of(tiles, WAVE, most), times, multiprocessors)


def memory(m: int, n: int, k: int, way: str) -> float:
    return (2 * (m * k + k * n) + (2 if way == "16 bits" else 8) * m * n) / HBM


def main() -> None:
    print("| m x n x k | blocks of | one tile a block, 132 / 116 | as built, 132 / 116 | fixed shares, 132 / 116 |")
    print("|---|---|---|---|---|")
    for m, n, k in SHAPES:
        tiles, steps = math.ceil(m / 128) * math.ceil(n / 256), math.ceil(k / 64)
        most = most_of(steps)
        share = [tiles // WAVE + 1] * (tiles % WAVE) + [tiles // WAVE] * (WAVE - tiles % WAVE)
        times = {count: Multiprocessor(count, steps, STORE["16 bits"], False).run() for count in set(share)}
        cells = [
            " / ".join(f"{each(multiprocessors):.0f}" for multiprocessors in (132, 116))
            for each in (
                lambda count, s=(m, n, k): product(*s, "16 bits", count, 1, True),
                lambda count, s=(m, n, k), most=most: product(*s, "16 bits", count, most),
                lambda count, share=share, times=times: makespan(share, times, count),
            )
        ]
        dealt = chunks_of(tiles, WAVE, most_of(steps))
        print(
            f"| {m} x {n} x {k} | {', '.join(f'{dealt.count(c)} x {c}' for c in sorted(set(dealt), reverse=True))} | {' | '.join(cells)} |"
        )
    print()
    print("| m x n x k | C | products, us | HBM, us | at best, TFLOP/s | of cuBLAS's 798 |")
    print("|---|---|---|---|---|---|")
    for m, n, k in ((8192, 8192, 8192), (8192, 4096, 1024), (8192, 8192, 1024), (4096, 4096, 1024)):
        for way in STORE:
            busy, bytes_ = product(m, n, k, way, 132, most_of(math.ceil(k / 64))), memory(m, n, k, way)
            rate = 2 * m * n * k / max(busy, bytes_)
            print(f"| {m} x {n} x {k} | {way} | {busy:.0f} | {bytes_:.0f} | {rate / 1e6:.0f} | {rate / CUBLAS:.0%} |")


if __name__ == "__main__":
    main()
