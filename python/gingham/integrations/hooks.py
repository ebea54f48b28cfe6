"""Modules of ours that follow modules of others: imported when those are, never before."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import wraps
from importlib.machinery import ModuleSpec
from typing import Any

from ..mesh import Mesh, current, has_mesh

_following: dict[str, str] = {}


class _Finder:
    """Finds nothing itself: lets the other finders find the modules that are followed, and adds what follows."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _following:
            return None
        follower = _following.pop(name)  # also keeps the search below from coming back here
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_follow(module: Any) -> None:
            execute(module)
            importlib.import_module(follower).install(module)

        spec.loader.exec_module = execute_and_follow  # type: ignore[method-assign]
        return spec


_finder = _Finder()


def when_imported(name: str, follower: str) -> None:
    """Calls `follower`.install(module) once the module `name` has been imported, now where it has been already."""
    if name in sys.modules:
        importlib.import_module(follower).install(sys.modules[name])
        return
    _following[name] = follower
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def shared_mesh() -> Mesh | None:
    """The mesh whose ranks share a batch; None where there is none, or it is one rank's."""
    return current() if has_mesh() and current().size > 1 else None


def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces a method by one that calls wrapper(mesh, original, self, *args, **kwargs) where ranks share a batch."""
    original = getattr(owner, name)
    if hasattr(original, "_gingham"):
        return

    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        mesh = shared_mesh()
        return original(self, *args, **kwargs) if mesh is None else wrapper(mesh, original, self, *args, **kwargs)

    method._gingham = True  # type: ignore[attr-defined]
    setattr(owner, name, method)
