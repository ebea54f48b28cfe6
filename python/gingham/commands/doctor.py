"""`python -m gingham doctor`: what this installation is made of, what it found here, and with --test whether it multiplies rightly.

python -m gingham doctor --test                                             on 4 ranks of this host
torchrun --nnodes 2 --nproc-per-node 2 .. -m gingham doctor --test          on all ranks of all hosts that torchrun starts
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

RANKS, LIMIT = 4, 20.0  # of the test: ranks where torchrun starts none, seconds until a silent rank is named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--test", action="store_true", help=f"multiply on {RANKS} ranks, or on all that torchrun started, and compare")


def run(options: argparse.Namespace) -> int:
    rank = int(os.environ.get("RANK", "0"))
    good = rank != 0 or report()
    if options.test and good:
        good = test()
    return 0 if good else 1


def report() -> bool:
    """Prints a line each; whether gingham can be used."""
    import torch

    rows = [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("DLPack C exchange API", "found" if hasattr(torch.Tensor, "__dlpack_c_exchange_api__") else "missing: torch >= 2.10 is needed"),
        ("cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
        ("microbench", "built" if (Path(__file__).parent.parent / "bin" / "microbench").exists() else "not built"),
    ]
    good = True
    try:
        from .. import native

        rows += [("gingham", native.version()), ("BLAS", native.blas()), *cuda_rows(), *host_rows()]
    except Exception as error:
        good = False
        rows.append(("gingham", f"cannot be used: {type(error).__name__}: {error}"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return good


def cuda_rows() -> list[tuple[str, str]]:
    """What was built for GPUs, what this machine has, and how far it was ever verified."""
    from .. import native
    from ..launch.gpu import find_nccl

    find_nccl()
    report = native.device_report()
    if not report["built"]:
        return [("CUDA", f"not built: {report['missing']}")]
    driver = f"driver for CUDA {_cuda(report['driver'])}" if report["driver"] else "no driver"
    found = "; ".join(report["devices"]) or f"none: {report['missing']}"
    nccl = f"{_nccl(report['nccl_version'])} from {report['nccl_from']}" if report["nccl"] else report["nccl_from"]
    return [
        ("CUDA", f"built, runtime {_cuda(report['runtime'])} inside; {driver}"),
        ("GPUs", found),
        ("NCCL", nccl),
        (
            "Hopper gemm",
            native.hopper_status()
            if report["devices"]
            else "compiled only: off until it has been compared with the sm_80 kernel on a device",
        ),
        ("verified", "on one H200, and by models of the device and of NCCL; never on two GPUs (docs/cuda.md): bench/gpu.sh does"),
    ]


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _nccl(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def host_rows() -> list[tuple[str, str]]:
    """This host as jobs of several see it: its name, the engine that its ranks would take, and the way to the others."""
    from ..launch.engines import engine_report
    from ..launch.hosts import VARIABLE, interface_to, whereabouts

    engine = engine_report()
    here = whereabouts()
    master = os.environ.get("MASTER_ADDR", "")
    interface, address = interface_to(master or "192.0.2.1")  # an address of nobody: the way to it is the default route
    way = f"{interface or 'no interface'}, {address}" if address else "none: this machine has no network but itself"
    return [
        ("host", f"{here['name']}{f' ({VARIABLE})' if os.environ.get(VARIABLE) else ''}"),
        ("between hosts", f"{engine['engine']}: {engine['why']}" if engine["engine"] else engine["error"]),
        (f"way to {master}" if master else "default route", way),
    ]


def test() -> bool:
    """A product of whole numbers, exact in float32, on all ranks. Prints what came out; whether it is right."""
    import gingham

    started = int(os.environ.get("WORLD_SIZE", "1"))
    answers = [_multiply(int(os.environ["RANK"]), started)] if started > 1 else gingham.spawn(_multiply, RANKS, RANKS)
    right = all(answer["right"] for answer in answers)
    if int(os.environ.get("RANK", "0")) == 0:
        for line in answers[0]["said"]:
            print(f"  {line}")
        print("right" if right else "WRONG: the product differs from one process's")
    sys.stdout.flush()
    return right


def _multiply(rank: int, ranks: int) -> dict[str, Any]:
    import torch

    import gingham
    from gingham.launch import world

    begin = time.monotonic()
    rows = max(each for each in range(1, int(ranks**0.5) + 1) if ranks % each == 0)
    mesh = gingham.init(grid=(rows, ranks // rows, 1), timeout=LIMIT)
    ready = time.monotonic()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (64 * ranks, 64 * ranks), generator=generator, device="cpu").float().to(mesh.device) for _ in range(2))
    c = mesh.gather(gingham.matmul(mesh.scatter(a, operand="a"), mesh.scatter(b, operand="b")), operand="c")
    spent = time.monotonic() - ready
    joined = world.current()
    assert joined is not None
    counts = mesh.traffic()
    crossed = sum(count.get("bytes_crossed", 0) for count in counts.values())
    received = sum(count["bytes_received"] for count in counts.values())
    said = [
        f"{ranks} ranks as {rows} x {ranks // rows} on {', '.join(map(str, joined.hosts))}: started in {ready - begin:.1f} s",
        f"C = A B, {len(a)} x {len(a)}: {1e3 * spent:.0f} ms; rank {rank} received {received} bytes, {crossed} of them from other hosts",
    ]
    right = bool(torch.equal(c, a @ b))
    gingham.destroy()
    return {"right": right, "said": said}
