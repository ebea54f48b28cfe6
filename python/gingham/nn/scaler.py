"""GradScaler: float16 training where an infinity on one rank skips the step on all."""

from __future__ import annotations

from typing import Any

import torch

from ..autograd.casts import local_of
from ..mesh import Mesh, current


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler for parameters that ranks hold in blocks: found_inf is agreed by all ranks of the mesh, so that all
    take the step or all skip it, and all change the scale alike.

    torch's own asks the ranks of each DTensor's mesh by a collective a dtype, and nobody about a plain parameter. Here it
    is one gather of 4 bytes a rank over the world for every optimizer and step, not counted as traffic. Arguments:
    torch's; device: the mesh's by default. Raises ValueError, as torch, for float16 gradients.
    """

    def __init__(self, device: str | None = None, *args: Any, mesh: Mesh | None = None, **kwargs: Any) -> None:
        self.mesh = current(mesh)
        super().__init__(self.mesh.device.type if device is None else device, *args, **kwargs)

    @torch.no_grad()
    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    local = local_of(parameter.grad)
                    by_dtype.setdefault(local.dtype, []).append(local)
        if torch.float16 in by_dtype and not allow_fp16:
            raise ValueError(f"GradScaler: rank {self.mesh.rank} got float16 gradients, expected float32 parameters under autocast")
        device = self.mesh.device
        found, inverse = found_inf.to(device), inv_scale.to(device)
        for gradients in by_dtype.values():
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inverse)
        parts = self.mesh.world.all_gather(found.view(1), counted=False)
        parts = self.mesh.over_stages(torch.cat(parts).amax().view(1), "GradScaler.unscale_")
        return {device: torch.cat(parts).amax()}
