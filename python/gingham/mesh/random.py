"""Random operations on parameters: torch.nn.init.normal_(layer.weight) draws the whole tensor on every rank and keeps the block.

DTensor asks a tracker around each of its random operations; on a CPU mesh it has none, and every rank would draw the
same numbers for its own block. This one, for DTensors of a mesh of gingham, lets the operation run on a tensor of the
global shape, so that the bits are those of one process, and generators advance alike on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import _random
from torch.utils._python_dispatch import TorchDispatchMode

from .layout import Block, block, slices
from .mesh import cuts_of, mesh_on


class _Whole(TorchDispatchMode):
    """Runs the one random operation inside it on a tensor of the global shape."""

    def __init__(self, shape: tuple[int, ...], here: Block, generator: torch.Generator | None) -> None:
        super().__init__()
        self.shape, self.here, self.generator = shape, slices(here), generator

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        first, *rest = args
        options = {**(kwargs or {}), **({"generator": self.generator} if self.generator is not None else {})}
        full = torch.ones(self.shape, dtype=first.dtype, device=first.device)
        if func is torch.ops.aten.native_dropout.default:
            scaled, kept = func(full, *rest, **options)
            return first * scaled[self.here], kept[self.here].contiguous()
        if func is torch.ops.aten.bernoulli.default:  # of probabilities, which differ by element
            return (
                torch.rand(self.shape, dtype=first.dtype, device=first.device, generator=self.generator)[self.here]
                .lt(first)
                .to(first.dtype)
            )
        drawn = func(full, *rest, **options)
        return first.copy_(full[self.here]) if func._schema.name.endswith("_") else drawn[self.here].contiguous()


class Tracker:
    """What torch.distributed.tensor calls around random operations; those of other meshes go to the tracker before."""

    def __init__(self, before: Any) -> None:
        self.before = before

    @property
    def distribute_region_enabled(self) -> bool:
        return True

    @contextmanager
    def _distribute_region(self, spec: Any, generator: torch.Generator | None = None) -> Iterator[None]:
        mesh = mesh_on(spec.mesh)
        if mesh is None:
            if self.before is None:
                yield
                return
            with self.before._distribute_region(spec, generator=generator):
                yield
            return
        shape = tuple(spec.shape)
        here = block(shape, cuts_of(mesh, spec.placements, len(shape)), mesh.sizes, mesh.coordinates)
        with _Whole(shape, here, generator):
            yield

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["before"], name)


def install() -> None:
    """For init: torch has one tracker a process, made at the first random operation on a GPU."""
    if not isinstance(_random._rng_tracker, Tracker):
        _random._rng_tracker = Tracker(_random._rng_tracker)  # type: ignore[assignment]
