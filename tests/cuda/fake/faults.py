"""Four ranks on fake devices train until one fails; prints what each saw as JSON: [error, named rank, seconds] or null.

python faults.py killed | raises | leaves | "nccl error" | "nccl hangs"      (the last two are injected by FAKE_NCCL_FAIL, _HANG)
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import gingham

TIMEOUT = 3.0


def train(rank: int, fault: str, folder: str) -> None:
    gingham.init(mode="2d", size=4, timeout=TIMEOUT)
    layer = gingham.nn.Linear(16, 16)
    x = torch.ones(4, 8, requires_grad=True)
    began, kind, named = time.monotonic(), None, -1
    try:
        for step in range(2000):
            began = time.monotonic()
            layer(x).sum().backward()
            if step == 3 and rank == 2:
                act(fault)
            if step == 3 and rank == 2 and fault == "leaves":
                return
    except (gingham.PeerDied, gingham.PeerStalled) as error:
        kind, named = type(error).__name__, error.rank
    Path(folder, str(rank)).write_text(json.dumps([kind, named, round(time.monotonic() - began, 2)]))


def act(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raises":
        raise ValueError("a rank's own mistake")
    if fault == "leaves":
        gingham.destroy()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            gingham.spawn(train, 4, sys.argv[1], folder)
        except Exception as error:
            print(f"spawn raised {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        found = [Path(folder, str(rank)) for rank in range(4)]
        print(json.dumps([json.loads(path.read_text()) if path.exists() else None for path in found]))


if __name__ == "__main__":
    main()
