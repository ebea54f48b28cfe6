"""Models on the meta device whose stages get their values: gingham.pipeline makes what this rank keeps, one tensor at a time.

Layers of gingham and models of gingham.parallelize know by themselves what their parameters would hold (mesh/promised.py). Other modules of
torch do not: a function that builds the model is called under a `Tape`, which writes down every operation on a tensor of the meta device
and runs those that draw numbers, so that torch's generator moves as in one process. A tensor that is kept is made by running again
the operations that it follows from. Example: torch.nn.Linear's weight is aten.empty, then aten.uniform_ with the generator as it was then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import MeshError
from ..mesh import promised

_truncated: Any = torch.nn.init._no_grad_trunc_normal_


@dataclass(frozen=True)
class View:
    """A tensor of the meta device; storage: held, so that its address is not another's later."""

    storage: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def key(self) -> int:
        return int(self.storage._cdata)

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """The same view of a real tensor that has all of the storage."""
        return value.detach().as_strided(self.shape, self.stride, self.offset)


@dataclass
class Operation:
    """One call; state: the generator's before it, where it draws; reads, makes: storages that it looks at and changes, or makes."""

    func: Any
    args: Any
    kwargs: Any
    state: torch.Tensor | None
    reads: set[int]
    makes: set[int]
    out: Any


class Tape(TorchDispatchMode):
    """Operations on tensors of the meta device, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or any(issubclass(each, DTensor) for each in types):
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out, torch.Tag.nondeterministic_seeded in func.tags)
        return out

    def truncated(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """torch's own does nothing to a tensor of the meta device, and draws until all numbers are inside."""
        if not tensor.is_meta:
            return _truncated(tensor, *args, **kwargs)  # type: ignore[no-any-return]
        self._note(_truncated, (tensor, *args), kwargs, tensor, True)
        return tensor

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any, draws: bool) -> None:
        args_seen, kwargs_seen, made_here = (pytree.tree_map(_view, each) for each in (args, kwargs, out))
        given, made = _keys((args_seen, kwargs_seen)), _keys(made_here)
        if not given and not made:
            return
        state = torch.get_rng_state() if draws else None
        if draws:
            self.paused = True
            try:
                func(*pytree.tree_map(_empty, args), **pytree.tree_map(_empty, kwargs))
            finally:
                self.paused = False
        self.operations.append(Operation(func, args_seen, kwargs_seen, state, given, made, made_here))

    def make(self, wanted: torch.Tensor) -> torch.Tensor:
        """The values of a tensor of the meta device. Raises KeyError where nothing has made it."""
        view: Any = _view(wanted)
        needed, steps = {view.key}, list[Operation]()
        for each in reversed(self.operations):
            if (each.makes | each.reads if _mutates(each) else each.makes) & needed:
                steps.append(each)
                needed |= each.reads
        found: dict[int, torch.Tensor] = {}  # by storage: one tensor that has all of it

        def real(x: Any) -> Any:
            if isinstance(x, torch.device):
                return torch.device("cpu")
            return x.of(found[x.key]) if isinstance(x, View) else x

        with torch.no_grad():
            for each in reversed(steps):
                if each.state is not None:
                    torch.set_rng_state(each.state)
                out = each.func(*pytree.tree_map(real, each.args), **pytree.tree_map(real, each.kwargs))
                for meta, value in zip(pytree.tree_leaves(each.out), pytree.tree_leaves(out), strict=True):
                    if isinstance(meta, View):
                        found.setdefault(meta.key, value)
            return view.of(found[view.key]).clone()


def _mutates(each: Operation) -> bool:
    return each.func is _truncated or each.func._schema.is_mutable


def _view(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and not isinstance(x, DTensor) and x.is_meta:
        return View(x.untyped_storage(), tuple(x.shape), x.stride(), int(x.storage_offset()), x.dtype)
    return x


def _keys(tree: Any) -> set[int]:
    return {each.key for each in pytree.tree_leaves(tree) if isinstance(each, View)}


def _empty(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu") if isinstance(x, torch.Tensor) and x.is_meta else x


def built(make: Callable[[], Any]) -> tuple[Any, Tape]:
    """The model that a function builds, on the meta device, and what would have been done to its tensors. Raises MeshError where it is no
    function, or gives no model."""
    tape, model = Tape(), None
    if callable(make):
        with torch.device("meta"), patch("torch.nn.init._no_grad_trunc_normal_", tape.truncated), tape:
            model = make()
    if not isinstance(model, torch.nn.Module):
        got = f"a function that gives a {type(model).__name__}" if callable(make) else f"a {type(make).__name__}"
        raise MeshError(f"gingham.pipeline: got {got}, expected a torch.nn.Module, or a function of no arguments that builds one")
    return model, tape


@torch.no_grad()
def fill(model: torch.nn.Module, tape: Tape | None, device: torch.device) -> None:
    """Gives all of a model that stands on the meta device its values, drawn on the CPU and put on `device`. Raises MeshError
    where nothing says what they are."""
    now, made = torch.get_rng_state(), dict[int, torch.Tensor]()
    for parameter in model.parameters():
        if promised.waits(parameter):
            promised.keep(parameter)
    try:
        for path, module in model.named_modules():
            for held in (module._parameters, module._buffers):
                for name, each in held.items():
                    if each is not None and each.is_meta and id(each) not in made:
                        made[id(each)] = each  # alive, so that no id comes twice
                        _fill_plain(path, module, name, each, tape, device)
    finally:
        torch.set_rng_state(now)


def _fill_plain(path: str, module: torch.nn.Module, name: str, tensor: torch.Tensor, tape: Tape | None, device: torch.device) -> None:
    where = f"{path}.{name} of {type(module).__name__}"
    if tape is None:
        raise MeshError(
            f"gingham.pipeline: {where} was built under torch.device('meta'), which keeps no account of its values; give gingham.pipeline"
            " the function that builds the model (gingham.pipeline(build, mesh)), or use the layer of gingham.nn"
        )
    try:
        value = tape.make(tensor).to(device)
    except KeyError:
        raise MeshError(
            f"gingham.pipeline: {where} follows from tensors that were made before the model was built; make them inside the function that"
            " builds it, or outside of torch.device('meta') with device='cpu'"
        ) from None
    if isinstance(tensor, torch.nn.Parameter):
        promised.put(tensor, torch.nn.Parameter(value, tensor.requires_grad))
    else:
        module._buffers[name] = value
