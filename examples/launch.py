"""What the examples share: --ranks, --mode, --depth or --grid, and ranks started here where torchrun has not started them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import gingham


def arguments(description: str | None, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--mode", default="2.5d", help="1d, 2d, 2.5d, 3d, sequence or auto")
    parser.add_argument("--depth", type=int, default=2, help="of mode 2.5d")
    parser.add_argument("--grid", help="pm,pn,pk instead of a mode")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser


def grid_of(options: argparse.Namespace) -> dict[str, Any]:
    """gingham.init's arguments."""
    if options.grid:
        return dict(grid=tuple(int(part) for part in options.grid.split(",")))
    return dict(mode=options.mode, size=options.ranks, depth=options.depth if options.mode == "2.5d" else None)


def launch(main: Callable[..., Any], options: argparse.Namespace) -> Any:
    """main(rank, options, grid) on every rank; rank 0's result."""
    grid = grid_of(options)
    if "RANK" in os.environ:
        return main(int(os.environ["RANK"]), options, grid)
    return gingham.spawn(main, options.ranks, options, grid)[0]
