"""A vision transformer of transformers' learns scikit-learn's digits, 1797 images of 8 x 8, unchanged but for one line.

python examples/vit_digits.py --mode 2d --ranks 4    starts its own ranks; --mode sequence cuts the 16 patches and the class token
torchrun --nproc-per-node 8 examples/vit_digits.py   uses torchrun's
"""

from typing import Any

import torch
from launch import arguments, launch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

import gingham


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 1, 8, 8] in -1..1 and their labels, in an order that is the same everywhere."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images[order], torch.tensor(data.target)[order]


def build() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, hidden_act="gelu")
    config = ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10)
    return ViTForImageClassification(config)


def train(model: Any, options: Any) -> tuple[list[float], float]:
    """Losses, and the part of the last 297 images that the model, which never saw them, calls by their name."""
    images, labels = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
    losses = []
    for step in range(options.steps):
        rows = torch.arange(step * 64, (step + 1) * 64) % 1500
        loss = model(pixel_values=images[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        named = model.eval()(pixel_values=images[1500:]).logits.argmax(-1)
    return losses, float((named == labels[1500:]).float().mean())


def main(rank: int, options: Any, grid: dict[str, Any]) -> tuple[Any, Any]:
    """(losses, accuracy) on the mesh, and on rank 0 those of the serial model."""
    mesh = gingham.init(**grid)
    model = gingham.parallelize(build(), mesh)
    losses, right = train(model, options)
    gingham.destroy()
    serial = train(build(), options) if rank == 0 else None
    if rank == 0:
        print(f"{mesh}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, {right:.1%} right; serial {serial[0][-1]:.4f}, {serial[1]:.1%}")
    return (losses, right), serial


if __name__ == "__main__":
    parser = arguments(__doc__, steps=100)
    parser.set_defaults(lr=3e-3)
    launch(main, parser.parse_args())
