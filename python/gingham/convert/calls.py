"""Whether code runs inside a call of a converted model, where it sees this rank's rows, or outside of one, where it sees whole tensors.

By that goes what an attribute gives that holds a parameter (loose.py), and over which ranks a gradient is summed:

    weight.full_tensor()    inside a call: used on this rank's rows, so that its gradient is summed over the ranks that cut them
                            outside: every rank uses it alike. With data, of the parameters that the model's code reads by name:
                            on this data rank's own batch, so that the gradient is the mean of the data ranks' as that of outputs is

torch.utils.checkpoint runs a function again in the backward pass, after the call: it finds what it found the first time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch.distributed.tensor import DTensor
from torch.utils import checkpoint

from ..autograd.second_order import shared, summed
from ..errors import MeshError
from ..function import Function
from ..mesh import Mesh
from ..mesh.layout import Names
from ..mesh.mesh import mesh_of
from ..mesh.operations import read_by_name, told
from ..nn.layer import Layer


class Call(NamedTuple):
    """names: the axes whose ranks use a whole parameter each for its own part; None where activations are cut along features too.
    models: those whose calls are under way."""

    mesh: Mesh
    names: Names | None
    models: tuple[Inside | None, ...]


class _Here(threading.local):
    def __init__(self) -> None:
        self.call: Call | None = None
        self.again = False  # whether `call` is that of a function which runs again


class Inside:
    """How many bordered calls of one model are under way; its base and the model share one. above: those of a head around its base;
    samples: of the last call; everywhere: whether all code counts as inside, for a pipeline."""

    handle = ""  # of its mesh

    def __init__(self) -> None:
        self.everywhere = False
        self.depth = self.above = 0
        self.samples: int | None = None

    @contextmanager
    def around_base(self, mesh: Mesh) -> Iterator[None]:
        """Around a call of a head, in which every rank has the whole batch."""
        self.above += 1
        try:
            with under_way(mesh, (), None):
                yield
        finally:
            self.above -= 1

    def is_here(self) -> bool:
        """Whether code that asks runs in a call. A function that other code than torch's checkpoint runs again in a backward pass is
        taken for a part of one."""
        if self.everywhere or self.depth or self.above or torch.compiler.is_compiling():  # depth: also where a graph has a break
            return bool(self.everywhere or self.depth or self.above)
        return _here.call is not None or _runs_again() and not _here.again

    def is_passed(self) -> bool:
        """Whether the border is behind the code that asks: in a call, also in what a checkpoint in it runs again."""
        if self.depth or torch.compiler.is_compiling():
            return bool(self.depth)
        return _here.again and _here.call is not None and any(each is self for each in _here.call.models)


class Within:
    """Held by layers of a converted model with io="full", which are called in the model's calls: called alone each rank gives one the
    whole batch, and gradients would be summed over ranks that have the same rows."""

    def __init__(self, inside: Inside, mesh: Mesh) -> None:
        self.inside, self.mesh = inside, mesh

    def __call__(self, layer: Any) -> None:
        if not torch.is_grad_enabled() or self.inside.is_here():
            return
        raise layer.named(
            MeshError(
                f"rank {self.mesh.rank} got a call from outside of the converted model, where every rank has the whole batch, so that"
                " gradients would be counted once for each rank that cuts rows; expected a call of the model, or of a method of its class"
                " that runs this layer, or torch.no_grad(); with parallelize(.., io='local') tensors are this rank's rows everywhere"
            )
        )

    @staticmethod
    def hold(model: torch.nn.Module, border: Any) -> None:
        """Where whole tensors are more than a rank's rows."""
        if not border.full or all(border.mesh.sizes[name] == 1 for name in border.mesh.outer.rows):
            return
        within = Within(border.inside, border.mesh)
        for module in model.modules():
            if isinstance(module, Layer) and module is not model:
                vars(module)["_only_within"] = within


_here = _Here()
_known: WeakSet[Inside] = WeakSet()


def _runs_again() -> bool:
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()


@contextmanager
def under_way(mesh: Mesh, names: Names | None, inside: Inside | None) -> Iterator[None]:
    """Around a call of a converted model, `inside` its border where it has one."""
    if torch.compiler.is_compiling():
        yield
        return
    before = _here.call, _here.again
    _here.call, _here.again = Call(mesh, names, (*(before[0].models if before[0] is not None else ()), inside)), False
    try:
        yield
    finally:
        _here.call, _here.again = before


