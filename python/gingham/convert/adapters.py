"""peft's adapters around layers of ours: which of them a mesh holds, and how large they are.

peft sizes an adapter by a DTensor weight's block, as the layer computes on a block in torch's own tensor parallelism; here the adapter is
cut like its layer (late.py), so that it is made for the whole layer. LoRA of linears, and norms and modules that are trained as they
are, are taken; what computes with whole weights, whole features or virtual tokens is refused by its configuration's name.

peft may be imported before this package, after it or never, so that its one function is replaced when its module is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from .. import nn
from .fused import FusedLinears

MODULE, FUNCTION = "peft.tuners.tuners_utils", "_get_in_out_features"
TAKEN = ("LoraConfig", "LNTuningConfig")
# options of LoraConfig by which an adapter is another than x -> B(A(x)) beside a linear
VARIANTS = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "trainable_token_indices"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
OF_WHOLE = "or train it in one process, without gingham.parallelize"


def refuse_configuration(config: Any, late: bool) -> None:
    """Raises NotImplementedError for an adapter's configuration that no mesh holds, naming it. late: it comes to a converted model, whose
    weights an initialisation cannot read."""
    kind = type(config).__name__
    if getattr(config, "is_prompt_learning", False):
        raise NotImplementedError(
            f"{kind}: virtual tokens go into a model beside whole embeddings or whole caches of its heads, of which a rank has parts;"
            f" use peft.LoraConfig, {OF_WHOLE}"
        )
    if kind not in TAKEN:
        raise NotImplementedError(
            f"{kind}: its adapters compute with whole weights or whole features of a layer, of which a rank has parts; use"
            f" peft.LoraConfig (taken are {' and '.join(TAKEN)}), {OF_WHOLE}"
        )
    variant = next((name for name in VARIANTS if getattr(config, name, None)), None)
    if variant == "trainable_token_indices":
        raise NotImplementedError(
            f"{kind}(trainable_token_indices=..): rows of a table would be put beside a table that ranks cut; use peft.LoraConfig without"
            f" it, where the embedding's name in modules_to_save trains the whole table, {OF_WHOLE}"
        )
    if variant is not None:
        raise NotImplementedError(
            f"{kind}({variant}=..): this variant computes with whole weights or whole features of a layer, of which a rank has parts; use"
            f" peft.LoraConfig without {variant}, {OF_WHOLE}"
        )
    start = getattr(config, "init_lora_weights", True)
    if late and isinstance(start, str) and start not in ("gaussian", "orthogonal"):
        raise NotImplementedError(
            f"{kind}(init_lora_weights={start!r}) reads and changes whole weights, of which a rank has parts; make the PeftModel before"
            " gingham.parallelize, or use peft.LoraConfig with init_lora_weights=True or 'gaussian'"
        )


def refuse_adapters(model: torch.nn.Module) -> None:
    """Raises NotImplementedError where an adapter in a model is none that a mesh holds, before anything is changed."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for config in configs.values() if isinstance(configs, dict) else ():
            refuse_configuration(config, late=False)


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def sizes(module: Any) -> Any:
        if isinstance(module, nn.Linear):
            return module.in_features, module.out_features
        if isinstance(module, FusedLinears):
            part: Any = module.q
            return part.in_features, 3 * part.out_features
        return function(module)

    sizes._of_gingham = True  # type: ignore[attr-defined]
    return sizes


def _replace() -> None:
    """In peft's module, and in those that took the function from it by name."""
    for name, module in list(sys.modules.items()):
        function = getattr(module, FUNCTION, None) if name.startswith("peft.") else None
        if function is not None and not hasattr(function, "_of_gingham"):
            setattr(module, FUNCTION, _whole(function))


class _WhenImported(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _replace()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """For the package's import."""
    if MODULE in sys.modules:
        _replace()
    else:
        sys.meta_path.insert(0, _WhenImported())
