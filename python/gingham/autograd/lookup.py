"""Rows of a table by their ids and the gradient of the table, by the core: the same sums in the same order in every run."""

from __future__ import annotations

import torch

from .. import native
from ..mesh import Mesh
from .indices import whole


def rows_of(mesh: Mesh, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[*ids.shape, width] of a table [count, width]; NaN where it has no such row."""
    return native.gather_rows(mesh.program, _plain(table), whole(ids))


def sums_of_rows(mesh: Mesh, rows: torch.Tensor, ids: torch.Tensor, first: int, count: int, skipped: int | None) -> torch.Tensor:
    """[count, width]: of each id first .. first + count - 1 but `skipped` the sum of its rows [*ids.shape, width], in float32 for 16 bits.
    On a GPU the ids are sorted before, as its kernel wants them, in an order that rows of one id keep."""
    ids, order = whole(ids).view(-1), None
    if mesh.job.has_gpu:
        ids, order = ids.sort(stable=True)
    return native.scatter_rows(mesh.program, _plain(rows), ids, order, first, count, -1 if skipped is None else skipped)


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x.resolve_neg().contiguous()
