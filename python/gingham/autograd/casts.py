"""Forms of an operand: a parameter's own block and a gradient in its form; dtypes of an autocast region."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor


def local_of(parameter: Any) -> Any:
    """A DTensor's own block, read anew each time: load_state_dict and .to() replace it; other tensors and None as they are."""
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def like(local: torch.Tensor | None, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient in the form of its parameter."""
    if local is None or not isinstance(parameter, DTensor):
        return local
    # without __init__, which does nothing but costs as much as the rest
    return DTensor.__new__(DTensor, local, parameter._spec, requires_grad=False)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of the torch.autocast region of x's device that this call is in, or None outside of one."""
    kind = "cpu" if x.is_cpu else x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def cast_for_autocast(x: torch.Tensor) -> torch.Tensor:
    """What torch.autocast does to an operand of a product: in a region its dtype, unless x is float64 or of integers."""
    dtype = autocast_dtype(x)
    return x if dtype in (None, x.dtype) or x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)


def casts_to(block: torch.Tensor, dtype: torch.dtype | None) -> bool:
    """Whether a parameter's block is cast in an autocast region of `dtype`; None: outside of one."""
    return dtype is not None and block.dtype not in (dtype, torch.float64)


def block_in(mesh: Any, block: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    """A parameter's block in the dtype of an autocast region; in the shared heap, where peers read it in place."""
    return mesh.empty(block.shape, dtype).copy_(block) if block is not None and casts_to(block, dtype) else block


def as_parameter(gradient: torch.Tensor | None, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """In its parameter's dtype, which autocast may have left."""
    return gradient if gradient is None or parameter is None or gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)
