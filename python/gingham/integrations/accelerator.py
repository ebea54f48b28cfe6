"""accelerate.Accelerator on a mesh: the serial norm of gradients, full tensors in its files."""

from __future__ import annotations

import importlib
from functools import wraps
from typing import Any

import safetensors.torch
import torch

from ..mesh import Mesh
from ..nn import clip_grad_norm_
from .hooks import around
from .one_process import refresh
from .parallel_wrappers import on_a_mesh
from .states import FullState, full_model, read_calls, wait, write_calls


def install(module: Any) -> None:
    """module: accelerate.accelerator."""
    checkpointing: Any = importlib.import_module("accelerate.checkpointing")
    checkpointing.load_model = _reading(checkpointing.load_model)
    for name in ("prepare", "prepare_model"):
        around(module.Accelerator, name, _prepare)
    around(module.Accelerator, "clip_grad_norm_", _clip)
    around(module.Accelerator, "get_state_dict", _state_dict)
    around(module.Accelerator, "save_state", _save_state)
    around(module.Accelerator, "load_state", _load_state)
    around(module.Accelerator, "save_model", _save_model)


def _prepare(mesh: Mesh, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    refresh()  # the mesh may be younger than the Accelerator
    mesh.one_batch = True
    return original(self, *args, **kwargs)


def _clip(mesh: Mesh, original: Any, self: Any, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
    self.unscale_gradients()
    return clip_grad_norm_(parameters, max_norm, norm_type)


def _state_dict(mesh: Mesh, original: Any, self: Any, model: Any, unwrap: bool = True) -> Any:
    if on_a_mesh(model) is None:
        return original(self, model, unwrap)
    return full_model(model, "Accelerator.get_state_dict")


def _save_state(mesh: Mesh, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    optimizers = self._optimizers
    self._optimizers = [FullState(optimizer, mesh.index) for optimizer in optimizers]
    try:
        folder = original(self, *args, **kwargs)
    finally:
        self._optimizers = optimizers
    for model in self._models[:1]:
        write_calls(model, folder, mesh.index)
    wait("Accelerator.save_state")
    return folder


def _load_state(mesh: Mesh, original: Any, self: Any, input_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
    found = original(self, input_dir, *args, **kwargs)
    for model in self._models[:1] if input_dir is not None else ():
        read_calls(model, input_dir)
    return found


def _reading(load_model: Any) -> Any:
    """safetensors' load_model, which asks every tensor for its storage; for models on a mesh torch's load_state_dict."""

    @wraps(load_model)
    def load(model: torch.nn.Module, filename: Any, strict: bool = True, device: Any = "cpu") -> Any:
        if on_a_mesh(model) is None:
            return load_model(model, filename, strict=strict, device=device)
        return model.load_state_dict(safetensors.torch.load_file(filename), strict=strict)

    return load


def _save_model(mesh: Mesh, original: Any, self: Any, model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    if on_a_mesh(model) is None:
        return original(self, model, save_directory, *args, **kwargs)
    full = full_model(model, "Accelerator.save_model")
    if mesh.index == 0:
        self.get_state_dict = lambda *_, **__: full
        try:
            original(self, model, save_directory, *args, **kwargs)
        finally:
            del self.get_state_dict
    wait("Accelerator.save_model")
    return None
