"""Four ranks on GPUs, fake ones or one that they share, whose messages go by copy engines, or cannot; prints as JSON what each rank says:
what carries its messages, the largest difference from one process, the words of its warnings.

python engines.py [must]     must: ends with status 1 where not all goes by copy engines, or something is wrong
"""

import json
import sys
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
    serial = torch.nn.Linear(24, 40, dtype=torch.float64).to(mesh.device)
    x = torch.randn(12, 24, dtype=torch.float64).to(mesh.device)
    expected = serial(x).detach()
    off = (gingham.parallelize(serial)(x) - expected).abs().max().item()
    found = {"by": mesh.carried_by, "off": off, "told": [str(each.message) for each in told]}
    Path(folder, str(rank)).write_text(json.dumps(found))
    gingham.destroy()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        gingham.spawn(train, 4, folder)
        seen = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(4)]
    print(json.dumps(seen))
    right = all(each["off"] < 1e-12 and not each["told"] and set(each["by"].values()) == {"copy engines"} for each in seen)
    if "must" in sys.argv and not right:
        sys.exit(1)


if __name__ == "__main__":
    main()
