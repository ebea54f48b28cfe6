"""A stack of Linears on 8 fake GPUs in 2.5d, whose queue FAKE_TRACE writes down: the layers of ../overlap.py.

Arguments: layers, tokens, width. Each of five steps is marked: in the fourth it is known what follows what.
"""

import ctypes
import os
import sys

import torch

import gingham
from gingham import nn


def steps(rank: int, layers: int, tokens: int, width: int) -> None:
    mesh = gingham.init(mode="2.5d", size=8, depth=2)
    mark = ctypes.CDLL(os.environ["GINGHAM_NCCL"]).fake_mark
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers)))
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    block = mesh.scatter(x).requires_grad_()
    for number in range(5):
        mark(f"step {number}".encode())
        y = model(block)
        mark(f"backward {number}".encode())
        y.backward(torch.ones_like(y))
        for parameter in model.parameters():
            parameter.grad = None
    mark(b"end")
    gingham.destroy()


if __name__ == "__main__":
    layers, tokens, width = map(int, sys.argv[1:])
    gingham.spawn(steps, 8, layers, tokens, width)
