"""A GPT of gingham's own layers learns the text of Python's standard library, beside the same model of torch.nn layers.

python examples/gpt.py --mode 3d --steps 20          starts its own 8 ranks
torchrun --nproc-per-node 8 examples/gpt.py          uses torchrun's
"""

from typing import Any

import torch
from launch import arguments, launch

import gingham
from gingham.commands.gpt import GPT, Shape, batches, parallel_kit, read_text, serial_kit


def train(model: Any, options: Any, mesh: gingham.Mesh | None) -> list[float]:
    draw = batches(read_text(options.text), 12, 32, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
    losses = []
    for step in range(options.steps):
        ids, targets = draw(step)
        if mesh is not None:
            ids, targets = mesh.scatter(ids), mesh.scatter(targets)
        loss = model.loss(model(ids), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(rank: int, options: Any, grid: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The losses on the mesh, and on rank 0 those of the serial model."""
    mesh = gingham.init(**grid)
    shape = Shape(layers=2, width=64, heads=8, context=32, dropout=0.1)
    torch.manual_seed(0)
    losses = train(GPT(parallel_kit(mesh), shape), options, mesh)
    gingham.destroy()
    torch.manual_seed(0)
    serial = train(GPT(serial_kit(), shape), options, None) if rank == 0 else []
    if rank == 0:
        print(f"{mesh}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, serial {serial[-1]:.4f}")
    return losses, serial


if __name__ == "__main__":
    parser = arguments(__doc__, steps=20)
    parser.add_argument("--text", help="a file or folder")
    launch(main, parser.parse_args())
