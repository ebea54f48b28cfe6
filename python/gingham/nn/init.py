"""torch.nn.init on the parameters of layers: each function fills the whole parameter as it does for torch.nn and keeps this rank's
block, so that fans are global, and bits those of one process after the same seed.

    gingham.nn.init.orthogonal_(layer.weight)

Every function of torch.nn.init that ends in "_" is here under its own name. Those that fill each element by itself
(normal_, uniform_, constant_, kaiming_uniform_, ..) do the same when they are called as torch.nn.init's own, and so do those that look at
the whole matrix, since torch.nn.init's hand DTensors of a mesh to these (`from torch.nn.init import orthogonal_` after gingham).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..mesh import mesh_of, promised
from ..mesh.writes import fill
from .layer import drawing_device

WHOLE = ("dirac_", "eye_", "orthogonal_", "sparse_", "trunc_normal_")  # of torch.nn.init: look at more than one element


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def initialise(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return function(tensor, *args, **kwargs)
        mesh = mesh_of(tensor)
        if mesh is None:
            return function(tensor, *args, **kwargs)
        if promised.waits(tensor):
            promised.note(tensor, lambda made: initialise(made, *args, **kwargs), lambda full: function(full, *args, **kwargs))
            return tensor
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=drawing_device())
        function(full, *args, **kwargs)
        fill(mesh, tensor, full)
        return tensor

    return initialise


_FUNCTIONS = {name: _whole(function) for name, function in vars(torch.nn.init).items() if name.endswith("_") and not name.startswith("_")}
globals().update(_FUNCTIONS)
for _name in WHOLE:
    setattr(torch.nn.init, _name, _whole(getattr(torch.nn.init, _name)))
__all__ = sorted(_FUNCTIONS)  # noqa: PLE0605
