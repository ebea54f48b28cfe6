"""Gradient clipping by the norm of all gradients of the job."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any
from zlib import crc32

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.weak import WeakIdKeyDictionary

from ..autograd.casts import local_of
from ..autograd.gradients import owing
from ..errors import MeshError
from ..mesh import Mesh, current, mesh_among, mesh_of
from ..mesh.carried import on_host

_plain_of_stages: Any = WeakIdKeyDictionary()  # plain parameters of pipelines, with their meshes


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scales gradients in place so that their joint norm is at most max_norm; returns the norm before, [] float32, of
    float64 gradients float64, the same on every rank and equal to the serial one within rounding (replicas count once, sums in float64).

    One gather of 8 bytes a rank over the world, not counted as traffic, and one over the stages of a pipeline, whose joint norm it
    is; of parameters that torch's FSDP2 has wrapped, torch's own clip_grad_norm_. norm_type: a power > 0 or torch.inf.
    error_if_nonfinite: a norm that is nan or infinite is a RuntimeError, on every rank.
    foreach is torch's and changes nothing here. Raises MeshError where gradients are parts of sums that no_sync left out, or the
    ranks ask for other norms or gradients, ValueError for a norm_type <= 0.
    """
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    if any(isinstance(each, DTensor) and mesh_of(each) is None for each in parameters):  # FSDP2's, whose norms torch knows to join
        found: Any = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
        return _as_gradients((found.full_tensor() if isinstance(found, DTensor) else found), parameters)
    mesh = current(mesh_among("clip_grad_norm_", parameters))
    max_norm, norm_type = float(max_norm), float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"clip_grad_norm_: rank {mesh.rank} got norm_type={norm_type}, expected a power > 0 or torch.inf")
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    _refuse_parts(mesh, "clip_grad_norm_", parameters)
    infinite = norm_type == torch.inf
    mine = torch.zeros(1, dtype=torch.float64, device=mesh.device)
    for parameter in parameters:
        if (grad := parameter.grad) is None:
            continue
        local = local_of(grad).double().abs()
        if infinite:
            mine = torch.maximum(mine, local.max().view(1) if local.numel() else mine)
        elif _counts_here(grad, mesh.coordinates) and not getattr(parameter, "tied_to_earlier_stage", False):
            mine += local.pow(norm_type).sum()
    shapes = crc32(repr([tuple(grad.shape) for grad in grads]).encode())
    mesh.say(f"clip_grad_norm_({max_norm=}, {norm_type=}, {error_if_nonfinite=}) of {len(grads)} gradients, shapes {shapes:08x}")
    parts = torch.cat(mesh.world.all_gather(mine, counted=False))
    stage = parts.amax(0, keepdim=True) if infinite else parts.sum(0, keepdim=True)
    parts = torch.cat(mesh.over_stages(stage, f"clip_grad_norm_({max_norm=}, {norm_type=}, {error_if_nonfinite=})"))
    norm = parts.max() if infinite else parts.sum().pow(1 / norm_type)
    if error_if_nonfinite and not torch.isfinite(on_host(mesh, norm)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients is non-finite ({float(norm)} on rank {mesh.rank}), so it cannot be clipped."
            " To disable this error and scale the gradients by the non-finite norm anyway, set error_if_nonfinite=False"
        )
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        local_of(grad).mul_(scale.to(grad.dtype))
    return _as_gradients(norm, grads)


