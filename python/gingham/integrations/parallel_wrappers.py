"""torch's data-parallel wrappers say that a model on a mesh is none of theirs."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..errors import MeshError
from ..mesh import mesh_of


def install() -> None:
    for kind in (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel):
        _refuse(kind)


def _refuse(kind: Any) -> None:
    begin = kind.__init__
    if hasattr(begin, "_gingham"):
        return

    @wraps(begin)
    def begin_checked(self: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        found = on_a_mesh(module)
        if found is not None:
            raise MeshError(
                f"{kind.__name__}({type(module).__name__}): its {found} lies on a gingham mesh, whose ranks share one batch: gradients are"
                " summed already and must not be averaged. Use the model without the wrapper, give every rank the same batch (no"
                " DistributedSampler), and gingham.no_sync for accumulation; with Lightning Fabric:"
                " Fabric(strategy=gingham.integrations.fabric.OneBatch())"
            )
        begin(self, module, *args, **kwargs)

    begin_checked._gingham = True  # type: ignore[attr-defined]
    kind.__init__ = begin_checked


def on_a_mesh(module: torch.nn.Module) -> str | None:
    """The name of the first parameter or layer that a mesh of gingham holds."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor) and mesh_of(parameter) is not None:
            return f"parameter {name}"
    for name, child in module.named_modules():
        if type(child).__module__.startswith("gingham.nn") or hasattr(child, "gingham_plan"):
            return f"layer {name or type(child).__name__}"
    return None
