"""What a call's arguments and outputs hold: tensors in dicts, lists, tuples, named tuples, other mappings and dataclasses, however deep.

As torch.utils._pytree, which knows the classes that are registered there, and beside them subclasses of the builtin containers, mappings
(UserDict, BatchEncoding) and dataclasses, each of which comes out as what it was. Any other object is a leaf: nothing says what it
makes of its tensors, so that one with tensors in it is refused where samples are cut.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
import weakref
from collections import OrderedDict, UserDict, UserList
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from .caches import is_cache

ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
# what holds tensors that are no batch, or is searched by nobody
SKIPPED = (*ATOMS, torch.nn.Module, torch.nn.Parameter, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
LEAVES = (torch.Tensor, *SKIPPED, PackedSequence)
PLAIN = (dict, list, tuple)

Opened = tuple[list[tuple[str, Any]], Callable[[list[Any]], Any]]


def opened(value: Any, above: tuple[Any, ...] = ()) -> Opened | None:
    """The parts of a container with their names, and what makes one like it of other parts; None for a leaf, and for what is in itself.
    above: the containers that it is in."""
    kind = type(value)
    if above and not torch.compiler.is_compiling() and any(value is each for each in above):
        return None
    if kind is dict:
        return [(str(key), part) for key, part in value.items()], lambda parts: dict(zip(value, parts, strict=True))
    if kind is list or kind is tuple:
        return _numbered(value), kind
    if isinstance(value, LEAVES) or is_cache(value):
        return None
    if kind in pytree.SUPPORTED_NODES:
        node = pytree.SUPPORTED_NODES[kind]
        flat, context = node.flatten_fn(value)
        keys = list(value) if isinstance(value, Mapping) and len(value) == len(flat) else range(len(flat))
        return [(str(key), part) for key, part in zip(keys, flat, strict=True)], lambda parts: node.unflatten_fn(parts, context)
    if isinstance(value, PLAIN):
        return _of_builtin(value)
    held = _attributes(value) if isinstance(value, Mapping | UserList) or dataclasses.is_dataclass(value) else []
    if held:
        hidden = isinstance(value, UserDict | UserList)  # their one attribute, which its users do not see
        return [("" if hidden and name == "data" else name, part) for name, part in held], lambda parts: _made(value, held, parts)
    return None


def _numbered(value: Any) -> list[tuple[str, Any]]:
    return [(str(index), part) for index, part in enumerate(value)]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """In the instance's dict and its slots."""
    own = getattr(value, "__dict__", None)
    found = dict(own) if isinstance(own, dict) else {}
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and name not in found:
                name = f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
                try:
                    found[name] = object.__getattribute__(value, name)
                except AttributeError:  # an empty slot
                    continue
    return list(found.items())


def _made(value: Any, held: list[tuple[str, Any]], parts: list[Any]) -> Any:
    """An object of the class of `value` with other attributes; none of its own code runs."""
    new = object.__new__(type(value))
    for (name, _), part in zip(held, parts, strict=True):
        object.__setattr__(new, name, part)
    return new


def _of_builtin(value: Any) -> Opened:
    """An instance of a subclass of dict, list or tuple, which may have attributes beside."""
    mirror = getattr(value, "__dict__", None) is value  # attributes that are its entries
    held = [] if mirror else _attributes(value)
    inside = [(str(key), part) for key, part in value.items()] if isinstance(value, dict) else _numbered(value)

    def make(parts: list[Any]) -> Any:
        content, rest = parts[: len(inside)], parts[len(inside) :]
        if isinstance(value, tuple):
            new: Any = tuple.__new__(type(value), content)
        else:
            new = copy.copy(value)
            base: Any = OrderedDict if isinstance(value, OrderedDict) else dict if isinstance(value, dict) else list
            for key, part in zip(list(value) if isinstance(value, dict) else range(len(content)), content, strict=True):
                base.__setitem__(new, key, part)
        if mirror:
            new.__dict__ = new
        for (name, _), part in zip(held, rest, strict=True):
            object.__setattr__(new, name, part)
        return new

    return inside + held, make


