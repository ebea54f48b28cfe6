"""The machine, its ceilings, and what gingham found: versions, copy bandwidth, torch.mm of every dtype."""

from __future__ import annotations

import subprocess

import torch
from rows import RATES, main, milliseconds, row

import gingham
from gingham import native


def versions() -> None:
    row("torch", torch.__version__)
    row("CUDA of torch", str(torch.version.cuda))
    row("NCCL of torch", str(torch.cuda.nccl.version()))
    of = torch.cuda.get_device_properties(0)
    row("device", f"{of.name}, sm_{of.major}{of.minor}, {of.multi_processor_count} multiprocessors, L2 {of.L2_cache_size >> 20} MiB")
    free, total = torch.cuda.mem_get_info()
    row("free memory", free / 2**30, unit="GiB", total=total / 2**30)
    row("legacy default stream", torch.cuda.default_stream().cuda_stream)
    print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout[:1800])


def rate_of_copy() -> float:
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda: y.copy_(x)) / 1e9


def rate_of_mm(n: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    return 2 * n**3 / milliseconds(lambda: torch.mm(a, b, out=c)) / 1e9


def ceilings() -> None:
    row("copy, read + written", rate_of_copy(), unit="TB/s")
    for dtype in RATES:
        n = 8192 if dtype.itemsize == 2 else 4096
        row(f"torch.mm {n} {RATES[dtype]}", rate_of_mm(n, dtype), unit="TFLOP/s")
    torch.backends.cuda.matmul.allow_tf32 = True
    row("torch.mm 4096 tf32", rate_of_mm(4096, torch.float32), unit="TFLOP/s")
    torch.backends.cuda.matmul.allow_tf32 = False


def start() -> None:
    mesh = gingham.init(device="cuda", mode="1d", size=1)
    row("mesh on", str(mesh.device))
    row("Hopper kernel", native.hopper_status())
    gingham.destroy()


if __name__ == "__main__":
    main({"versions": versions, "ceilings": ceilings, "start": start})