def _as_gradients(norm: torch.Tensor, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return norm.to(torch.float64 if any(each.dtype == torch.float64 for each in tensors) else torch.float32)


def _refuse_parts(mesh: Mesh, name: str, parameters: list[torch.Tensor]) -> None:
    if owing(parameters):
        raise MeshError(
            f"{name}: rank {mesh.rank} got gradients whose sums over ranks no_sync left out; expected one backward pass after"
            " the no_sync block, which makes them"
        )


def note_stage(mesh: Mesh, parameters: Iterable[torch.Tensor]) -> None:
    """Keeps in mind which plain parameters are those of one stage of a pipeline; DTensors say it themselves."""
    for each in parameters:
        if mesh.whole is not None and not isinstance(each, DTensor):
            _plain_of_stages[each] = mesh


def stage_of(tensors: Iterable[torch.Tensor]) -> Mesh | None:
    """The mesh of a stage of a pipeline whose parameters, or their gradients, are among these."""
    held: dict[int, Mesh] | None = None
    for each in tensors:
        if isinstance(each, DTensor):
            mesh = mesh_of(each)
        else:
            if held is None:
                pairs = list(_plain_of_stages.items())
                held = {id(found): mesh for parameter, mesh in pairs for found in (parameter, parameter.grad) if found is not None}
            mesh = held.get(id(each))
        if mesh is not None and mesh.whole is not None:
            return mesh
    return None


def _refuse_stage(name: str, tensors: Iterable[torch.Tensor]) -> None:
    mesh = stage_of(tensors)
    if mesh is not None:
        raise MeshError(
            f"torch.nn.utils.{name}: rank {mesh.rank} got the gradients of one stage of a pipeline; expected gingham.clip_grad_norm_,"
            " whose norm is that of all stages (with max_norm=torch.inf it changes no gradient)"
        )


def _total(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch's own norm of a list of tensors, which nobody joins over the stages of a pipeline, nor that of DTensors and plain tensors."""

    @wraps(norm)
    def joint(tensors: Any, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        _refuse_stage("get_total_norm", tensors)
        mesh, plain = _beside(tensors)
        if mesh is not None and plain:
            if mesh.data.size > 1:
                raise MeshError(
                    f"torch.nn.utils.get_total_norm: rank {mesh.rank} got a plain tensor {tuple(plain[0].shape)} beside DTensors on a mesh"
                    f" with data={mesh.data.size}, where a plain parameter's gradient is that of this rank's part of the batch; expected"
                    " all layers in the model of gingham.parallelize, or, of plain gradients that are the same on every rank,"
                    " gingham.clip_grad_norm_"
                )
            cut: list[Any] = [each for each in tensors if isinstance(each, DTensor)]
            with torch.no_grad():
                found: Any = torch.stack(torch._foreach_norm(cut, float(norm_type)))
                tensors = [*found.full_tensor(), *torch._foreach_norm(plain, float(norm_type))]
        return norm(tensors, norm_type, *args, **kwargs)

    return joint


def _beside(tensors: list[torch.Tensor]) -> tuple[Mesh | None, list[torch.Tensor]]:
    """The mesh of ours on which DTensors lie, and the plain tensors beside them."""
    mesh = next(filter(None, (mesh_of(each) for each in tensors if isinstance(each, DTensor))), None)
    return mesh, [each for each in tensors if not isinstance(each, DTensor)]


def _of_the_job(clip: Callable[..., None]) -> Callable[..., None]:
    """torch's own way to scale gradients by their norm, which DTensors join over a mesh, and nobody over the stages of a pipeline."""

    @wraps(clip)
    def scale(parameters: Any, max_norm: float, total_norm: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        tensors = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        _refuse_stage("clip_grads_with_norm_", tensors)
        mesh, plain = _beside(tensors)
        if mesh is not None:
            _refuse_parts(mesh, "torch.nn.utils.clip_grad_norm_", tensors)
            if plain and isinstance(total_norm, DTensor):
                total_norm = total_norm.full_tensor()
        clip(tensors, max_norm, total_norm, *args, **kwargs)

    return scale


def _install() -> None:
    module: Any = torch.nn.utils.clip_grad
    if hasattr(module, "_clip_grads_with_norm_"):
        module._clip_grads_with_norm_ = torch.nn.utils.clip_grads_with_norm_ = _of_the_job(module._clip_grads_with_norm_)
    if hasattr(module, "_get_total_norm"):
        module._get_total_norm = torch.nn.utils.get_total_norm = _total(module._get_total_norm)


def _counts_here(grad: torch.Tensor, coordinates: dict[str, int]) -> bool:
    """Of the ranks that hold copies of a block the first counts it."""
    if not isinstance(grad, DTensor):
        return not any(coordinates.values())
    placed = zip(coordinates.values(), grad.placements, strict=True)
    return all(place == 0 for place, placement in placed if isinstance(placement, Replicate))


_install()
