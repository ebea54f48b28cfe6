"""A GPT on a hybrid of 2 pipeline stages x 2 data ranks x 2 tensor ranks, beside one process that accumulates over the same micro-batches.

python examples/hybrid.py --schedule zero_bubble     starts its own 8 ranks
torchrun --nproc-per-node 8 examples/hybrid.py       uses torchrun's
"""

import argparse
import os
from typing import Any

import torch

import gingham
from gingham.commands.gpt import GPT, Shape, batches, parallel_kit, read_text, serial_kit

SHAPE = Shape(layers=4, width=64, heads=8, context=32, dropout=0.1)
PARTS = 4  # micro-batches


def accumulate(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What model.step does, in one process."""
    total = torch.zeros(())
    for x, target in zip(ids.tensor_split(PARTS), targets.tensor_split(PARTS), strict=True):
        loss = model.loss(model(x), target) * len(x) / len(ids)
        loss.backward()
        total += loss.detach()
    return total


def train(model: Any, step: Any, clip: Any, options: Any) -> list[float]:
    draw = batches(read_text(options.text), 12, SHAPE.context, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
    losses = []
    for number in range(options.steps):
        optimizer.zero_grad()
        loss = step(*draw(number))  # full tensors, alike on every rank; the same loss on every rank
        clip(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(rank: int, options: Any, parallel: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The losses on the mesh, and on rank 0 those of the serial model."""
    mesh = gingham.init(parallel=parallel)
    torch.manual_seed(0)
    model = gingham.pipeline(GPT(parallel_kit(mesh), SHAPE), mesh, PARTS, options.schedule)
    losses, place = train(model, model.step, gingham.clip_grad_norm_, options), mesh.pipeline
    gingham.destroy()
    torch.manual_seed(0)
    whole = GPT(serial_kit(), SHAPE) if rank == 0 else None
    serial = [] if whole is None else train(whole, lambda *batch: accumulate(whole, *batch), torch.nn.utils.clip_grad_norm_, options)
    if rank == 0:
        print(f"{place.size} stages of {mesh}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, serial {serial[-1]:.4f}")
    return losses, serial


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="1f1b", help="gpipe, 1f1b, interleaved, zero_bubble, zbv or dual")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--text", help="a file or folder")
    options = parser.parse_args()
    parallel = dict(pipeline=2, data=2, tensor=dict(size=2, mode="1d"))
    if "RANK" in os.environ:
        main(int(os.environ["RANK"]), options, parallel)
    else:
        gingham.spawn(main, 8, options, parallel)
