"""Rung 6: one binary, built by nvcc, computes beside CPU torch without driver or NCCL, and says what is missing."""

import json
import os
import subprocess
import sys

import pytest

from cuda import nvcc

pytestmark = pytest.mark.skipif(nvcc.toolkit() is None, reason="no nvcc: the package was built for the CPU only, which it must say")

SCRIPT = """
import json, torch, gingham
from gingham import native
found = {"report": native.device_report()}
gingham.init(mode="1d", size=1)
x = torch.randn(4, 8, requires_grad=True)
layer = gingham.nn.Linear(8, 3)
layer(x).sum().backward()
found["difference"] = float((layer(x) - torch.nn.functional.linear(x, layer.weight.to_local(), layer.bias.to_local())).abs().max())
gingham.destroy()
try:
    gingham.init(mode="1d", size=1, device="cuda")
    found["refusal"] = ""
except Exception as error:
    found["refusal"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def test_beside_cpu_torch() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GINGHAM_")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=kept, cwd=nvcc.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["report"]["built"], "nvcc is here, but the package was built without CUDA"
    assert found["difference"] < 1e-6
    if not found["report"]["devices"]:
        assert "no CUDA device" in found["refusal"] and "rank 0" in found["refusal"], found


def test_nothing_of_cuda_is_linked() -> None:
    """cudart is inside; libcuda, libcudart and NCCL must not be needed to import."""
    from gingham import _C

    done = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True)
    assert done.returncode == 0 and not any(name in done.stdout for name in ("libcuda", "libnccl", "libcublas", "libtorch")), done.stdout
