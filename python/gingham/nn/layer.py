"""What the layers share: their mesh and number, the label that their calls carry, parameters drawn anew as torch.nn draws them.

A label says the layer's kind, all its options, its number among those made on the mesh and a digest of the full parameters
it was made with. It is in the key of each call, so that ranks whose layers differ in any of these are told before a byte
is used.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from operator import index
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..autograd.kept import kept
from ..autograd.linear import LinearPlan
from ..autograd.ranges import in_range
from ..autograd.relayout import reshard
from ..checks import layer_forward
from ..errors import MeshError, ShapeError
from ..function import untraceable
from ..graph_ops import own
from ..mesh import Mesh, current, cuts_of, promised
from ..mesh.layout import Cuts, block
from ..mesh.named import path_of
from ..mesh.writes import cut_as, fill


def drawing_device() -> str | None:
    """Of full parameters that are drawn: torch's default, but the CPU under torch.device("meta"), where nothing would be drawn."""
    return "cpu" if torch.get_default_device().type == "meta" else None


def size_of(layer: str, name: str, value: Any) -> int:
    """A size that a constructor is given. Raises TypeError for what is no integer, ShapeError for a negative one."""
    try:
        size = index(value)
    except TypeError:
        raise TypeError(f"{layer}: got {name}={value!r}, a {type(value).__name__}; expected an integer") from None
    if size < 0:
        raise ShapeError(f"{layer}: got {name}={size}, expected a size of 0 or more")
    return size


def own_plan(plan: LinearPlan, layer: torch.nn.Module) -> LinearPlan:
    """A plan, which copies of a layer share, for one of them: its owner may be gone, on some ranks earlier than on others."""
    return replace(plan, owners=[], handles=[]).owned_by(layer)


Raised = TypeVar("Raised", bound=BaseException)


