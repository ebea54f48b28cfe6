"""What the check of the first step costs: step 1 with it beside step 1 without, and step 2 of both, medians over fresh meshes in turns.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python bench/checked_cost.py [lives]

A GPT of 2 blocks (width 128, 8 heads, batch 8 x 32) on 4 ranks (2d); each life is init, two steps, destroy. The first life of each is
not counted: it pays for what torch sets up once.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import torch

import gingham
from gingham.commands.gpt import GPT, Shape, parallel_kit


def lives(rank: int, count: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {f"{way} {step}": [] for way in ("on", "off") for step in (1, 2)}
    for life in range(2 * count + 2):
        way = "on" if life % 2 else "off"
        os.environ["GINGHAM_CHECK"] = "" if way == "on" else "0"
        mesh = gingham.init(mode="2d", size=4)
        torch.manual_seed(0)
        model = GPT(parallel_kit(mesh), Shape(layers=2, width=128, heads=8, context=32))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(64, (8, 33))
        for step in (1, 2):
            start = time.perf_counter()
            loss = model.loss(model(mesh.scatter(ids[:, :-1])), mesh.scatter(ids[:, 1:].contiguous()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            if life > 1:
                found[f"{way} {step}"].append(time.perf_counter() - start)
        gingham.destroy()
    return found


if __name__ == "__main__":
    found = gingham.spawn(lives, 4, int(sys.argv[1]) if len(sys.argv) > 1 else 20)[0]
    middle = {name: statistics.median(times) for name, times in found.items()}
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    for step in (1, 2):
        on, off = middle[f"on {step}"], middle[f"off {step}"]
        print(f"step {step}: checked {on * 1e3:.2f} ms, GINGHAM_CHECK=0 {off * 1e3:.2f} ms, ratio {on / off:.3f}")