def note(inside: Inside, mesh: Mesh) -> None:
    """Keeps a border's `inside`, by which a part of a call that torch.compile left out is known."""
    inside.handle = mesh.handle
    _known.add(inside)


def summed_over(mesh: Mesh, body: str) -> Names | None:
    """The names of a Call in a body of that layout."""
    return mesh.outer.rows if body == "rows" or mesh.outer == mesh.layout("rows") else None


def counting(model: torch.nn.Module, mesh: Mesh, body: str) -> None:
    """Makes a model without a border say when its forward is under way."""
    cls: Any = type(model)
    names = summed_over(mesh, body)

    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with under_way(mesh, names, None):
            return cls.forward(self, *args, **kwargs)

    if "forward" not in vars(model):
        made = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
        model.__class__ = type(cls.__name__, (cls,), made)


def install() -> None:
    """For the first conversion."""
    if hasattr(DTensor.full_tensor, "_gingham"):
        return
    DTensor.full_tensor = _full_tensor(DTensor.full_tensor)  # type: ignore[method-assign]
    made: Any = checkpoint.CheckpointFunction.forward
    generator: Any = getattr(checkpoint, "_checkpoint_without_reentrant_generator", None)
    checkpoint.CheckpointFunction.forward = staticmethod(  # type: ignore[method-assign]
        wraps(made)(lambda ctx, function, *rest: made(ctx, _carried(function), *rest))
    )
    if generator is not None:
        carrying: Any = wraps(generator)(lambda function, *rest, **named: generator(_carried(function), *rest, **named))
        checkpoint._checkpoint_without_reentrant_generator = carrying


def _carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that finds, whenever it runs, the call that is under way now."""
    call, again = _here.call, _here.call is not None or _here.again or not _runs_again()

    def run(*args: Any, **kwargs: Any) -> Any:
        before = _here.call, _here.again
        _here.call, _here.again = call, again
        try:
            return function(*args, **kwargs)
        finally:
            _here.call, _here.again = before

    return run


def _full_tensor(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def full_tensor(self: DTensor, **kwargs: Any) -> Any:
        full = method(self, **kwargs)
        if kwargs or not full.requires_grad or not torch.is_grad_enabled():
            return full
        call, mesh = _here.call, mesh_of(self)
        if (
            torch.compiler.is_compiling()
            or call is None
            and any(each.depth for each in _known if mesh is not None and each.handle == mesh.handle)
        ):
            if mesh is None or not mesh.outer.rows:
                return full
            raise MeshError(
                f"full_tensor: rank {mesh.rank} got a DTensor {tuple(self.shape)} with a gradient in code of torch.compile, where"
                " nothing says whether it is used on this rank's rows or on whole tensors; leave torch.compile out there, or .detach() it"
                " first"
            )
        if call is None:
            return _of_own_batch(self, full)
        if mesh is not call.mesh:
            return full
        if call.names is None:
            raise MeshError(
                f"full_tensor: rank {mesh.rank} got {told(mesh, self)[0]} inside a model's call, where activations are cut along their"
                " features too; expected no whole parameter there, since no rank's part of its gradient is known: use it outside of the"
                " model, or .detach() it first"
            )
        return shared(full, mesh, call.names)

    full_tensor._gingham = True  # type: ignore[attr-defined]
    return full_tensor


def _of_own_batch(tensor: DTensor, full: torch.Tensor) -> torch.Tensor:
    inside = next((each for each in read_by_name(tensor) if each is not None), None)
    mesh = mesh_of(tensor)
    if inside is None or mesh is None or mesh.data.size == 1 or mesh.one_batch:
        return full
    return _MeanOverData.apply(full, mesh, 1 if inside.samples is None else inside.samples)


class _MeanOverData(Function):
    """x as it is, used on this data rank's own batch of `samples`. A control message over data of 8 bytes and the sum, backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Mesh, samples: int) -> torch.Tensor:
        ctx.mesh, ctx.samples = mesh, samples
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.mesh.say("parallelize: samples of all data ranks")
        total = sum(count for (count,) in ctx.mesh.joint(("data",)).sizes([ctx.samples]))
        return summed(grad * (ctx.samples / total), ctx.mesh, ("data",)), None, None
