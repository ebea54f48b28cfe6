"""Ways into a converted model: its forward and those public methods that run its layers, each with the border around it.

The border stands on the methods themselves, not in hooks of the module: m.forward(x) is m(x). The model's class is replaced by a
subclass of the same name, so that a copy of the model and torch.compile see methods like any other. Inside one bordered call the
others pass through: a forward that calls encode crosses the border once.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..function import refuse_transforms
from .bytecode import chains
from .nested import has_tensors

HERE = "_gingham_border"  # the attribute that holds a model's border

_subclasses: dict[tuple[type, tuple[tuple[str, str], ...]], type] = {}


def enclose(model: torch.nn.Module, border: Any) -> None:
    """Puts the border on forward and on the public methods of the model's own classes that run its layers."""
    if "forward" in vars(model):  # patched: the instance's goes before its class's
        object.__setattr__(model, "_own_forward", model.__dict__.pop("forward"))
    object.__setattr__(model, HERE, border)
    _wrap(model, {"forward": "cross", **ways_in(model)})


class Above:
    """What stands on the methods of a model whose border is around its base: they see whole tensors, and must cross that border."""

    def __init__(self, border: Any, child: str) -> None:
        """child: the model's child that is or holds the base."""
        self.border, self.inside, self.child = border, border.inside, child

    def call(self, function: Any, name: str, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.border.crossed = False
        with self.inside.around_base(self.border.mesh):
            output = function(model, *args, **kwargs)
        runs = name == "forward" or any(chain[:1] == (self.child,) for chain in chains(function) or ())
        if runs and not self.border.crossed:
            raise NotImplementedError(
                f"{type(model).__name__}.{name} runs layers of its base without calling the base, so that every rank has run the whole"
                " batch and gradients would be counted several times; call the base, or use io='local'"
            )
        return output


def register_forward_method(model: torch.nn.Module, method_name: str) -> None:
    """Makes a method of a model that `parallelize` has converted take full inputs and give full outputs, as its forward does.

    model: what parallelize returned, io="full", or a wrapper around it; method_name: of a method whose tensor arguments have the
    batch as their first dim, as has every tensor that it returns. Public methods that run the model's layers themselves need no
    registration, those that call the model need none either. Raises ValueError for a model that is not converted,
    AttributeError for a method that it does not have.
    """
    from .wrappers import core

    found = next((each for each in (model, core(model)) if HERE in vars(each)), None)
    if found is None:
        raise ValueError(f"register_forward_method: this {type(model).__name__} has no border; parallelize it first, with io='full'")
    if not callable(getattr(found, method_name, None)):
        raise AttributeError(f"register_forward_method: {type(found).__name__} has no method {method_name!r}")
    _wrap(found, {method_name: "cross"})


def _wrap(model: torch.nn.Module, ways: dict[str, str]) -> None:
    cls = type(model)
    key = (cls, tuple(sorted(ways.items())))
    if key not in _subclasses:
        made: dict[str, Any] = {name: _bordered(getattr(cls, name), name, way) for name, way in ways.items()}
        made |= {"__reduce_ex__": _unpicklable, "__copy__": _copied, "__deepcopy__": _deeply_copied}
        made |= {"__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
        _subclasses[key] = type(cls.__name__, (cls,), made)
    model.__class__ = _subclasses[key]


def _bordered(original: Callable[..., Any], name: str, way: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        border = getattr(self, HERE, None)
        function = original
        if name == "forward" and "_own_forward" in self.__dict__:
            own = self._own_forward
            function = lambda _, *args, **kwargs: own(*args, **kwargs)  # noqa: E731
        if border is None or border.inside.is_passed() or name != "forward" and not has_tensors(args, kwargs):
            return function(self, *args, **kwargs)
        if way == "refuse":
            raise NotImplementedError(
                f"{type(self).__name__}.{name}: this method calls the model and runs its layers itself, or its code is not known; call"
                f" gingham.register_forward_method(model, {name!r}) where it is given and gives full tensors of the batch"
            )
        refuse_transforms(type(self).__name__)
        return border.call(function, name, self, args, kwargs)

    return method


def _unpicklable(self: Any, protocol: Any) -> Any:
    raise TypeError(f"{type(self).__name__}: a model that parallelize has converted cannot be pickled, it holds a mesh; use gingham.save")


def _copied(self: Any) -> Any:
    new = object.__new__(type(self))
    vars(new).update(vars(self))
    return new


def _deeply_copied(self: Any, memo: dict[int, Any]) -> Any:
    new = memo[id(self)] = object.__new__(type(self))
    vars(new).update(copy.deepcopy(vars(self), memo))
    return new


def ways_in(model: torch.nn.Module) -> dict[str, str]:
    """The public methods of a model's own classes that run its layers: "cross", or "refuse" where their source does not say."""
    protocol = {name for cls in type(model).__mro__ if not _is_own(cls) for name in vars(cls)}
    found: dict[str, str] = {}
    for cls in type(model).__mro__:
        for name, function in vars(cls).items() if _is_own(cls) else ():
            if name.startswith("_") or name in protocol or name in found or not inspect.isfunction(function):
                continue
            runs, calls, known = _uses(model, name, set())
            if runs or not known:
                found[name] = "refuse" if calls or not known else "cross"
    return {name: way for name, way in found.items() if name != "forward"}


def _is_own(cls: type) -> bool:
    """Whether a class says what this model is, not what all models of a library are."""
    return (
        cls.__module__.startswith("transformers.models.")
        or cls is not object
        and not f"{cls.__module__}.".startswith(("torch.", "transformers.", "peft.", "gingham.", "builtins.", "typing.", "abc."))
    )


READ = {"config", "dtype", "device", "weight", "bias"}


def _uses(model: Any, name: str, seen: set[str]) -> tuple[bool, bool, bool]:
    """Whether a method (or a private one that it calls) runs layers of the model, whether it calls the model itself, and whether
    its code is known."""
    seen.add(name)
    taken = chains(getattr(type(model), name))
    if taken is None:
        return False, False, False
    calls = any(chain in ((), ("forward",), ("__call__",)) for chain in taken)
    runs, known = False, True
    for first, *rest in (chain for chain in taken if chain):
        if first in model._modules:
            # self.base.method(x): the base has a border of its own
            runs |= not rest or rest[0] not in READ and not hasattr(model._modules[first], HERE)
        elif first.startswith("_") and first not in seen and _is_own_method(model, first):
            inner = _uses(model, first, seen)
            runs, calls, known = runs or inner[0], calls or inner[1], known and inner[2]
    return runs, calls, known


def _is_own_method(model: Any, name: str) -> bool:
    return any(inspect.isfunction(vars(cls).get(name)) for cls in type(model).__mro__ if _is_own(cls))
