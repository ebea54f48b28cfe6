"""Ranges for torch.profiler: gingham::linear[blocks.0.fc1], around a layer's forward pass, with the bytes that this rank received in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..mesh.named import path_of


def profiling() -> bool:
    return torch.autograd._profiler_enabled()


def in_range(layer: Any, run: Callable[[], Any], suffix: str = "") -> Any:
    """run() inside the range of a layer; its name is looked for once."""
    if "_range" not in layer.__dict__:
        layer.__dict__["_range"] = path_of(layer) or ", ".join(map(str, layer.sizes()))
    mesh, kind = layer.mesh, type(layer).__name__.lower()
    before = received(mesh)
    with torch.profiler.record_function(f"gingham::{kind}{suffix}[{layer.__dict__['_range']}]"):
        result = run()
        with torch.profiler.record_function(f"gingham::received {received(mesh) - before} bytes"):
            pass
    return result


def received(mesh: Any) -> int:
    """So far, over all axes."""
    return sum(axis["bytes_received"] for axis in mesh.traffic().values())
