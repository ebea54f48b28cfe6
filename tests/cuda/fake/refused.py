"""Attention with heads that are wider than the kernels of GPUs take, on fake GPUs. Prints as JSON, for every rank: the refusals of a ring
and of zigzag order, whether gathered keys give one process's result, and the refusal of the core's operation."""

import json
from typing import Any

import torch

import gingham
from gingham import native, nn

WIDE = 264


def refused(rank: int) -> list[Any]:
    mesh = gingham.init(grid=(2, 1, 1))
    assert mesh.job.has_gpu
    found: list[Any] = []
    try:
        nn.SelfAttention(WIDE, 1, dim=1, ring=True)
    except NotImplementedError as error:
        found.append(str(error))
    x = torch.randn(1, 6, WIDE, generator=torch.Generator().manual_seed(1))
    layer = nn.SelfAttention(WIDE, 1, dim=1, order="zigzag")
    try:
        layer(mesh.scatter(x, "x", 1, order="zigzag"))
    except NotImplementedError as error:
        found.append(str(error))
    found.append(same(mesh, x))
    # one rank's heads are too wide: both are told
    width = WIDE if rank == 1 else 8
    q = torch.randn(3, 1, 1, width)
    try:
        native.Attention(mesh.program, mesh.axis(("m",)), [3, 3], mesh.index).forward(q, q, q)
    except gingham.ShapeError as error:
        found.append(str(error))
    return found


def same(mesh: gingham.Mesh, x: torch.Tensor) -> bool:
    """The layer's result with gathered keys, beside torch's own attention over the whole sequence."""
    torch.manual_seed(0)
    layer = nn.SelfAttention(WIDE, 1, dim=1)
    got = mesh.gather(layer(mesh.scatter(x, "x", 1)), "x", 1)
    weights = {name: parameter.full_tensor() for name, parameter in layer.named_parameters()}
    q, k, v = (torch.nn.functional.linear(x, weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in "qkv")
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.allclose(got, torch.nn.functional.linear(y, weights["o.weight"], weights["o.bias"]), atol=1e-5)


if __name__ == "__main__":
    print(json.dumps(gingham.spawn(refused, 2)))
