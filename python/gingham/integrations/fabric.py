"""Lightning Fabric on a mesh: the strategy OneBatch, under torchrun (or gingham.spawn).

    mesh = gingham.init(mode="2d", size=4)
    fabric = Fabric(accelerator="cpu", devices=4, strategy=OneBatch())
    model, optimizer = fabric.setup(gingham.parallelize(model), optimizer)
    loader = fabric.setup_dataloaders(loader)       # the same batches on every rank

fabric.save writes full tensors by rank 0; fabric.load cuts them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from lightning_fabric.strategies import SingleDeviceStrategy

from ..mesh import current
from ..nn import clip_grad_norm_
from .states import FullState, full_model, wait


class OneBatch(SingleDeviceStrategy):
    """All ranks of gingham.init's mesh as one device: nothing is wrapped, no data is split, rank 0 prints and writes.

    Raises MeshError where there is no mesh: call gingham.init before it."""

    def __init__(self, **options: Any) -> None:
        mesh = current()
        mesh.one_batch = True
        super().__init__(device=mesh.device, **options)
        self.global_rank = self.local_rank = mesh.index
        self.cluster_environment = TorchElasticEnvironment()

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    def module_to_device(self, module: torch.nn.Module) -> None:
        """Its blocks lie on the mesh's device; what stands beside them goes there."""
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device != self.root_device:
                tensor.data = tensor.data.to(self.root_device)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Workers of all ranks draw alike."""
        begin = getattr(dataloader, "worker_init_fn", None)
        if isinstance(begin, partial) and "rank" in begin.keywords:
            dataloader.worker_init_fn = partial(begin.func, *begin.args, **{**begin.keywords, "rank": 0})
        return dataloader

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        wait("Fabric.barrier")

    def clip_gradients_norm(
        self, module: Any, optimizer: Any, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = True
    ) -> torch.Tensor:
        self.precision.unscale_gradients(optimizer)
        return clip_grad_norm_(self.precision.main_params(optimizer), max_norm, norm_type, error_if_nonfinite)

    def get_module_state_dict(self, module: torch.nn.Module) -> dict[str, Any]:
        return full_model(module, "Fabric.save")

    def get_optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        optimizer = getattr(optimizer, "optimizer", optimizer)
        return FullState(optimizer, self.global_rank).state_dict()
