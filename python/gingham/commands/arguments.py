"""From the command line's grid to gingham.init's arguments."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ..mesh.modes import Axes, axes_of

MODES = ("1d", "2d", "2.5d", "3d", "sequence")
MESHES = {"1d": 8, "2d": 4, "2.5d": 8, "3d": 8, "sequence": 4}  # ranks that a mode takes unless --ranks says otherwise
ZERO = {0: None, 1: "state", 2: "state", 3: "all"}  # data's shard by the number that the field gives it


def mesh_arguments(options: Namespace) -> dict[str, Any]:
    """Arguments of axes_of from the command line's, and "pipeline" where the model is cut into stages or a batch into micro-batches;
    torchrun decides the number of ranks where it runs. Raises ValueError where options do not fit together."""
    launched = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 0
    if launched and options.ranks not in (0, launched):
        raise ValueError(f"--ranks {options.ranks} under a launcher that started {launched} ranks: leave --ranks out")
    if options.zero and options.data == 1:
        raise ValueError(f"--zero {options.zero} cuts what --data replicates: give --data, at least 2")
    ranks, data = options.ranks or launched, options.data
    stages = _pipeline(options)
    others = data * stages.get("pipeline", {}).get("size", 1)
    if ranks % others:
        beside = "" if others == data else f" x --pipeline {others // data}"
        raise ValueError(f"--data {data}{beside} must divide the {ranks} ranks")
    rows: dict[str, Any] = {} if data == 1 else {"data": data, "shard": ZERO[options.zero]}
    if options.grid:
        return _of_grid(options, ranks, others) | rows | stages
    mode = options.mode or ("2.5d" if others == 1 else None if ranks == others else "1d")
    depth = options.depth or (2 if mode == "2.5d" else 0)
    found: dict[str, Any] = {"mode": mode, "size": ranks // others or (MESHES[mode] if mode else 1)} | ({"depth": depth} if depth else {})
    return found | ({"sequence": True} if options.sequence else {}) | rows | stages


def _pipeline(options: Namespace) -> dict[str, Any]:
    """ "pipeline": gingham.pipeline's arguments with all defaults filled in, or nothing where it is not needed."""
    size, count = options.pipeline, options.microbatches
    if size == 1 and options.schedule:
        raise ValueError(f"--schedule {options.schedule} orders the passes of stages: give --pipeline, at least 2")
    if options.microbatches > options.batch:
        raise ValueError(f"--microbatches {count} cut --batch {options.batch}: at most one a sample")
    if size == 1 and count <= 1:
        return {}
    usual = {"size": size, "schedule": options.schedule or "1f1b", "microbatches": count or (2 * size if size > 1 else 1)}
    if usual["microbatches"] > options.batch:
        raise ValueError(f"--pipeline {size} takes {2 * size} micro-batches, more than --batch {options.batch}: give --microbatches")
    return {"pipeline": usual}


def _of_grid(options: Namespace, ranks: int, others: int) -> dict[str, Any]:
    if options.mode:
        raise ValueError("--grid and --mode exclude each other: give one of them")
    if options.depth or options.sequence:
        raise ValueError(f"--{'depth' if options.depth else 'sequence'} belongs to a mode and not to --grid: leave it out")
    size = options.grid[0] * options.grid[1] * options.grid[2]
    if (ranks or size * others) != size * others:
        times = "" if options.data == 1 else f" with --data {options.data}"
        times += "" if others == options.data else f" and --pipeline {options.pipeline}"
        raise ValueError(f"--grid {','.join(map(str, options.grid))}{times} needs {size * others} ranks, got {ranks}")
    return {"mode": None, "size": size, "grid": options.grid}


def stage_axes(grid: Mapping[str, Any]) -> Axes:
    """The axes of one stage, of mesh_arguments' result. Raises MeshError where its numbers do not fit."""
    return axes_of(**{name: value for name, value in grid.items() if name != "pipeline"})


def stages_in(grid: Mapping[str, Any]) -> int:
    """The pipeline ranks of mesh_arguments' result."""
    return int(grid.get("pipeline", {"size": 1})["size"])


def parts_in(grid: Mapping[str, Any]) -> int:
    """The micro-batches of a step of mesh_arguments' result."""
    return int(grid.get("pipeline", {"microbatches": 1})["microbatches"])


def init_arguments(grid: dict[str, Any]) -> dict[str, Any]:
    """Of gingham.init, for those of mesh_arguments."""
    outer = {name: grid[name] for name in ("data", "pipeline") if name in grid}
    if not outer:
        return grid
    if "data" in outer:
        outer["data"] = {"size": grid["data"], "shard": grid["shard"]}
    return {"parallel": outer | {"tensor": {name: value for name, value in grid.items() if name not in ("data", "shard", "pipeline")}}}
