"""peft on a mesh: adapters' files and state dicts as of one process, and what of peft reads whole tensors refused by name.

A PeftModel's adapter is written by rank 0 as one process writes it; every rank calls save_pretrained. A weight that is held as three
(beside GPT-2's c_attn) has one key in an adapter's state dict, and its bias is trained where peft's bias="lora_only" asks for it.
"""

from __future__ import annotations

import importlib
import inspect
from functools import wraps
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..checkpoint.pretrained import save_pretrained
from ..convert.adapters import refuse_configuration
from ..mesh import Mesh
from .hooks import around, shared_mesh
from .parallel_wrappers import on_a_mesh


def install(module: Any) -> None:
    """module: peft.peft_model."""
    around(module.PeftModel, "save_pretrained", _save)
    around(module.PeftModel, "__init__", _first)
    around(module.PeftModel, "add_adapter", _another)
    around(importlib.import_module("peft.tuners.tuners_utils").BaseTuner, "inject_adapter", _inject)
    _refuse_combining(module)
    _know_joins()


def _save(mesh: Mesh, original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    if on_a_mesh(self) is None:
        original(self, *args, **kwargs)
        return
    given = inspect.signature(original).bind(self, *args, **kwargs)  # peft's second argument is another than transformers'
    options: dict[str, Any] = {name: value for name, value in given.arguments.items() if name not in ("self", "kwargs")}
    options |= given.arguments.get("kwargs", {})
    save_pretrained(self, method=original, **options)


def _first(mesh: Mesh, original: Any, self: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    _refuse(model, peft_config)
    original(self, model, peft_config, *args, **kwargs)


def _another(mesh: Mesh, original: Any, self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    _refuse(self, peft_config)
    original(self, adapter_name, peft_config, *args, **kwargs)


def _inject(mesh: Mesh, original: Any, self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """Also by transformers' model.add_adapter, where there is no PeftModel."""
    _refuse(model, self.peft_config[adapter_name])
    original(self, model, adapter_name, *args, **kwargs)


def _refuse(model: Any, config: Any) -> None:
    if on_a_mesh(model) is not None:
        refuse_configuration(config, late=True)


def _refuse_combining(module: Any) -> None:
    lora: Any = importlib.import_module("peft.tuners.lora.model")

    original = lora.LoraModel.add_weighted_adapter
    if hasattr(original, "_gingham"):
        return

    @wraps(original)
    def combine(self: Any, *args: Any, **kwargs: Any) -> Any:
        if shared_mesh() is not None and on_a_mesh(self.model) is not None:
            raise NotImplementedError(
                "add_weighted_adapter works on whole adapters, of which a rank has parts: save_pretrained them, combine them on a model"
                " that is not converted, then gingham.parallelize that model"
            )
        return original(self, *args, **kwargs)

    combine._gingham = True  # type: ignore[attr-defined]
    lora.LoraModel.add_weighted_adapter = combine


def _joined(model: torch.nn.Module) -> dict[str, tuple[list[str], int]]:
    """The parts and the dim of each weight that is held in parts, by its key in the original model."""
    found = {}
    for path, module in model.named_modules():
        for name, (parts, dim) in getattr(module, "joins", {}).items():
            found[f"{path}.{name}"] = [f"{path}.{part}" for part in parts], dim
    return found


def _know_joins() -> None:
    tuner: Any = importlib.import_module("peft.tuners.tuners_utils").BaseTuner
    if hasattr(tuner, "_gingham"):
        return
    tuner._gingham = True
    gather, remap = tuner._get_adapter_state_dict.__func__, tuner._remap_adapter_state_dict_for_load.__func__
    mark = tuner._mark_only_adapters_as_trainable

    @wraps(gather)
    def get(cls: Any, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        state_dict = dict(state_dict)
        for key, (parts, dim) in _joined(model).items():
            if all(part in state_dict for part in parts):
                pieces = [state_dict.pop(part) for part in parts]
                state_dict[key] = torch.cat([each.full_tensor() if isinstance(each, DTensor) else each for each in pieces], dim)
        return gather(cls, model, config, adapter_name, state_dict, *args, **kwargs)

    @wraps(remap)
    def load(cls: Any, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Any], **kwargs: Any) -> Any:
        found = remap(cls, model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **kwargs)
        for key in _joined(model):
            stored = cls._remove_adapter_name_from_key(key, adapter_name)
            if stored != key and stored in found:
                found[key] = found.pop(stored)
        return found

    @wraps(mark)
    def mark_biases(self: Any, model: torch.nn.Module) -> None:
        mark(self, model)
        if any(getattr(self.peft_config[name], "bias", "none").endswith("_only") for name in self.active_adapters):
            for module in model.modules():
                holder: Any = module._modules.get("base_layer")
                if isinstance(module, self.tuner_layer_cls) and "bias" in getattr(holder, "joins", {}):
                    for part in holder.joins["bias"][0]:
                        holder.get_parameter(part).requires_grad = True

    tuner._get_adapter_state_dict = classmethod(get)
    tuner._remap_adapter_state_dict_for_load = classmethod(load)
    tuner._mark_only_adapters_as_trainable = mark_biases
