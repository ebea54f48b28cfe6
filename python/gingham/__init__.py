"""gingham: tensor-parallel matrix products on 1D, 2D, 2.5D and 3D grids of processors, for PyTorch."""

import sys as _sys

import torch as _torch

if not _sys.platform.startswith("linux"):
    raise ImportError(f"gingham runs on Linux only (it shares memory by memfd and watches peers by pidfd); this is {_sys.platform}")
if not hasattr(_torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"gingham needs torch 2.10 or newer (DLPack's C exchange API); found torch {_torch.__version__}")

from . import integrations, nn  # noqa: E402
from .autograd.gradients import no_sync  # noqa: E402
from .autograd.matmul import matmul  # noqa: E402
from .checkpoint import CheckpointError, export_safetensors, import_safetensors, load, save  # noqa: E402
from .convert import compare as compare  # noqa: E402
from .convert import parallelize, register_forward_method  # noqa: E402
from .convert.compare import check, check_replicas  # noqa: E402
from .errors import LayoutError, MeshError, PeerDied, PeerOutOfMemory, PeerStalled, ShapeError  # noqa: E402
from .integrations import optimizers as optimizers  # noqa: E402
from .launch.init import destroy, init  # noqa: E402
from .launch.spawn import spawn  # noqa: E402
from .mesh import Mesh  # noqa: E402
from .mesh import dtensors as dtensors  # noqa: E402
from .mesh import operations as operations  # noqa: E402
from .mesh import parts as _parts  # noqa: E402
from .mesh import writes as writes  # noqa: E402
from .native import version  # noqa: E402
from .nn import GradScaler, accuracy, clip_grad_norm_, cross_entropy  # noqa: E402
from .pipeline import pipeline  # noqa: E402
from .plan import Machine, Workload  # noqa: E402
from .plan import choose as planner  # noqa: E402, F401
from .plan import workload as workload  # noqa: E402

integrations.install()
_parts.install()
__version__ = version()
__all__ = [
    "CheckpointError",
    "GradScaler",
    "LayoutError",
    "Machine",
    "Mesh",
    "MeshError",
    "PeerDied",
    "PeerOutOfMemory",
    "PeerStalled",
    "ShapeError",
    "Workload",
    "accuracy",
    "check",
    "check_replicas",
    "clip_grad_norm_",
    "cross_entropy",
    "destroy",
    "export_safetensors",
    "import_safetensors",
    "init",
    "integrations",
    "load",
    "matmul",
    "nn",
    "no_sync",
    "parallelize",
    "pipeline",
    "register_forward_method",
    "save",
    "spawn",
]
