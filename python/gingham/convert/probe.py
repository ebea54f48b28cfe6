"""Does a model's code mix samples? On a part of the batch a mean or a softmax over it, or x @ x.T, would be of this rank's part.

The first call of a model with code that nothing vouches for runs once more, without gradients, on this rank's rows all made equal to the
last one: what comes out for the last sample must be the same. Generators, buffers and dropout's numbers are put back, so that the
call itself sees what it would have seen. One row, and code that mixes samples in training only after the first call, are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .. import nn
from ..mesh import Mesh
from .wrappers import is_foreign

TOLERANCE = 1e-3  # relative: products of the same shapes agree to rounding


def is_needed(model: torch.nn.Module, mesh: Mesh, known: bool) -> bool:
    """Whether nothing vouches for some code in the model, on a mesh that cuts rows, and nothing listens to its calls.
    known: whether the code of transformers in it was compared."""
    strange = any(is_foreign(each) or not known and type(each).__module__.startswith("transformers.") for each in model.modules())
    return bool(mesh.outer.rows) and strange and not _is_heard(model)


def _is_heard(model: torch.nn.Module) -> bool:
    hooks = (hook for each in model.modules() for kind in (each._forward_hooks, each._forward_pre_hooks) for hook in kind.values())
    return any(not str(getattr(hook, "__module__", "")).startswith(("gingham.", "transformers.")) for hook in hooks)


def run(function: Callable[..., Any], model: torch.nn.Module, args: Any, kwargs: Any, rows: int) -> Any:
    """What the function gives for this rank's `rows` rows, all like the last one."""

    def alike(x: Any) -> Any:
        cut = isinstance(x, torch.Tensor) and x.dim() and len(x) == rows and rows > 1
        return x[-1:].expand_as(x).clone() if cut else x

    with torch.no_grad(), _restored(model):
        return function(model, *pytree.tree_map(alike, args), **pytree.tree_map(alike, kwargs))


@contextmanager
def _restored(model: torch.nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    calls = [(module, module.calls) for module in model.modules() if isinstance(module, nn.Dropout)]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, number in calls:
            module.calls = number


def check(what: str, mesh: Mesh, output: Any, probed: Any, rows: int) -> None:
    """Raises NotImplementedError on every rank where one's last sample came out in another way beside other samples."""
    flags = mesh.world.sizes([int(_differs(output, probed, rows))])
    odd = [rank for rank, (flag,) in enumerate(flags) if flag]
    if odd:
        raise NotImplementedError(
            f"{what}: its code mixes samples (a mean, softmax, sort or product over the batch): on rank {odd[0]} the result of a sample"
            f" depends on the {rows} samples beside it there, which are a part of the batch. Do that outside of the model, on its full"
            " outputs, or use a mesh that leaves rows whole"
        )


def _differs(output: Any, probed: Any, rows: int) -> bool:
    pairs = list(zip(pytree.tree_leaves(output), pytree.tree_leaves(probed), strict=False))
    for y, other in pairs:
        if not isinstance(y, torch.Tensor) or not isinstance(other, torch.Tensor) or y.shape != other.shape or not y.dim():
            continue
        if rows < 2 or len(y) % rows or not y.is_floating_point():
            continue
        last, also = (each.detach().double()[-(len(y) // rows) :] for each in (y, other))
        both = torch.isfinite(last) & torch.isfinite(also)
        if not torch.equal(torch.isfinite(last), torch.isfinite(also)):
            return True
        if float((last - also)[both].norm()) > TOLERANCE * max(float(last[both].norm()), 1e-6):
            return True
    return False
