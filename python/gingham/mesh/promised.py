"""Parameters whose memory waits until their rank knows that it keeps them: a layer built under torch.device("meta") on a pipeline's mesh.

Its values are drawn when it is built, so that torch's generator moves as in one process, and forgotten; what made them is written down with
the generator's state before it. gingham.pipeline keeps those of its stages: `keep` gives a block its memory and makes it again.
Example: of 4 linears on 2 ranks each rank draws 4, one at a time, and then its own 2.

    torch.nn.init.normal_(layer.weight), layer.weight.data.mul_(0.5), model.double()    written down too, in order
    layer.weight.data = tensor                                                          the block gets its memory at once
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from ..errors import MeshError
from .layout import Cuts
from .mesh import Mesh, cuts_of, mesh_of

RANDOM = {"bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_"}
SAME = ("to", "type", "double", "float", "half", "bfloat16", "detach")  # give a tensor of the same values
Replay = Callable[[Any], object]


class Promise:
    """What makes a parameter's values, in order: (the generator's state before it, or None where nothing is drawn; the dtype that the
    parameter had; what is called with it). guards: hooks of layers that wait for it."""

    def __init__(self, mesh: Mesh, made_by: Iterable[tuple[torch.Tensor | None, torch.dtype, Replay]] = ()) -> None:
        self.mesh, self.made_by = mesh, list(made_by)
        self.guards: list[Any] = []

    def copy(self) -> Promise:
        """For another parameter."""
        return Promise(self.mesh, self.made_by)

    def __deepcopy__(self, memo: Any) -> Promise:
        return self.copy()


def waits(x: Any) -> bool:
    """Whether a tensor is a parameter of ours without memory, or what was read off one."""
    mesh = mesh_of(x) if isinstance(x, DTensor) and x._local_tensor.is_meta else None
    return mesh is not None and mesh.whole is not None


def promise_of(x: Any) -> Promise:
    """Raises MeshError for what was computed of a parameter that has no values yet."""
    found: Promise | None = getattr(x, "_promise", None)
    if found is None:
        raise MeshError(
            f"a tensor {tuple(x.shape)} computed of a parameter that was built under torch.device('meta') has no values before"
            " gingham.pipeline; write into the parameter itself, call gingham.pipeline first, or build the model outside of it"
        )
    return found


def parameter(mesh: Mesh, full: torch.Tensor, cuts: Cuts) -> torch.nn.Parameter:
    """mesh.parameter, of which a stage of a pipeline gives no memory where the full tensor is on meta."""
    if not full.is_meta or mesh.whole is None:
        return mesh.parameter(full, cuts)
    made = mesh.parameter(full, cuts, wait=True)
    made._promise = Promise(mesh)  # type: ignore[attr-defined]
    _install()
    return made


def cut_again(mesh: Mesh, old: Any, meta: torch.Tensor, cuts: Cuts) -> torch.nn.Parameter:
    """A parameter that waits, cut otherwise."""
    made: Any = mesh.parameter(meta, cuts, wait=True)
    made._promise = promise_of(old).copy()
    made._drawn = getattr(old, "_drawn", (None, None))
    return made.requires_grad_(old.requires_grad)  # type: ignore[no-any-return]


def note(parameter: Any, replay: Replay, rehearse: Callable[[torch.Tensor], object] | None = None) -> None:
    """What would be done to a parameter now. rehearse: does it to an empty full tensor, where it moves torch's generator."""
    state = None
    if rehearse is not None:
        state = torch.get_rng_state()
        with torch.no_grad():
            rehearse(torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu"))
    promise_of(parameter).made_by.append((state, parameter.dtype, replay))


def write(x: Any, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """x.name(*args, **kwargs), in place, written down. Tensors among the arguments must stay as they are until then."""
    versions = [(each, each._version) for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    later, generator = dict(kwargs), kwargs.get("generator")
    if generator is not None:
        later["generator"] = torch.Generator().set_state(generator.get_state())

    def again(made: Any) -> None:
        if any(each._version != version for each, version in versions):
            raise MeshError(
                f"{name} of a parameter {tuple(made.shape)} that was built under torch.device('meta'): a tensor that it was given has been"
                " changed since, and before gingham.pipeline gave the parameter its values; give it a clone"
            )
        getattr(made.data, name)(*args, **later)

    note(x, again, (lambda full: method(full, *args, **kwargs)) if name in RANDOM else None)
    return None if name == "__setitem__" else x


def drop(parameter: Any) -> Promise | None:
    """For a parameter that has got values."""
    promise: Promise | None = parameter.__dict__.pop("_promise", None)
    for guard in promise.guards if promise is not None else ():
        guard.remove()
    return promise


@torch.no_grad()
def keep(parameter: Any) -> None:
    """Gives a parameter that waits its memory and its values; torch's generator stays where it is."""
    promise, wanted = promise_of(parameter), parameter.dtype
    drop(parameter)
    digest, version = getattr(parameter, "_drawn", (None, None))
    drawn = version == parameter._version
    now = torch.get_rng_state()
    try:
        for state, dtype, replay in promise.made_by:
            _have(parameter, promise.mesh, dtype)
            if state is not None:
                torch.set_rng_state(state)
            replay(parameter)
    finally:
        torch.set_rng_state(now)
    _have(parameter, promise.mesh, wanted)
    if digest is not None:
        parameter._drawn = digest, parameter._version if drawn else None


def _have(parameter: Any, mesh: Mesh, dtype: torch.dtype) -> None:
    """Memory, for values of a dtype."""
    if not parameter._local_tensor.is_meta and parameter.dtype == dtype:
        return
    meta = torch.empty(parameter.shape, dtype=dtype, device="meta")
    made: Any = mesh.parameter(meta, cuts_of(mesh, parameter.placements, parameter.dim()))
    if not parameter._local_tensor.is_meta:
        made._local_tensor.copy_(parameter._local_tensor)
    put(parameter, made.requires_grad_(parameter.requires_grad))


def put(parameter: Any, made: Any) -> None:
    """Makes a Parameter, also where others hold it, the one that was made for it; what it carries stays. `data` cannot: they are on two
    devices."""
    noted = dict(vars(parameter))
    torch.utils.swap_tensors(parameter, made)
    vars(parameter).update({name: value for name, value in noted.items() if name not in ("_local_tensor", "_spec")})


def guard(layer: torch.nn.Module, parameter: Any) -> None:
    """A layer that is called before its parameter has values says so."""

    def refuse(called: torch.nn.Module, inputs: Any) -> None:
        empty = [name for name, each in called._parameters.items() if waits(each)]
        if empty:
            raise MeshError(
                f"{type(called).__name__} was built under torch.device('meta') on a pipeline's mesh, and its {', '.join(empty)} have no"
                " values before gingham.pipeline(model, mesh), which makes those of this rank's stages; call it first"
            )

    promise_of(parameter).guards.append(layer.register_forward_pre_hook(refuse))


def _handing_on(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = method(self, *args, **kwargs)
        promise = getattr(self, "_promise", None)
        if promise is not None and found is not self:
            found._promise = promise
        return found

    return call


def _install() -> None:
    """model.double() puts a cast of each parameter in its place."""
    if not hasattr(DTensor.detach, "__wrapped__"):
        for name in SAME:
            setattr(DTensor, name, _handing_on(getattr(torch.Tensor, name)))
