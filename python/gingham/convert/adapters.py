"""peft's adapters around layers of ours: peft sizes an adapter by a DTensor weight's block, as the layer computes on a block in torch's
own tensor parallelism; here the adapter is cut like its layer (late.py), so that it is made for the whole layer.

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

from .. import nn
from .fused import FusedLinears

MODULE, FUNCTION = "peft.tuners.tuners_utils", "_get_in_out_features"


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
