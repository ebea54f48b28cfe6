"""Run by an installed wheel's own Python, away from the sources: what was imported from where, whether it computes, what it says without a
GPU. Prints one line of JSON; the checks are in test_wheels.py."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import gingham
from gingham import native


def linears() -> tuple[torch.nn.Sequential, torch.nn.Sequential]:
    """Two layers of ours and of torch's; the same bits where the seed is the same."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(gingham.nn.Linear(16, 32), torch.nn.GELU(), gingham.nn.Linear(32, 8))
    torch.manual_seed(0)
    return ours, torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))


def difference(mesh: Any) -> float:
    """The largest of outputs and of every gradient beside torch's, as a part of the largest value there."""
    ours, theirs = linears()
    torch.manual_seed(1)
    x, gradient = torch.randn(12, 16), torch.randn(12, 8)
    a, b = mesh.scatter(x).requires_grad_(), x.clone().requires_grad_()
    y, truth = ours(a), theirs(b)
    y.backward(mesh.scatter(gradient))
    truth.backward(gradient)
    pairs = [(mesh.gather(y), truth), (mesh.gather(a.grad), b.grad)]
    pairs += [(mine.grad.full_tensor(), their.grad) for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True)]
    return max(float((mine - their).abs().max() / their.abs().max()) for mine, their in pairs)


def alone(**options: Any) -> float:
    mesh = gingham.init(**options)
    found = difference(mesh)
    gingham.destroy()
    return found


def refusal() -> str:
    try:
        gingham.init(mode="1d", size=1, device="cuda")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def command(*words: str) -> list[Any]:
    done = subprocess.run([sys.executable, "-m", "gingham", *words], capture_output=True, text=True, timeout=300)
    return [done.returncode, done.stdout[-3000:], done.stderr[-3000:]]


def main() -> None:
    core = next(Path(gingham.__file__).parent.glob("_C*.so"))
    train = "train --ranks 4 --mode 2d --steps 2 --layers 1 --width 16 --heads 4 --context 16 --sample 0 --plot= --compare-serial"
    found = {
        "package": gingham.__file__,
        "core": str(core),
        "core sha256": hashlib.sha256(core.read_bytes()).hexdigest(),
        "version": gingham.__version__,
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda,
        "gpu": torch.cuda.is_available(),
        "report": native.device_report(),
        "one rank": alone(mode="1d", size=1),
        "four ranks": gingham.spawn(lambda rank: alone(mode="2d", size=4), 4),
        "refusal": refusal(),
        "help": command("--help"),
        "doctor": command("doctor", "--test"),
        "bench": command("bench", "matmul", "--grid", "2,2,1", "--shape", "64,64,64", "--check", "--rounds", "2"),
        "train": command(*train.split()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
