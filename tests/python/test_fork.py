"""Processes forked from a rank, such as a DataLoader's workers: memory of their own, no part in the mesh (A3)."""

import os
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import gingham
from grids import GRIDS

ROWS, WIDTH = 8, 6


def batches(rank: int, options: dict[str, Any], workers: int, count: int) -> dict[str, Any]:
    """Workers scatter, hold tensors of the shared heap and change them, while the rank fills and frees the heap."""
    mesh = gingham.init(**options)
    full = torch.arange(float(count * ROWS * WIDTH)).view(count, ROWS, WIDTH)
    held = [mesh.scatter(each) for each in full[:8]]
    before = [each.clone() for each in held]
    parameter = mesh.parameter(torch.ones(WIDTH, WIDTH), ((), ()))

    class Data(Dataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> tuple:
            mine = mesh.scatter(full[index])
            kept = held[index % 8].clone()
            held[index % 8].add_(1000)
            gone = held[index % 8] - kept
            held[index % 8].sub_(1000)
            if index == 0:
                parameter.data.mul_(3)
            return mine, kept, gone, index

    loader = DataLoader(Data(), batch_size=None, num_workers=workers)
    wrong, noise = 0, []
    iterator = iter(loader)
    if workers:
        held_here, held = held, [mesh.scatter(torch.full((ROWS, WIDTH), -1.0)) for _ in range(8)]
        for each in held_here:
            each.fill_(-7)  # what the workers hold is as it was when they were forked
        del each, held_here
    for mine, kept, gone, index in iterator:
        noise = [*noise[-3:], mesh.scatter(torch.randn(ROWS, WIDTH)), mesh.scatter(torch.randn(2, 3 * WIDTH))]
        good = torch.equal(mine, mesh.scatter(full[index])) and torch.equal(kept, before[index % 8]) and bool((gone == 1000).all())
        wrong += not good
    y = mesh.gather(mesh.scatter(full[0]))
    own = all(bool((each == -1).all()) for each in held) if workers else all(map(torch.equal, held, before))
    first = float(parameter.to_local().flatten()[0]) if parameter.to_local().numel() else 1.0
    return {"wrong": wrong, "own bits": own, "parameter": first == 1.0 or not workers, "usable": torch.equal(y, full[0])}


@pytest.mark.parametrize(("workers", "count"), [(0, 20), (2, 100), pytest.param(4, 400, marks=pytest.mark.matrix)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a3_workers_have_memory_of_their_own(ranks, workers: int, count: int) -> None:
    expected = {"wrong": 0, "own bits": True, "parameter": True, "usable": True}
    assert ranks(4)(batches, GRIDS["2d"], workers, count) == [expected] * 4


def refusals(rank: int, options: dict[str, Any]) -> list[str]:
    """What a forked process is told by everything that would communicate; the rank goes on."""
    mesh = gingham.init(**options)
    layer, norm = gingham.nn.Linear(8, 8), gingham.nn.LayerNorm(8)
    x, target = mesh.scatter(torch.randn(4, 8)), mesh.scatter(torch.zeros(4, dtype=torch.long))
    calls = [
        lambda: layer(x),
        lambda: norm(x),
        lambda: mesh.gather(x),
        lambda: gingham.cross_entropy(x, target),
        lambda: gingham.nn.Dropout(0.5)(x),
        lambda: gingham.clip_grad_norm_(layer.parameters(), 1.0),
        lambda: gingham.nn.Embedding(8, 8)(target),
    ]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for call in calls:
            try:
                call()
                os.write(write, b"silent\n")
            except gingham.MeshError as error:
                os.write(write, ("told\n" if "forked from this rank" in str(error) else f"{error}\n").encode())
        gingham.destroy()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read().split("\n")[:-1]
    os.waitpid(child, 0)
    assert mesh.gather(layer(x)).shape == (4, 8)
    return told


def test_a3_collectives_in_a_forked_process_are_refused(ranks) -> None:
    assert ranks(4)(refusals, GRIDS["2d"]) == [["told"] * 7] * 4
