"""Dropout whose mask depends on the element's global index, never on the grid."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import torch

from ..autograd.dropout import dropout, dropout_again, dropout_place, masks, numbers_of, row_runs
from ..checks import cuts_of_block, layer_forward
from ..errors import LayoutError
from ..graph_ops import define
from ..mesh import Mesh, current, has_mesh
from ..mesh.layout import Cuts

KEPT_CALLS = 4096  # calls whose number a recomputation can still find

_numbers = iter(range(1 << 62))
_handles = iter(range(1 << 62))


def _restarting_numbers(seed: Callable[..., Any]) -> Callable[..., Any]:
    """torch tells nobody that it was seeded, so the function that seeds it also restarts the numbering of modules."""

    @functools.wraps(seed)
    def seed_and_restart(*args: Any, **kwargs: Any) -> Any:
        global _numbers
        _numbers = iter(range(1 << 62))
        return seed(*args, **kwargs)

    return seed_and_restart


torch.manual_seed = torch.random.manual_seed = _restarting_numbers(torch.random.manual_seed)  # type: ignore[assignment]


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout with masks by Philox4x32-10, keyed by (seed, name, call number, global element index): the same
    bits on every grid and, without gingham.init, in one process.

    seed: torch.initial_seed(), rank 0's where the ranks have several. name: by default the number of this module among
    those constructed since torch.manual_seed. A forward pass that activation checkpointing repeats reuses its call number (found by torch's
    random state, which checkpointing restores). layout: of the input; dims: its dims of rows and features.
    order="zigzag": the rows are a sequence that mesh.scatter(.., order="zigzag") cut; on a mesh that has done so, a cut sequence that is in
    order needs order="plain". Bytes: none but a control message of 16 bytes a rank that tells the rows' offset, since ranks may hold uneven
    numbers of rows. Raises LayoutError where the order is left out and not known.
    """

    _region: Any = None  # as Layer._region

    def __init__(
        self,
        p: float = 0.5,
        name: str | None = None,
        mesh: Mesh | None = None,
        layout: str = "outer",
        dims: tuple[int, int] = (0, -1),
        *,
        inplace: bool = False,
        order: str | None = None,
    ) -> None:
        super().__init__(p, inplace)
        self.layout, self.dims = layout, dims
        self.mesh = current(mesh) if mesh is not None or has_mesh() else None
        if order not in (None, "zigzag", "plain"):
            raise ValueError(f"Dropout: order={order!r}, expected None, 'zigzag' or 'plain'")
        self.order = order
        self.name = name if name is not None else f"dropout{next(_numbers)}"
        self.calls = 0
        self._call_of_state: OrderedDict[int, int] = OrderedDict()
        self._find_by_handle()

    def _find_by_handle(self) -> None:
        self.handle = str(next(_handles))
        masks[self.handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._find_by_handle()  # a copy draws its own masks

    def ends(self, x: torch.Tensor) -> tuple[Cuts, Cuts] | None:
        """Of its first call, while it is checked."""
        if self.mesh is None or self.dims not in ((0, -1), (1, -1)):
            return None
        cuts = cuts_of_block(self.mesh.layout(self.layout), x.dim(), self.dims[0])
        return cuts, cuts

    @layer_forward
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if self.order is None and self.mesh is not None and self.mesh.zigzag:
            self._refuse_unknown_order(x)
        y = x * 0 if self.p == 1 else self._dropped(x)
        return x.copy_(y) if self.inplace else y

    def _refuse_unknown_order(self, x: torch.Tensor) -> None:
        """Where the places of a sequence stand says which elements are dropped."""
        assert self.mesh is not None
        layout = self.mesh.layout(self.layout)
        if layout.rows and x.dim() == 3 and (layout.time or self.dims[0] == 1):
            raise LayoutError(
                f"Dropout {self.name!r} on rank {self.mesh.rank}: this mesh has cut a sequence with order='zigzag', nothing says how the"
                f" one of {tuple(x.shape)} lies; give Dropout (or MLP) order='zigzag', or 'plain' for one in order"
            )

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.gingham.dropout(x.contiguous(), self.p, self.handle)[0]
        return dropout(x, self.p, self.key(), self.mesh, self.layout, self.dims, self.order == "zigzag")

    def key(self) -> tuple[int, int, int]:
        """(seed, name, call number) of one call."""
        name = int.from_bytes(blake2b(self.name.encode(), digest_size=8).digest(), "little") >> 1
        return torch.initial_seed() % (1 << 63), name, self._call_number()

    def _call_number(self) -> int:
        """A fresh number, or in a recomputation (the only forward inside a backward) that of the first time."""
        state = int(torch.randint(1 << 62, (), device="cpu"))
        if torch._C._current_graph_task_id() != -1:
            return self._call_of_state.get(state, self.calls - 1)
        number = self.calls
        self.calls += 1
        self._call_of_state[state] = number
        if len(self._call_of_state) > KEPT_CALLS:
            self._call_of_state.popitem(last=False)
        return number

    def extra_repr(self) -> str:
        return f"p={self.p}, name={self.name!r}" + (f", order={self.order!r}" if self.order else "")


def _draw(x: torch.Tensor, p: float, handle: str) -> tuple[torch.Tensor, torch.Tensor]:
    """In a compiled graph: the result, and the numbers that make the same mask for the gradient."""
    module = masks[handle]
    key, shape, start = dropout_place(x, module.mesh, module.layout, module.dims, p, module.key())
    row, runs = row_runs(x, module.mesh, module.layout, module.dims, shape, start, module.order == "zigzag")
    numbers = numbers_of(key, row, runs, shape, start)
    return dropout_again(x, p, numbers, module.mesh), numbers


def _draw_again(gradient: torch.Tensor, numbers: torch.Tensor, p: float, handle: str) -> torch.Tensor:
    return dropout_again(gradient, p, numbers, masks[handle].mesh)


def _save_numbers(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, ctx.p, ctx.handle = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _gradient(ctx: Any, gradient: torch.Tensor, _: Any) -> Any:
    return torch.ops.gingham.dropout_again(gradient.contiguous(), ctx.saved_tensors[0], ctx.p, ctx.handle), None, None


define(
    "dropout",
    "(Tensor x, float p, str handle) -> (Tensor, Tensor)",
    _draw,
    lambda x, p, handle: (torch.empty_like(x), torch.empty(6 + 2 * x.dim(), dtype=torch.int64, device="cpu")),
)
define(
    "dropout_again",
    "(Tensor gradient, Tensor numbers, float p, str handle) -> Tensor",
    _draw_again,
    lambda gradient, numbers, p, handle: torch.empty_like(gradient),
)
torch.library.register_autograd("gingham::dropout", _gradient, setup_context=_save_numbers)
