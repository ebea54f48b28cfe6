"""matmul: C = A B on blocks that every axis of the mesh cuts, differentiable twice.

Each of the three products' gradients is made of the other two, on the same operand layouts (docs/theory.md section 1).
"""

from __future__ import annotations

import torch

from .errors import ShapeError
from .functional import make_step
from .mesh import Mesh, check_local, current
from .redistribute import cast_for_autocast
from .second_order import product


def matmul(a: torch.Tensor, b: torch.Tensor, mesh: Mesh | None = None, shape: tuple[int, int, int] | None = None) -> torch.Tensor:
    """C[M,N] = A[M,K] B[K,N] on the blocks of mesh.scatter(operand="a"), "b"; returns this rank's block "c".

    Differentiable twice. shape=(M, K, N) is needed where K or N does not divide by its axes, else ShapeError. Bytes:
    the step of docs/theory.md section 1 with no operand replicated: [MK(pn-1) + KN(pm-1) + MN(pk-1)] / P words forward.
    torch.autocast casts a and b, as it does torch.matmul's.
    """
    mesh = current(mesh)
    checks = mesh.checks
    if checks is not None:
        marked = any(hasattr(each, "checks") for each in (a, b))
        a, b = (checks.take(each, mesh.cuts(name, each.dim()), f"matmul's {name}") for each, name in ((a, "a"), (b, "b")))
        if marked:
            return checks.give(_matmul(a, b, mesh, shape), mesh.cuts("c", 2))
    return _matmul(a, b, mesh, shape)


def _matmul(a: torch.Tensor, b: torch.Tensor, mesh: Mesh, shape: tuple[int, int, int] | None) -> torch.Tensor:
    for tensor, name in ((a, "a"), (b, "b")):
        check_local(tensor, f"matmul's {name}", mesh)
        if tensor.dim() != 2:
            raise ShapeError(f"matmul: {name} has shape {tuple(tensor.shape)}, expected a matrix")
    a, b = cast_for_autocast(a), cast_for_autocast(b)
    _, pn, pk = mesh.grid
    # wrong blocks are left to the step to refuse: it tells the other ranks, which are about to wait for this one
    _, k, n = shape or (0, a.shape[1] * pk * pn, b.shape[1] * pn)
    key = ("matmul", k, n)
    if key not in mesh.steps:
        mesh.steps[key] = make_step(mesh, "matmul", k, [n], False, None)
    try:
        return product(a, [b], mesh.steps[key])[0]
    except ShapeError as error:
        if shape is not None:
            raise
        raise ShapeError(f"{error}; where K or N does not divide by the mesh's axes pass shape=(M, K, N)") from None
