"""From the command line's grid to gingham.init's arguments."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

MESHES = {"1d": 8, "2d": 4, "2.5d": 8, "3d": 8}  # ranks that a mode takes unless --ranks says otherwise
ZERO = {0: None, 1: "state", 2: "state", 3: "all"}  # data's shard by the number that the field gives it


def mesh_arguments(options: Namespace) -> dict[str, Any]:
    """Arguments of axes_of from the command line's; torchrun decides the number of ranks where it runs. Raises ValueError where options
    do not fit together."""
    launched = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 0
    if launched and options.ranks not in (0, launched):
        raise ValueError(f"--ranks {options.ranks} under a launcher that started {launched} ranks: leave --ranks out")
    if options.zero and options.data == 1:
        raise ValueError(f"--zero {options.zero} cuts what --data replicates: give --data, at least 2")
    ranks, data = options.ranks or launched, options.data
    if ranks % data:
        raise ValueError(f"--data {data} must divide the {ranks} ranks")
    rows: dict[str, Any] = {} if data == 1 else {"data": data, "shard": ZERO[options.zero]}
    if options.grid:
        return _of_grid(options, ranks) | rows
    mode = options.mode or ("2.5d" if data == 1 else None if ranks == data else "1d")
    depth = options.depth or (2 if mode == "2.5d" else 1)
    found: dict[str, Any] = {"mode": mode, "size": ranks // data or (MESHES[mode] if mode else 1), "depth": depth}
    return found | ({"sequence": True} if options.sequence else {}) | rows


def _of_grid(options: Namespace, ranks: int) -> dict[str, Any]:
    if options.mode:
        raise ValueError("--grid and --mode exclude each other: give one of them")
    if options.depth or options.sequence:
        raise ValueError(f"--{'depth' if options.depth else 'sequence'} belongs to a mode and not to --grid: leave it out")
    size = options.grid[0] * options.grid[1] * options.grid[2]
    if (ranks or size * options.data) != size * options.data:
        times = "" if options.data == 1 else f" with --data {options.data}"
        raise ValueError(f"--grid {','.join(map(str, options.grid))}{times} needs {size * options.data} ranks, got {ranks}")
    return {"mode": None, "size": size, "grid": options.grid}


def init_arguments(grid: dict[str, Any]) -> dict[str, Any]:
    """Of gingham.init, for those of axes_of."""
    if "data" not in grid:
        return grid
    tensor = {name: value for name, value in grid.items() if name not in ("data", "shard")}
    return {"parallel": {"data": {"size": grid["data"], "shard": grid["shard"]}, "tensor": tensor}}
