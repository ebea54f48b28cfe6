"""matmul: C = A B on blocks that every axis of the mesh cuts, differentiable twice.

Each of the three products' gradients is made of the other two, on the same operand layouts (docs/theory.md section 1).
"""

from __future__ import annotations

from typing import Any

import torch

from .. import graph_ops
from ..errors import ShapeError
from ..mesh import Mesh, check_local, current
from .casts import cast_for_autocast
from .linear import make_step
from .second_order import Product, product


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    mesh: Mesh | None = None,
    shape: tuple[int, int, int] | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """C[M,N] = A[M,K] B[K,N] on the blocks of mesh.scatter(operand="a"), "b"; returns this rank's block "c".

    Differentiable twice. shape=(M, K, N) is needed where K or N does not divide by its axes, else ShapeError. out_dtype:
    as torch.mm's, C's dtype: that of a and b, or float32 where those have 16 bits (their sums are made in float32 either
    way); else ShapeError. Bytes: the step of docs/theory.md section 1 with no operand replicated:
    [MK(pn-1) + KN(pm-1) + MN(pk-1)] / P words forward, partial sums of 16-bit operands in float32. torch.autocast casts a
    and b, as it does torch.matmul's.
    """
    mesh = current(mesh)
    checks = mesh.checks
    if checks is not None:
        marked = any(hasattr(each, "checks") for each in (a, b))
        over = marked and checks.again(b, a)
        a, b = (checks.take(each, mesh.cuts(name, each.dim()), f"matmul's {name}") for each, name in ((a, "a"), (b, "b")))
        if marked and not over:
            return checks.give(_matmul(a, b, mesh, shape, out_dtype), mesh.cuts("c", 2))
    elif type(a) is not torch.Tensor or type(b) is not torch.Tensor:  # blocks of another mesh's checked step
        a, b = (each.checks.take(each, None, "matmul") if hasattr(each, "checks") else each for each in (a, b))
    return _matmul(a, b, mesh, shape, out_dtype)


def _matmul(
    a: torch.Tensor, b: torch.Tensor, mesh: Mesh, shape: tuple[int, int, int] | None, out_dtype: torch.dtype | None
) -> torch.Tensor:
    check_local(a, "matmul's a", mesh)
    check_local(b, "matmul's b", mesh)
    if a.dim() != 2 or b.dim() != 2:
        name, tensor = ("a", a) if a.dim() != 2 else ("b", b)
        raise ShapeError(f"matmul: {name} has shape {tuple(tensor.shape)}, expected a matrix")
    a, b = cast_for_autocast(a), cast_for_autocast(b)
    if out_dtype is not None and out_dtype != a.dtype and not (out_dtype == torch.float32 and a.dtype.itemsize == 2):
        raise ShapeError(f"matmul: got out_dtype={out_dtype}, expected {a.dtype}, that of a, or float32 for operands of 16 bits")
    wide = None if out_dtype in (None, a.dtype) else out_dtype
    if torch.compiler.is_compiling():
        sizes = ["", ""] if shape is None else [str(shape[1]), str(shape[2])]
        name = "" if wide is None else str(wide).removeprefix("torch.")
        return graph_ops.traced("matmul", [mesh.handle, *sizes, name], [a, b])[0]
    try:
        return product(a, [b], _step(a, b, mesh, shape, wide), wide)[0]
    except ShapeError as error:
        if shape is not None:
            raise
        raise ShapeError(f"{error}; where K or N does not divide by the mesh's axes pass shape=(M, K, N)") from None


def _sizes(a: torch.Tensor, b: torch.Tensor, mesh: Mesh, shape: tuple[int, int, int] | None) -> tuple[int, int]:
    """K and N. Wrong blocks are left to the step to refuse: it tells the other ranks, which are about to wait for this one."""
    _, pn, pk = mesh.grid
    return shape[1:] if shape else (a.shape[1] * pk * pn, b.shape[1] * pn)


def _step(a: torch.Tensor, b: torch.Tensor, mesh: Mesh, shape: tuple[int, int, int] | None, wide: torch.dtype | None) -> Any:
    k, n = _sizes(a, b, mesh, shape)
    key = ("matmul", k, n, wide)
    step = mesh.steps.get(key)
    if step is None:
        step = mesh.steps[key] = make_step(mesh, "matmul" if wide is None else "matmul to float32", k, [n], False, None)
    return step


def _words(words: list[str]) -> tuple[Mesh, tuple[int, int, int] | None, torch.dtype | None]:
    handle, k, n, wide = words
    return graph_ops.find(handle), (0, int(k), int(n)) if k else None, getattr(torch, wide) if wide else None


def _arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    (mesh, shape, wide), (a, b) = _words(words), tensors
    return [_step(a, b, mesh, shape, wide), 1, wide, a, b]


def _results(words: list[str], tensors: list[torch.Tensor]) -> list[graph_ops.Meta]:
    (mesh, shape, wide), (a, b) = _words(words), tensors
    _, n = _sizes(a, b, mesh, shape)
    return [((a.shape[0], mesh.interval(n, mesh.cuts("c", 2)[1])[1]), wide or a.dtype)]


graph_ops.KNOWN["matmul"] = graph_ops.Traced(Product, _arguments, _results)
