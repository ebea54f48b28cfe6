"""Tools that count processes: accelerate, transformers.Trainer, Lightning Fabric and DistributedDataParallel.

All ranks of a mesh share one batch, so these tools must see one process whose files rank 0 writes: no sampler that splits data by
rank, no wrapper that averages gradients, no gathering of predictions that every rank has already. That is arranged when
the tools are imported, before or after gingham, and holds while gingham.init's mesh has more than one rank; nothing of them changes
otherwise. Fabric takes it as a strategy: Fabric(strategy=gingham.integrations.fabric.OneBatch()).
"""

import importlib
from typing import Any

from . import hooks, parallel_wrappers

__all__ = ["install"]


def __getattr__(name: str) -> Any:
    """fabric imports Lightning Fabric, so it is imported when it is asked for."""
    if name == "fabric":
        return importlib.import_module(f"{__name__}.fabric")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install() -> None:
    """Arranges what is said above; once."""
    parallel_wrappers.install()
    hooks.when_imported("accelerate.state", "gingham.integrations.one_process")
    hooks.when_imported("accelerate.accelerator", "gingham.integrations.accelerator")
    hooks.when_imported("peft.peft_model", "gingham.integrations.adapters")
    hooks.when_imported("transformers.training_args", "gingham.integrations.training_arguments")
    hooks.when_imported("transformers.trainer", "gingham.integrations.trainer")
