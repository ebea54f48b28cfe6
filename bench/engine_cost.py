"""What an engine between hosts costs on this machine's loopback: one-way time, a stream, both ways at once, and what Python costs it.

    python bench/engine_cost.py [ucx] [gloo] [seconds of a case]

Two ranks. one way: half of a ping-pong, best and median. stream: rank 0 sends, 4 messages under way, until it is told that the last one
came; CPU seconds of both ranks per GB. both ways: each rank's stream while the other's runs. busy: rank 1 posts all receives of a stream
and then runs Python bytecode, or torch's products, for as long as the stream lasts, which is timed at the sender.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

import gingham
from gingham.launch import engines, rendezvous

SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20)
UNDER_WAY = 4


def wait(engine: Any, ticket: int) -> None:
    if not engine.wait(ticket, 60.0):
        raise RuntimeError("a message has not ended within 60 s")


def one_way(engine: Any, rank: int, size: int, seconds: float) -> list[float]:
    mine, got = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    went = torch.ones(1, dtype=torch.uint8)
    taken, end = [], time.perf_counter() + seconds
    while went.item():
        start = time.perf_counter()
        if rank == 0:
            sent = engine.post_send(1, 1, mine)
            wait(engine, engine.post_recv(1, 1, got))
            wait(engine, sent)
        else:
            wait(engine, engine.post_recv(0, 1, got))
            wait(engine, engine.post_send(0, 1, mine))
        taken.append((time.perf_counter() - start) / 2)
        went.fill_(len(taken) < 20 or time.perf_counter() < end)
        wait(engine, engine.post_send(1, 2, went) if rank == 0 else engine.post_recv(0, 2, went))
    return taken


def stream(engine: Any, rank: int, size: int, count: int, tag: int, sender: int) -> None:
    """`count` messages from `sender`, and a last one back."""
    data, done = [torch.ones(size, dtype=torch.uint8) for _ in range(UNDER_WAY)], torch.zeros(1)
    post = engine.post_send if rank == sender else engine.post_recv
    tickets: deque[int] = deque()
    for number in range(count):
        if number >= UNDER_WAY:
            wait(engine, tickets.popleft())
        tickets.append(post(1 - rank, tag, data[number % UNDER_WAY]))
    for ticket in tickets:
        wait(engine, ticket)
    wait(engine, engine.post_recv(1 - rank, tag, done) if rank == sender else engine.post_send(1 - rank, tag, done))


def both_ways(engine: Any, rank: int, size: int, count: int) -> None:
    data = [torch.ones(size, dtype=torch.uint8) for _ in range(2 * UNDER_WAY)]
    tickets: deque[tuple[int, int]] = deque()
    for number in range(count):
        if number >= UNDER_WAY:
            for ticket in tickets.popleft():
                wait(engine, ticket)
        at = number % UNDER_WAY
        tickets.append((engine.post_recv(1 - rank, 5, data[at]), engine.post_send(1 - rank, 5, data[UNDER_WAY + at])))
    for pair in tickets:
        for ticket in pair:
            wait(engine, ticket)


def busy(engine: Any, rank: int, size: int, count: int, work: str) -> float:
    """Seconds of a stream into a rank that does something else."""
    data, ready = [torch.ones(size, dtype=torch.uint8) for _ in range(count)], torch.zeros(1)
    if rank == 0:
        wait(engine, engine.post_recv(1, 6, ready))
        start = time.perf_counter()
        for ticket in [engine.post_send(1, 7, each) for each in data]:
            wait(engine, ticket)
        seconds = time.perf_counter() - start
        wait(engine, engine.post_send(1, 8, ready))
        return seconds
    seen = engine.changes
    tickets, last = [engine.post_recv(0, 7, each) for each in data], engine.post_recv(0, 8, torch.zeros(1))
    wait(engine, engine.post_send(0, 6, ready))
    x, total = torch.ones(256, 256), 0
    while work != "waits" and engine.changes < seen + count + 2:  # the messages, the last one, and the send of `ready`
        if work == "bytecode":
            for number in range(20_000):
                total += number * number
        else:
            x = x @ x / 256
    for ticket in [*tickets, last]:
        wait(engine, ticket)
    return 0.0


def measure(rank: int, name: str, seconds: float) -> dict[str, Any]:
    made = rendezvous.make_process_group("cpu", rendezvous.store(rank, (0, 1), 30.0))
    opened = engines.open_engine(name, rank, (0, 1), rendezvous.store(rank, (0, 1), 30.0), 30.0)
    engine, found = opened.engine, dict[str, Any]()
    for size in SIZES:
        times = one_way(engine, rank, size, seconds)
        count = max(2 * UNDER_WAY, min(4000, int(seconds / (statistics.median(times) + 1e-6))))
        counts = torch.tensor([count])
        dist.broadcast(counts, 0)
        count = int(counts.item())
        dist.barrier()
        cpu, start = sum(os.times()[:2]), time.perf_counter()
        stream(engine, rank, size, count, 3, 0)
        took, cpu = time.perf_counter() - start, sum(os.times()[:2]) - cpu
        dist.barrier()
        start = time.perf_counter()
        both_ways(engine, rank, size, count)
        found[f"{size >> 10} KB"] = (times, count * size, took, cpu, time.perf_counter() - start)
    for work in ("waits", "bytecode", "products"):
        dist.barrier()
        found[work] = [busy(engine, rank, 1 << 20, 32, work) for _ in range(5)]
    opened.close()
    if made:
        dist.destroy_process_group()
    return found


def main() -> None:
    names = [word for word in sys.argv[1:] if word in engines.ENGINES] or list(engines.ENGINES)
    seconds = float(next((word for word in sys.argv[1:] if word not in engines.ENGINES), "0.5"))
    for name in names:
        first, second = gingham.spawn(measure, 2, name, seconds)
        print(f"{name}: one way best / median us; stream MB/s / CPU s per GB; both ways, MB/s each")
        for size in SIZES:
            times, volume, took, cpu, crossed = first[f"{size >> 10} KB"]
            cpu += second[f"{size >> 10} KB"][3]
            best, median = min(times) * 1e6, statistics.median(times) * 1e6
            speeds = f"{volume / took / 1e6:6.0f} / {cpu / volume * 1e9:.2f}   {volume / crossed / 1e6:6.0f}"
            print(f"  {size >> 10:6} KB   {best:7.0f} / {median:7.0f}   {speeds}")
        for work in ("waits", "bytecode", "products"):
            print(f"  32 MB into a rank that {work:10}: {statistics.median(first[work]) * 1e3:6.1f} ms (median of 5)")


if __name__ == "__main__":
    main()
