"""Do the ranks hold the same model, and are they given the same inputs?

Blocks of different matrices patched together would be a model that no rank was given.

One message of two numbers a rank: a checksum of all names, shapes and dtypes, and one of all values. Equal: nothing more travels.
Other values: as DistributedDataParallel does, every rank takes rank 0's, and a warning says so. Another structure: MeshError.
"""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import chain
from typing import Any
from zlib import crc32

import torch
from torch.distributed.tensor import DTensor

from ..errors import MeshError
from ..graph_ops import define, find
from ..mesh import Mesh
from ..mesh.carried import on_host
from ..mesh.checksums import checksum
from ..mesh.layout import coordinates_of, list_of, odd_ranks

PIECE = 1 << 26  # bytes of a broadcast at a time


def agree(model: torch.nn.Module, mesh: Mesh) -> None:
    """Makes every rank hold rank 0's parameters and buffers, once compared by checksum. Bytes: a control message of 16 a rank;
    where values differ, a checksum of each tensor, and those that differ from rank 0.

    Raises MeshError where a rank's model has other parameters, naming the rank and the first of them.
    """
    if mesh.size == 1:
        return
    tensors = _tensors(model)
    lines = [f"{name} {tuple(x.shape)} {x.dtype}{' on meta' if x.is_meta else ''}" for name, x in tensors]
    sums = [0 if x.is_meta else checksum(x) for _, x in tensors]
    words = "\n".join(lines)
    posted = mesh.world.sizes([crc32(words.encode()), crc32(repr(sums).encode())])
    if len({structure for structure, _ in posted}) > 1:
        _name_structure(type(model).__name__, mesh, words, [structure for structure, _ in posted])
    if len({values for _, values in posted}) > 1:
        _take_first(mesh, tensors, sums)


def agreed_seed(mesh: Mesh) -> int:
    """Rank 0's torch.initial_seed(), from which models on meta are drawn; warns where another rank has another."""
    seed = torch.initial_seed() % (1 << 64)
    mesh = mesh.whole or mesh  # of all stages of a pipeline
    if mesh.size == 1:
        return seed
    seeds = [(high << 32) | low for high, low in mesh.world.sizes([seed >> 32, seed & 0xFFFFFFFF])]
    odd = [rank for rank, each in zip(mesh.ranks, seeds, strict=True) if each != seeds[0]]
    if odd:
        first, theirs = mesh.ranks[0], seeds[mesh.ranks.index(odd[0])]
        warnings.warn(
            f"parallelize: {list_of(odd)} had another seed than rank {first} ({theirs}, {seeds[0]}); the model on meta is drawn from"
            f" rank {first}'s: call torch.manual_seed({seeds[0]}) on every rank",
            stacklevel=4,
        )
    return seeds[0]


def _tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Plain parameters and buffers by their first names; blocks of a layer that is converted already differ by right."""
    return [(name, x) for name, x in chain(model.named_parameters(), model.named_buffers()) if not isinstance(x, DTensor)]


def _name_structure(kind: str, mesh: Mesh, words: str, posted: list[int]) -> None:
    usual = Counter(posted).most_common(1)[0][0]
    odd = [rank for rank, each in zip(mesh.ranks, posted, strict=True) if each != usual]
    data = words.encode()
    longest = max(size for (size,) in mesh.world.sizes([len(data)]))
    padded = torch.frombuffer(bytearray(data.ljust(longest, b"\n")), dtype=torch.uint8).to(mesh.device)
    texts = [bytes(on_host(mesh, each).numpy()).decode().rstrip("\n").split("\n") for each in mesh.world.all_gather(padded, counted=False)]
    theirs, ours = texts[mesh.ranks.index(odd[0])], texts[posted.index(usual)]
    index = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    got, expected = (lines[index] if index < len(lines) else "no more parameters" for lines in (theirs, ours))
    raise MeshError(
        f"parallelize: {kind} of {list_of(odd)} differs from the others': got {got!r}, expected {expected!r}; build the same model on"
        " every rank"
    )


@torch.no_grad()
def _take_first(mesh: Mesh, tensors: list[tuple[str, torch.Tensor]], sums: list[int]) -> None:
    gathered = mesh.world.all_gather(torch.tensor(sums, dtype=torch.int64, device=mesh.device), counted=False)
    every = on_host(mesh, torch.stack(list(gathered)))
    differs = (every != every[0]).any(0).tolist()
    odd = [mesh.ranks[place] for place in (every != every[0]).any(1).nonzero().flatten().tolist()]
    names = [name for (name, _), differ in zip(tensors, differs, strict=True) if differ]
    for (_, x), differ in zip(tensors, differs, strict=True):
        if differ:
            _broadcast(mesh, x)
    first, found = mesh.ranks[0], f"{len(names)} of {len(tensors)} parameters and buffers, the first of them {names[0]!r}"
    warnings.warn(
        f"parallelize: {list_of(odd)} held other values than rank {first} in {found}; all have rank {first}'s now. Build models after"
        " the same torch.manual_seed on every rank, or load one checkpoint",
        stacklevel=4,
    )


def _broadcast(mesh: Mesh, x: Any) -> None:
    """x of rank 0 into every rank's, as bytes."""
    data = x.detach().to(mesh.device, copy=True).contiguous().reshape(-1).view(torch.uint8)
    for piece in data.split(PIECE):
        mesh.world.broadcast_(piece, 0, False)
    x.copy_(data.view(x.dtype).view(x.shape))


def check_alike(leaves: list[torch.Tensor], handle: str, names: str, own: bool = False) -> torch.Tensor:
    """Raises MeshError, on every rank, where one was given other inputs `names`, whose tensors are `leaves`; own: than the other ranks of
    its data rank."""
    mesh, sum_of = find(handle), 0
    for x in leaves:
        if x.device.type == "cpu":
            sum_of = checksum(x, crc32(repr(tuple(x.shape)).encode(), sum_of))
    sums = [each for (each,) in mesh.world.sizes([sum_of])]
    places = [coordinates_of(index, mesh.sizes).get("data", 0) if own else 0 for index in range(mesh.size)]
    odd: list[int] = []
    for place in dict.fromkeys(places):
        found = [(each, rank) for each, rank, other in zip(sums, mesh.ranks, places, strict=True) if other == place]
        odd += odd_ranks([each for each, _ in found], [rank for _, rank in found])[0]
    if odd:
        others = "the others of their data rank" if own else "the others"
        fix = "each data rank its own batch, the same on its ranks (mesh.sampler)" if own else "every rank the same full tensors"
        raise MeshError(
            f"parallelize: rank {', '.join(map(str, odd))} got other inputs than {others} in {names}; io='full': give {fix}: seed samplers"
            " and generation alike, or pass io='local'"
        )
    return torch.zeros((), device="cpu")


define(
    "alike",
    "(Tensor[] leaves, str handle, str names, bool own) -> Tensor",
    check_alike,
    lambda leaves, handle, names, own: torch.empty((), device="cpu"),
)
