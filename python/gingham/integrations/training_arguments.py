"""transformers.TrainingArguments on a mesh: the mesh's device, one device a process."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

from .hooks import shared_mesh


def install(module: Any) -> None:
    """module: transformers.training_args."""
    setup = module.TrainingArguments.__dict__["_setup_devices"].func

    def _setup_devices(self: Any) -> Any:
        device, mesh = setup(self), shared_mesh()
        if mesh is None:
            return device
        self._n_gpu = 0 if mesh.device.type == "cpu" else 1
        return mesh.device

    devices = cached_property(_setup_devices)
    devices.__set_name__(module.TrainingArguments, "_setup_devices")
    module.TrainingArguments._setup_devices = devices
    # it advises torch's DDP wherever there is a process group
    logging.getLogger(module.__name__).addFilter(lambda record: shared_mesh() is None or "parallel_mode" not in str(record.msg))
