"""A rank's GPU, and where NCCL lies."""

from __future__ import annotations

import importlib.util
import os
import threading
from pathlib import Path

import torch

from .. import native
from ..errors import MeshError


def use_gpu(job: native.Job) -> torch.device:
    """Gives the rank GPU number LOCAL_RANK (of fewer GPUs, where the NCCL found lets ranks share one, counted anew from the first);
    NCCL is torch's where torch has loaded it, else the wheel's."""
    ordinal = int(os.environ.get("LOCAL_RANK", job.rank))
    find_nccl()
    job.use_gpu(ordinal, torch.backends.cuda.matmul.allow_tf32)
    backward_here()
    if job.on_host:  # a runtime that stands in for a device
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MeshError(
            f"rank {job.rank} was given GPU {job.gpu}, but this torch ({torch.__version__}) sees none: install a build of torch for CUDA"
        )
    torch.cuda.set_device(job.gpu)
    return torch.device("cuda", job.gpu)


_multithreaded: dict[int, bool] = {}  # as it was before init, by the thread that called it


def backward_here() -> None:
    """Backward passes that this thread begins run in it. torch hands them to a thread a device, which pays where a process has several; a
    rank has one, and the Python of its layers takes twice as long there (docs/decisions.md)."""
    _multithreaded.setdefault(threading.get_ident(), torch.autograd.set_multithreading_enabled(False).prev)


def backward_as_before() -> None:
    """What `backward_here` found, where this thread called it."""
    before = _multithreaded.pop(threading.get_ident(), None)
    if before is not None:
        torch.autograd.set_multithreading_enabled(before)


def ranks_share_gpus() -> bool:
    """Whether what was found in NCCL's place lets several ranks use one GPU, which NCCL itself, torch's too, refuses."""
    find_nccl()
    return bool(native.device_report()["same_gpu"])


def find_nccl() -> None:
    """Tells the C++ core where the nvidia-nccl wheel keeps its library, for processes whose torch has not loaded one."""
    try:
        wheel = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        native.set_nccl_path(str(Path(folder) / "lib" / "libnccl.so.2"))