def mapped(
    function: Callable[[str, Any], Any],
    value: Any,
    path: str = "",
    above: tuple[Any, ...] = (),
    is_leaf: Callable[[Any], bool] = lambda value: False,
) -> Any:
    """value with function(path, leaf) in the place of each leaf. One of a class of its own that holds nothing new is itself.
    is_leaf: which containers are leaves too."""
    found = None if is_leaf(value) else opened(value, above)
    if found is None:
        return function(path, value)
    parts, make = found
    made = [mapped(function, part, joined(path, name), (*above, value), is_leaf) for name, part in parts]
    if type(value) not in PLAIN and all(new is part for new, (_, part) in zip(made, parts, strict=True)):
        return value
    return make(made)


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def leaves(value: Any, path: str = "", above: tuple[Any, ...] = ()) -> list[tuple[str, Any]]:
    """With the path of each: of batch["images"][0] it is batch.images.0."""
    found = opened(value, above)
    if found is None:
        return [(path, value)]
    return [leaf for name, part in found[0] for leaf in leaves(part, joined(path, name), (*above, value))]


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def hidden(value: Any, least: int = 1) -> tuple[str, torch.Tensor] | None:
    """The first tensor of `least` dims or more in an object that cannot be opened, and where in it, however deep."""
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", value)]
    kept = []  # so that no id is given twice
    while left:
        path, each = left.pop()
        if isinstance(each, torch.Tensor) and each.dim() >= least and not isinstance(each, torch.nn.Parameter):
            return path, each
        if id(each) in seen or isinstance(each, (*SKIPPED, torch.Tensor)) or path and is_cache(each):
            continue
        seen.add(id(each))
        kept.append(each)
        left += [(joined(path, name), part) for name, part in reversed(list(_inside(each)))]
    return None


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) or isinstance(value, Mapping) and not hasattr(value, "__dict__"):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from _numbered(value)
    yield from _attributes(value)


class Passed:
    """Objects that a border let through: what one had no tensors then, or came out of the model, has this rank's rows in it later."""

    def __init__(self) -> None:
        self.found: dict[int, Any] = {}
        self.told: set[type] = set()

    def add(self, value: Any) -> None:
        key = id(value)
        if not torch.compiler.is_compiling() and not isinstance(value, ATOMS) and key not in self.found:
            try:
                self.found[key] = weakref.ref(value, lambda _: self.found.pop(key, None))
            except TypeError:  # slots without one for references
                return

    def __contains__(self, value: Any) -> bool:
        found = self.found.get(id(value))
        return found is not None and found() is value


def given_out(value: Any, passed: Passed, what: str) -> Any:
    """A leaf of an output that is no tensor: a state that is given back later, or what it is not. what: its name where it has this rank's
    rows. Raises NotImplementedError for what its users read, in which nothing can be gathered, and warns of what they may read."""
    if what and isinstance(value, torch.distributions.Distribution | PackedSequence):
        raise NotImplementedError(
            f"{what}: got a {type(value).__name__} of this rank's rows, expected tensors, or dicts, lists, tuples or dataclasses, which"
            " are gathered: return its tensors and make it of them outside of the model"
        )
    if what and _is_ours(value, passed) and type(value) not in passed.told and (found := hidden(value, 0)) is not None:
        passed.told.add(type(value))
        warnings.warn(
            f"{what}: the model returns a {type(value).__name__}, which parallelize does not open: the tensor of shape"
            f" {tuple(found[1].shape)} in {found[0]} is of this rank's rows. Right for a state that is only given back to the model; what"
            " is read of an output, or makes a loss, has to be in tensors, or dicts, lists, tuples or dataclasses, which are gathered",
            stacklevel=2,
        )
    passed.add(value)
    return value


def _is_ours(value: Any, passed: Passed) -> bool:
    """Whether it is looked into: not what has no tensors, has gone in or out before, or is a state that models of transformers make."""
    if isinstance(value, SKIPPED) or torch.compiler.is_compiling() or value in passed or is_cache(value):
        return False
    return not type(value).__module__.startswith("transformers.")


def closed(value: Any, passed: Passed) -> str:
    """What is in a leaf that no border can cut, in words; else the empty text, and it is let through from then on."""
    if isinstance(value, torch.Tensor) or not _is_ours(value, passed):
        return ""
    found = hidden(value)
    if found is None:
        passed.add(value)
        return ""
    path, x = found
    fix = (
        "give it padded, a row for each sample"
        if isinstance(value, PackedSequence)
        else ("give its tensors as arguments, or in a dict, list, tuple or dataclass")
    )
    return f"a {type(value).__name__} that holds a tensor of shape {tuple(x.shape)} in {path or 'itself'}, expected what can be cut: {fix}"


def has_tensors(args: Any, kwargs: Any) -> bool:
    """Whether a call is given tensors, as they are or inside of something."""
    passed = Passed()
    found = leaves((args, kwargs))
    return any(isinstance(x, torch.Tensor) for _, x in found) or any(closed(x, passed) for _, x in found)
