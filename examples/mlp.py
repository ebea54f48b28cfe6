"""The published 2.5D example: an MLP 256 -> 1024 -> 256 on 8 ranks, q = 2, depth = 2.

python examples/mlp.py                               starts its own 8 ranks
torchrun --nproc-per-node 8 examples/mlp.py          uses torchrun's
"""

import os

import torch

import gingham


class MLP(torch.nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.dense_1 = gingham.nn.Linear(width, 4 * width)
        self.dense_2 = gingham.nn.Linear(4 * width, width)
        self.dropout = gingham.nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.dense_1(x)
        return hidden, self.dropout(self.dense_2(torch.nn.functional.gelu(hidden)))


def main(rank: int) -> dict[str, tuple[int, ...]]:
    """Local shapes of one rank; weights are [out, in], as in torch.nn.Linear."""
    mesh = gingham.init(parallel=dict(tensor=dict(size=8, mode="2.5d", depth=2)))
    torch.manual_seed(0)
    model = MLP()
    x = mesh.scatter(torch.randn(16, 256))
    hidden, y = model(x)
    mesh.gather(y).square().mean().backward()
    shapes = {
        "input": tuple(x.shape),
        "weight of the first linear layer": tuple(model.dense_1.weight.to_local().shape),
        "output of the first linear layer": tuple(hidden.shape),
        "weight of the second linear layer": tuple(model.dense_2.weight.to_local().shape),
        "output of the second linear layer": tuple(y.shape),
        "gradient of the first weight": tuple(model.dense_1.weight.grad.to_local().shape),
    }
    if rank == 0:
        print(f"rank 0 of {mesh}")
        for name, shape in shapes.items():
            print(f"{name}: {shape}")
    gingham.destroy()
    return shapes


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(int(os.environ["RANK"]))
    else:
        gingham.spawn(main, 8)
