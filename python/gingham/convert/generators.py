"""Random numbers that a converted model's own code draws (torch.nn.functional.dropout, noise, stochastic depth): other ones for each
block of rows and features, the same for ranks that hold the same block, whatever the ranks' own seeds.

For the time of a call torch's generator is one that is seeded by a number which rank 0 draws and by where the block lies; the mask of a
row therefore depends on the mesh, unlike that of gingham.nn.Dropout. Afterwards the generator goes on from the one number drawn, or
where the model's code drew nothing from where it was, so that what else draws from it (a loader that shuffles) goes on as in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..mesh import Mesh
from ..mesh.layout import position

SEED_BYTES = 8  # at the beginning of the CPU generator's state: what torch.initial_seed() reads, by which gingham.nn.Dropout draws


@contextmanager
def own_numbers(model: torch.nn.Module, mesh: Mesh, cut_features: bool) -> Iterator[None]:
    """Around a call of the model in training. A control message of 8 bytes a rank."""
    if torch.compiler.is_compiling() or not model.training or mesh.size == 1:
        yield
        return
    before = torch.get_rng_state()
    drawn = int(torch.randint(1 << 62, (), device="cpu"))
    after = torch.get_rng_state()
    seed = mesh.world.sizes([drawn])[0][0]
    names = (*mesh.outer.rows, *(mesh.outer.features if cut_features else ()))
    generator = torch.Generator().manual_seed(seed ^ (position(names, mesh.sizes, mesh.coordinates) * 0x9E3779B97F4A7C15) % (1 << 62))
    state = generator.get_state()
    state[:SEED_BYTES] = after[:SEED_BYTES]
    torch.set_rng_state(state)
    on_gpu = mesh.device.type == "cuda"
    kept = torch.cuda.get_rng_state(mesh.device) if on_gpu else None
    begun = None
    if on_gpu:
        torch.cuda.manual_seed(generator.initial_seed())
        begun = torch.cuda.get_rng_state(mesh.device)
    try:
        yield
    finally:
        drew = not torch.equal(torch.get_rng_state(), state)
        if begun is not None:
            drew = drew or not torch.equal(torch.cuda.get_rng_state(mesh.device), begun)
        torch.set_rng_state(after if drew else before)
        if kept is not None:
            torch.cuda.set_rng_state(kept, mesh.device)
