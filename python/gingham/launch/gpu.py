"""A rank's GPU, and where NCCL lies."""

from __future__ import annotations

import importlib.util
import os
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
    if job.on_host:  # a runtime that stands in for a device
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MeshError(
            f"rank {job.rank} was given GPU {job.gpu}, but this torch ({torch.__version__}) sees none: install a build of torch for CUDA"
        )
    torch.cuda.set_device(job.gpu)
    return torch.device("cuda", job.gpu)


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