def _ranged(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that torch.profiler sees by the layer's name."""
    return lambda self, *args, **kwargs: in_range(self, lambda: forward(self, *args, **kwargs))


class Layer(torch.nn.Module):
    """The base of every layer, before torch's own class of that kind where there is one."""

    mesh: Mesh
    plan: Any
    # of a model that was converted: within the layer sees cut features, and other code sees whole ones (convert/regions.py)
    _region: Any = None

    def begin(self, mesh: Mesh | None, device: Any = None) -> Mesh:
        """torch.nn.Module's part of a constructor; torch's own class would allocate whole parameters."""
        torch.nn.Module.__init__(self)
        if mesh is not None and not isinstance(mesh, Mesh):
            raise TypeError(f"{type(self).__name__}: got mesh={mesh!r}, expected a gingham.Mesh; a device goes into device=")
        self.mesh = current(mesh)
        if device is not None and torch.device(device).type not in (self.mesh.device.type, "meta"):
            raise MeshError(f"{type(self).__name__}: got device={device}, expected {self.mesh.device}, where the mesh lies")
        own(self)
        self.number = self.mesh.next_number()
        self._label = self._within = ""
        self._placed: dict[str, Any] = {}
        self._shapes: dict[str, torch.Size] = {}
        return self.mesh

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For a copy, whose calls are its own."""
        super().__setstate__(state)
        if "plan" in self.__dict__:
            self.plan = own_plan(self.plan, self)

    def holds(self, *parts: Layer) -> None:
        """Layers that are parts of this one, whose options are part of their labels too."""
        for part in parts:
            part._within = f" in {type(self).__name__} #{self.number}({self.extra_repr()})"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in cls.__dict__:
            forward = cls.__dict__["forward"]
            cls.forward = layer_forward(forward, _ranged(forward))  # type: ignore[method-assign]

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks each module for."""
        where = path_of(self)
        raise untraceable(f"{where} ({type(self).__name__})" if where else type(self).__name__, "torch.jit.script")

    def ends(self, x: torch.Tensor) -> tuple[Cuts, Cuts] | None:
        """The cuts of the input x and of the output; None: not checked."""
        return None

    def received(self, rows: int, inner: int = 1) -> int:
        """Bytes that all ranks together receive in a forward and backward pass of [rows, inner, features] (docs/theory.md section 4)."""
        return sum(part.received(rows, inner) for part in self.children() if isinstance(part, Layer))

    def label(self) -> str:
        """Made at the first call, when all parameters stand."""
        if not self._label:
            drawn = [getattr(each, "_drawn", None) for each in self.parameters()]
            # a parameter that was loaded or drawn again since says nothing any more
            digests = [value for value, version in filter(None, drawn) if version is not None]
            valid = all(each is None or each[1] == p._version for each, p in zip(drawn, self.parameters(), strict=True))
            made_of = f", made of {crc32(repr(digests).encode()):08x}" if digests and valid else ""
            self._label = f"{type(self).__name__} #{self.number}({self.extra_repr()}{made_of}){self._within}"
        return self._label

    def say(self) -> None:
        """Before a call that communicates: whose it is."""
        self.mesh.say(self.label())

    def named(self, error: Raised) -> Raised:
        """The error with the layer's name before it: its path in the model it is part of, found when it is needed. One that tells of an
        earlier call (mesh/findings.py) has its own name."""
        if hasattr(error, "late"):
            return error
        where = path_of(self)
        kind = f"{type(self).__name__}({', '.join(map(str, self.sizes()))})"
        text = f"{where} ({kind})" if where else kind
        message = str(error)
        return error if message.startswith(text) else type(error)(f"{text}: {message}").with_traceback(error.__traceback__)

    def sizes(self) -> tuple[int, ...]:
        """Global sizes, as the constructor takes them."""
        return ()

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Also for layer.weight = other: a full tensor is cut; another layer's parameter stays that one, and is cut for each call
        where it lies otherwise (`operand`). Raises ShapeError where the global shape is another; an optimizer that holds the full one
        instead of the layer's raises MeshError at its step."""
        old = self._parameters.get(name)
        if isinstance(old, DTensor) and param is not None:
            if param.shape != old.shape:
                found = f"{type(self).__name__}({', '.join(map(str, self.sizes()))}).{name} = a tensor {tuple(param.shape)}"
                raise ShapeError(
                    f"rank {self.mesh.rank} got {found}, expected the full shape {tuple(old.shape)}; make a layer of that size"
                )
            if not isinstance(param, DTensor):
                param = self._cut(name, old, param)
        super().register_parameter(name, param)
        if isinstance(param, DTensor):
            self._placed.setdefault(name, param.placements)
            self._shapes[name] = param.shape
            if promised.waits(param):
                promised.guard(self, param)

    def _cut(self, name: str, old: DTensor, full: torch.nn.Parameter) -> torch.nn.Parameter:
        """The same DTensor for every layer that is given the same Parameter."""
        known = getattr(full, "_on_mesh", None)
        if known is None or known.device_mesh != old.device_mesh:
            known = torch.nn.Parameter(cut_as(self.mesh, old, full), full.requires_grad)
            full._on_mesh = known  # type: ignore[attr-defined]
        _given[full] = weakref.ref(self), name
        if not _watching:
            _watching.append(register_optimizer_step_pre_hook(_check_step))
        return known

    def operand(self, name: str) -> Any:
        """The parameter as this layer's calls take it: `placed`, and where the mesh keeps weights whole over data, whole."""
        value = self.placed(name)
        if not self.mesh.axes.kept or name not in self._placed or not isinstance(value, torch.Tensor):
            return value
        shape = self._shapes[name]
        return kept(value, self.mesh, cuts_of(self.mesh, self._placed[name], len(shape)), shape)

    def placed(self, name: str) -> Any:
        """The parameter as it is cut at rest: cut again where it is another layer's, or made by a parametrization, and cut
        where torch.func.functional_call puts a full tensor, the same on every rank, in its place. Raises ShapeError for another shape."""
        value: Any = self._parameters.get(name)
        if value is None:
            value = getattr(self, name)
        placed = self._placed.get(name)
        if placed is None or not isinstance(value, torch.Tensor):
            return value
        if not isinstance(value, DTensor):
            return self._given(name, value, placed)
        if value.placements == placed:
            return value
        if any(type(place) not in (Shard, Replicate) for place in value.placements):
            return value.redistribute(value.device_mesh, placed)  # a sum that ranks hold parts of
        return reshard(value, self.mesh, cuts_of(self.mesh, value.placements, value.dim()), cuts_of(self.mesh, placed, value.dim()))

    def _given(self, name: str, full: torch.Tensor, placed: Any) -> torch.Tensor:
        shape = tuple(self._shapes[name])
        cuts = cuts_of(self.mesh, placed, len(shape))
        if tuple(full.shape) == shape:
            return reshard(full, self.mesh, ((),) * len(shape), cuts, shape)
        if tuple(full.shape) == tuple(length for _, length in block(shape, cuts, self.mesh.sizes, self.mesh.coordinates)):
            return full
        got = f"rank {self.mesh.rank} got a plain tensor {tuple(full.shape)} for {name}"
        raise self.named(ShapeError(f"{got}, expected the full one, {shape}, the same on every rank"))

    def draw(self, name: str, full: torch.Tensor) -> None:
        """Fills the full parameter `name` in place as torch's layer does at construction."""
        raise NotImplementedError(f"{type(self).__name__} draws no {name}")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the layer's own parameters again, in place: the bits of torch.nn's reset_parameters after the same seed."""
        for name, parameter in self._parameters.items():
            if parameter is not None:
                _draw_again(self, name, parameter)


def _draw_again(layer: Layer, name: str, parameter: Any) -> None:
    if promised.waits(parameter):
        promised.note(parameter, lambda made: _draw_again(layer, name, made), lambda full: layer.draw(name, full))
        return
    full = torch.empty(parameter.shape, dtype=parameter.dtype, device=drawing_device())
    layer.draw(name, full)
    fill(layer.mesh, parameter, full)


_given = WeakIdKeyDictionary()  # full parameters that were given to a layer: the last one, and the name there
_watching: list[Any] = []


def _check_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raises MeshError where an optimizer would move a full parameter and not the one that a layer holds in its place."""
    if torch.compiler.is_compiling():
        return
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for full in held:
        layer, name = _given.get(full, (None, ""))
        owner = None if layer is None else layer()
        made = None if owner is None else owner._parameters.get(name)
        if owner is not None and made is full._on_mesh and all(each is not made for each in held):
            raise MeshError(
                f"{type(optimizer).__name__}.step: rank {owner.mesh.rank} got the full parameter {tuple(full.shape)} that was given to"
                f" {path_of(owner) or type(owner).__name__}.{name}, which holds one made of it, so that this one moves nothing; expected"
                " the layer's own: make the optimizer of model.parameters() after that"
            )


def bound_of(fan_in: int) -> float:
    """Of torch.nn's uniform biases."""
    return 1 / math.sqrt(fan_in) if fan_in > 0 else 0.0
