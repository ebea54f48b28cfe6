"""Four ranks on fake devices whose messages go by copy engines, or cannot; prints as JSON what each rank says: what carries its messages,
the largest difference from one process, the words of its warnings."""

import json
import tempfile
import warnings
from pathlib import Path

import torch

import gingham


def train(rank: int, folder: str) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    serial = torch.nn.Linear(24, 40, dtype=torch.float64)
    x = torch.randn(12, 24, dtype=torch.float64)
    expected = serial(x).detach()
    off = (gingham.parallelize(serial)(x) - expected).abs().max().item()
    found = {"by": mesh.carried_by, "off": off, "told": [str(each.message) for each in told]}
    Path(folder, str(rank)).write_text(json.dumps(found))
    gingham.destroy()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        gingham.spawn(train, 4, folder)
        print(json.dumps([json.loads(Path(folder, str(rank)).read_text()) for rank in range(4)]))


if __name__ == "__main__":
    main()
