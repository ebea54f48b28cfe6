"""Four ranks on fake devices: the memory of messages under way outlasts them, whatever becomes of the call that sent them.

Prints as JSON what each saw: [how many of the two tensors of a group live before it is settled, and how many after; what a call said that
an error left, and how many groups were under way by then]. One of them is made to hang, and a later one of the same call to fail, by
FAKE_NCCL_HANG and FAKE_NCCL_REFUSE: the fake runtime ends a rank whose workspace is used again under a message.
"""

import ctypes
import json
import os
import sys
import tempfile
import weakref
from pathlib import Path

import torch

import gingham

RANKS = 4


def posted(mesh: gingham.Mesh) -> tuple[int, int]:
    """Nobody but the axis holds them, as where an error takes the caller away."""
    x, y = torch.ones(4), torch.empty(4)
    held = [weakref.ref(x), weakref.ref(y)]
    number = mesh.world.post([((mesh.rank + 1) % RANKS, x)], [((mesh.rank - 1) % RANKS, y)])
    del x, y
    alive = sum(each() is not None for each in held)
    mesh.world.settle(number)
    return alive, sum(each() is not None for each in held)


def broken_off(mesh: gingham.Mesh) -> tuple[str, int]:
    layer, x = gingham.nn.Linear(32, 32), mesh.scatter(torch.ones(16, 32))
    try:
        for _ in range(10):
            layer(x).sum().backward()
    except Exception as error:
        return str(error), ctypes.CDLL(os.environ["GINGHAM_NCCL"]).fake_nccl_under_way()
    return "nothing", 0


def body(rank: int, folder: str) -> None:
    mesh = gingham.init(mode="2d", size=RANKS, slices=4, timeout=1.0)
    Path(folder, str(rank)).write_text(json.dumps([*posted(mesh), *broken_off(mesh)]))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            gingham.spawn(body, RANKS, folder)
        except Exception as error:
            print(f"spawn raised {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        found = [Path(folder, str(rank)) for rank in range(RANKS)]
        print(json.dumps([json.loads(path.read_text()) if path.exists() else None for path in found]))


if __name__ == "__main__":
    main()
