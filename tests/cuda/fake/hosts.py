"""A stack of layers, and two stages of a pipeline, on fake GPUs of one host and of two virtual ones, by each engine.

Prints what differs, as JSON: [] for nothing.
"""

import json
import os
import sys
from typing import Any

import torch

import gingham
from gingham import nn

MODES: list[dict[str, Any]] = [{"mode": "2d", "size": 4}, {"mode": "2.5d", "size": 8, "depth": 2}, {"mode": "3d", "size": 8}]
STAGES: dict[str, Any] = {"parallel": dict(pipeline=2, tensor=dict(size=2, mode="1d")), "size": 4}


def step(rank: int, options: dict[str, Any], per_host: int, engine: str) -> Any:
    """Output, gradients and counts of one forward and backward pass; per_host 0: all ranks on one host."""
    if per_host:
        os.environ.update(GINGHAM_HOST=f"h{rank // per_host}", GINGHAM_ENGINE=engine)
    if "parallel" in options:
        return in_stages(options["parallel"])
    mesh = gingham.init(**options)
    assert mesh.job.has_gpu
    torch.manual_seed(0)
    first, second = nn.Linear(24, 48, layout="outer->inner"), nn.Linear(48, 24, layout="inner->outer")
    model = torch.nn.Sequential(first, nn.Dropout(0.1, layout="inner"), second, nn.LayerNorm(24))
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    y = mesh.gather(model(mesh.scatter(x)))
    y.square().sum().backward()
    gradients = [parameter.grad.to_local().clone() for parameter in model.parameters()]
    return y.detach(), gradients, mesh.traffic()


def in_stages(parallel: dict[str, Any]) -> Any:
    """The same of two steps of a pipeline, whose borders lie between the hosts."""
    mesh = gingham.init(parallel=parallel)
    assert mesh.job.has_gpu
    torch.manual_seed(0)
    row = [nn.Embedding(32, 24), nn.MLP(24, 48), nn.MLP(24, 48), nn.Linear(24, 32)]
    model = gingham.pipeline(torch.nn.Sequential(*row), mesh, 4, "zero_bubble")
    ids = torch.randint(32, (8, 6), generator=torch.Generator().manual_seed(1))
    losses = torch.stack([model.step(ids, ids) for _ in range(2)])
    gradients = [parameter.grad.to_local().clone() for parameter in model.parameters()]
    return losses.detach(), gradients, mesh.traffic()


def main() -> list[str]:
    wrong = []
    for options in [*MODES, STAGES]:
        size = options["size"]
        alone = gingham.spawn(step, size, options, 0, "")
        for engine in ("ucx", "gloo"):
            for rank, (one, other) in enumerate(zip(alone, gingham.spawn(step, size, options, size // 2, engine), strict=True)):
                same = torch.equal(one[0], other[0]) and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
                counts = {axis: {name: other[2][axis][name] for name in count} for axis, count in one[2].items()}
                crossed = sum(count.get("bytes_crossed", 0) for count in other[2].values())
                if not same or counts != one[2] or not crossed:
                    wrong.append(f"{options} {engine} rank {rank}: bits {same}, counts {counts == one[2]}, crossed {crossed}")
    return wrong


if __name__ == "__main__":
    print(json.dumps(main()))
    sys.exit(0)
