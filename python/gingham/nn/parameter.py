"""Parameters of layers: drawn whole with torch's own functions, or given whole, and cut to this rank's block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import ShapeError
from ..mesh import Mesh, promised
from ..mesh.checksums import digest_of
from ..mesh.layout import Cuts
from ..mesh.writes import fill
from .layer import drawing_device

Given = Mapping[str, torch.Tensor] | None


def make_parameter(
    mesh: Mesh,
    cuts: Cuts,
    name: str,
    shape: Sequence[int],
    draw: Callable[[torch.Tensor], object],
    dtype: torch.dtype | None = None,
    given: Given = None,
) -> torch.nn.Parameter:
    """This rank's block of the parameter `name` of a layer, a DTensor of global `shape`.

    given None: an empty full tensor is filled by draw, in place, with torch's generator, so that every grid holds the
    bits of the serial layer. Otherwise given[name] is cut, in its own dtype, its values untouched and, on the meta
    device, absent; a Parameter's requires_grad is kept. On the mesh of a pipeline's stage what would be made on the meta device waits for
    gingham.pipeline (mesh/promised.py). Raises ShapeError where it is missing or has another shape.
    """
    if given is None and mesh.whole is not None and drawing_device() is not None:
        return _promised(mesh, cuts, torch.empty(*shape, dtype=dtype, device="meta"), draw)
    if given is None:
        full = torch.empty(*shape, dtype=dtype, device=drawing_device())
        with torch.no_grad():
            draw(full)
        return _noted(mesh.parameter(full, cuts), full)
    full = given.get(name)  # type: ignore[assignment]
    if full is None or tuple(full.shape) != tuple(shape):
        found = f"no {name!r} among {sorted(given)}" if full is None else f"{name!r} of shape {tuple(full.shape)}"
        raise ShapeError(f"given: rank {mesh.rank} got {found}, expected a full tensor of shape {tuple(shape)}")
    parameter = _noted(promised.parameter(mesh, full.detach(), cuts), full)
    if isinstance(full, torch.nn.Parameter):
        parameter.requires_grad_(full.requires_grad)
    return parameter


def _promised(mesh: Mesh, cuts: Cuts, empty: torch.Tensor, draw: Callable[[torch.Tensor], object]) -> torch.nn.Parameter:
    """A parameter that is drawn again when this rank is known to keep it."""
    parameter = promised.parameter(mesh, empty, cuts)

    def again(made: Any) -> None:
        full = torch.empty(*empty.shape, dtype=empty.dtype, device=drawing_device())
        draw(full)
        fill(mesh, made, full)

    def rehearse(full: torch.Tensor) -> None:
        draw(full)
        _noted(parameter, full)

    promised.note(parameter, again, rehearse)
    return parameter


def _noted(parameter: torch.nn.Parameter, full: torch.Tensor) -> torch.nn.Parameter:
    """With a digest of the full tensor, on which the ranks must agree when the layer is first called."""
    parameter._drawn = digest_of(full), parameter._version  # type: ignore[attr-defined]
    return parameter


def part_of(given: Given, prefix: str) -> Given:
    """The tensors of the layer `prefix`: part_of({"q.weight": w}, "q") is {"weight": w}."""
    if given is None:
        return None
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in given.items() if name.startswith(f"{prefix}.")}
