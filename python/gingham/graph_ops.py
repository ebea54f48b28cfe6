"""torch.compile: autograd functions that communicate appear in a compiled graph as ops of torch.library.

    gingham::forward(tensors, call) -> results and what backward needs beside the tensors
    gingham::backward(gradients, saved, call, ..) -> the gradients of the tensors

Eager calls never come here. `call` names one of `KNOWN` and its arguments; meshes, plans and layers are handles in it,
since a graph holds constants only. Parameters enter as local blocks: the to_local() before the op gives gradients the
parameter's placements. Both ops have an ordered effect (torch.library._register_effectful_op): the compiler threads a
token through them, so that none is dropped, though its results be unused, and all run in the order of the program,
which is the same on every rank. Shapes must be known while a graph is made, so rows that several ranks hold must be
cut evenly: another size is a ShapeError when the graph runs, never a guess.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch._library.effects import EffectType
from torch.distributed.tensor import DTensor

from .errors import ShapeError
from .function import Context

Meta = tuple[Sequence[int], torch.dtype]


@dataclass(frozen=True)
class Traced:
    """How an autograd function becomes an op. arguments(words, tensors): those of its forward; results(words, tensors):
    shape and dtype of its outputs and then of the tensors it saves beside its inputs; saves: whether backward looks at
    the inputs' values; reads(words, needs): the inputs that are parameters which backward reads, so that they must not
    have changed since forward (needs: which inputs want a gradient; in forward, all)."""

    function: type[torch.autograd.Function]
    arguments: Callable[[list[str], list[torch.Tensor]], list[Any]]
    results: Callable[[list[str], list[torch.Tensor]], list[Meta]]
    saves: bool = True
    reads: Callable[[list[str], Sequence[bool]], Sequence[int]] = lambda words, needs: ()


KNOWN: dict[str, Traced] = {}


_by_handle: WeakValueDictionary[str, Any] = WeakValueDictionary()


def keep(mesh: Any) -> None:
    """Makes a mesh known by its `handle`, for as long as it lives."""
    _by_handle[mesh.handle] = mesh


# modules that hold parameters of a mesh, and theirs by the address of the block: a graph sees blocks only, whose own versions tell
# nothing of the parameters'. No weak references to parameters: torch.utils.swap_tensors refuses tensors that have any.
_owners: WeakSet[torch.nn.Module] = WeakSet()
_by_address: dict[int, tuple[weakref.ref[torch.nn.Module], str]] = {}


def own(module: torch.nn.Module) -> None:
    """Makes a module known as one whose parameters are DTensors of a mesh."""
    _owners.add(module)


def version_of(block: torch.Tensor) -> int:
    """The version of the parameter that a block belongs to, -1 where it belongs to none that is known."""
    address = block.data_ptr()
    for _ in range(2):
        module, name = _by_address.get(address, (lambda: None, ""))
        parameter: Any = getattr(module(), "_parameters", {}).get(name)
        if isinstance(parameter, DTensor) and parameter._local_tensor.data_ptr() == address:
            return parameter._version
        _by_address.clear()  # blocks move: .to(), destroy
        for owner in list(_owners):
            for name, each in owner._parameters.items():
                if isinstance(each, DTensor):
                    _by_address[each._local_tensor.data_ptr()] = weakref.ref(owner), name
    return -1


def register(mesh: Any, thing: Any) -> str:
    """A handle of something that lives as long as its mesh."""
    held = mesh.steps.setdefault("handles", [])
    held.append(thing)
    return f"{mesh.handle}.{len(held) - 1}"


def find(handle: str) -> Any:
    name, _, index = handle.partition(".")
    mesh = _by_handle[name]
    return mesh.steps["handles"][int(index)] if index else mesh


def names_of(word: str) -> tuple[str, ...]:
    """Names of axes, which a call carries joined by commas."""
    return tuple(word.split(",")) if word else ()


def block_of(parameter: Any) -> Any:
    """A parameter's own block, while a graph is made."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def traced(name: str, words: Sequence[str], tensors: Sequence[torch.Tensor], outputs: int = 1) -> list[torch.Tensor]:
    """The outputs of KNOWN[name] as an op of the graph that is being made."""
    return torch.ops.gingham.forward([tensor.contiguous() for tensor in tensors], "|".join([name, *words]))[:outputs]


@dataclass(frozen=True)
class _Input:
    """An attribute or saved tensor that is the input number `index`, seen in `shape`."""

    index: int
    shape: tuple[int, ...]


_KEPT = object()  # the place of a saved tensor that is no input
# what functions noted on their ctx, by the number that travels from forward to backward as a tensor: one entry a call
# of the program and shapes of its inputs, from which alone it follows
_notes: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
_numbers: dict[Any, int] = {}


def _pack(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return _Input(next(index for index, tensor in enumerate(tensors) if tensor is value), tuple(value.shape))
    if isinstance(value, tuple):
        return tuple(_pack(each, tensors) for each in value)
    return value


def _unpack(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, _Input):
        return tensors[value.index].view(value.shape) if tensors else None
    if isinstance(value, tuple):
        return tuple(_unpack(each, tensors) for each in value)
    return value


def _place(saved: torch.Tensor | None, tensors: list[torch.Tensor]) -> Any:
    """Of a saved tensor: None, the input that it is or views whole, or _KEPT."""
    if saved is None:
        return None
    for index, tensor in enumerate(tensors):
        if saved is tensor or saved.numel() and saved.data_ptr() == tensor.data_ptr() and saved.numel() == tensor.numel():
            return _Input(index, tuple(saved.shape))
    return _KEPT


def _owned(tensor: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
    """An op's results share memory neither with its inputs nor with a larger tensor."""
    storage = tensor.untyped_storage()
    shared = any(storage.data_ptr() == other.untyped_storage().data_ptr() for other in tensors)
    return tensor.clone() if shared or storage.nbytes() != tensor.numel() * tensor.itemsize else tensor


def _forward(tensors: list[torch.Tensor], call: str) -> list[torch.Tensor]:
    name, *words = call.split("|")
    known = KNOWN[name]
    ctx = Context()
    outputs = known.function.forward(ctx, *known.arguments(words, tensors))
    outputs = [_owned(each, tensors) for each in (outputs if isinstance(outputs, tuple) else (outputs,))]
    saved = ctx.__dict__.pop("saved_tensors", ())
    places = tuple(_place(each, tensors) for each in saved)
    kept = [_owned(each, tensors) for each, place in zip(saved, places, strict=True) if place is _KEPT]
    attributes = {key: _pack(value, tensors) for key, value in ctx.__dict__.items()}
    key = (call, *((tuple(tensor.shape), tensor.dtype) for tensor in tensors))
    number = _numbers.setdefault(key, len(_notes))
    _notes[number : number + 1] = [(places, attributes)]
    made = [*outputs, *kept]
    got, expected = ([(tuple(shape), dtype) for shape, dtype in metas] for metas in (_metas_of(made), known.results(words, tensors)))
    if got != expected:
        raise ShapeError(
            f"{name} in a compiled graph: got {got}, expected {expected}, what rows that the ranks cut evenly, none of them empty, would"
            " give; compile a batch that divides by the ranks, or do not compile this part"
        )
    versions = [version_of(tensors[index]) for index in known.reads(words, [True] * len(tensors))]
    return [*made, torch.tensor([number, *versions], device="cpu")]


def _metas_of(tensors: list[torch.Tensor]) -> list[Meta]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


def _forward_shapes(tensors: list[torch.Tensor], call: str) -> list[torch.Tensor]:
    name, *words = call.split("|")
    known = KNOWN[name]
    made = [torch.empty(tuple(shape), dtype=dtype, device=tensors[0].device) for shape, dtype in known.results(words, tensors)]
    return [*made, torch.empty(1 + len(known.reads(words, [True] * len(tensors))), dtype=torch.int64, device="cpu")]


def _backward(
    gradients: list[torch.Tensor], saved: list[torch.Tensor], call: str, given: list[bool], needs: list[bool], sizes: list[int], dtypes: str
) -> list[torch.Tensor]:
    name, *words = call.split("|")
    known = KNOWN[name]
    *saved, number = saved
    place_of_notes, *versions = number.tolist()
    places, attributes = _notes[place_of_notes]
    inputs = len(needs) if known.saves else 0
    tensors, kept = saved[:inputs], iter(saved[inputs:])
    _check_versions(name, tensors, versions, known.reads(words, [True] * len(needs)), known.reads(words, needs))
    stand_ins = tensors or [torch.empty(0, device="cpu") for _ in needs]
    arguments = known.arguments(words, stand_ins)
    where = [next((index for index, tensor in enumerate(stand_ins) if tensor is argument), None) for argument in arguments]
    ctx = Context()
    ctx.needs_input_grad = tuple(index is not None and needs[index] for index in where)
    ctx.__dict__.update({key: _unpack(value, tensors) for key, value in attributes.items()})
    ctx.save_for_backward(*(next(kept) if place is _KEPT else _unpack(place, tensors) for place in places))
    arrived = iter(gradients)
    results = known.function.backward(ctx, *(next(arrived) if there else None for there in given))
    results = results if isinstance(results, tuple) else (results,)
    by_input = {index: result for index, result in zip(where, results, strict=True) if index is not None}
    found: list[torch.Tensor] = []
    for index, (need, (shape, dtype)) in enumerate(zip(needs, _metas(sizes, dtypes), strict=True)):
        if need:
            result = by_input[index]
            result = (
                torch.zeros(shape, dtype=dtype, device=gradients[0].device) if result is None else result.to(dtype).contiguous().view(shape)
            )
            found.append(_owned(result, [*gradients, *saved, *found]))
    return found


def _check_versions(name: str, tensors: list[torch.Tensor], versions: list[int], written: Sequence[int], read: Sequence[int]) -> None:
    for index, version in zip(written, versions, strict=True):
        now = version_of(tensors[index]) if index in read and version >= 0 else version
        if now != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a parameter of"
                f" {name} in a compiled graph, with a block of {tuple(tensors[index].shape)}, is at version {now}; expected version"
                f" {version}, that of the forward pass, instead. Run backward before the step, load or other change in place."
            )


def _backward_shapes(
    gradients: list[torch.Tensor], saved: list[torch.Tensor], call: str, given: list[bool], needs: list[bool], sizes: list[int], dtypes: str
) -> list[torch.Tensor]:
    device = gradients[0].device
    return [
        torch.empty(tuple(shape), dtype=dtype, device=device)
        for need, (shape, dtype) in zip(needs, _metas(sizes, dtypes), strict=True)
        if need
    ]


def _metas(sizes: Sequence[int], dtypes: str) -> list[Meta]:
    """Shapes, each as its number of dims and then the dims, and the names of dtypes."""
    found: list[Meta] = []
    at = 0
    for name in dtypes.split(","):
        count = int(sizes[at])
        found.append((list(sizes[at + 1 : at + 1 + count]), getattr(torch, name)))
        at += 1 + count
    return found


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    tensors, ctx.call = inputs
    known = KNOWN[ctx.call.partition("|")[0]]
    results = len(known.results(ctx.call.split("|")[1:], tensors))
    ctx.needs = [tensor.requires_grad for tensor in tensors]
    ctx.sizes = [size for tensor in tensors for size in (tensor.dim(), *tensor.shape)]
    ctx.dtypes = ",".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    ctx.outputs = outputs_of(ctx.call, tensors)
    kept = output[ctx.outputs : results]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept, output[-1])
    ctx.save_for_backward(*(tensors if known.saves else ()), *kept, output[-1])


def outputs_of(call: str, tensors: list[torch.Tensor]) -> int:
    """How many of the results are outputs; the rest is for backward."""
    name, *words = call.split("|")
    return OUTPUTS[name](words) if name in OUTPUTS else 1


OUTPUTS: dict[str, Callable[[list[str]], int]] = {}


def _gradients(ctx: Any, gradients: list[torch.Tensor | None]) -> Any:
    arrived = gradients[: ctx.outputs]
    there = [gradient.contiguous() for gradient in arrived if gradient is not None]
    if not there:
        return [None] * len(ctx.needs), None
    given = [gradient is not None for gradient in arrived]
    found = iter(torch.ops.gingham.backward(there, list(ctx.saved_tensors), ctx.call, given, ctx.needs, ctx.sizes, ctx.dtypes))
    return [next(found) if need else None for need in ctx.needs], None


def define(name: str, schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """An op gingham::name with an ordered effect."""
    _library.define(f"{name}{schema}")
    for device in ("CPU", "CUDA"):
        _library.impl(name, run, device)
    torch.library.register_fake(f"gingham::{name}", shapes, lib=_library)
    torch.library._register_effectful_op(f"gingham::{name}", EffectType.ORDERED)


_library = torch.library.Library("gingham", "DEF")
define("forward", "(Tensor[] tensors, str call) -> Tensor[]", _forward, _forward_shapes)
define(
    "backward",
    "(Tensor[] gradients, Tensor[] saved, str call, bool[] given, bool[] needs, SymInt[] sizes, str dtypes) -> Tensor[]",
    _backward,
    _backward_shapes,
)
torch.library.register_autograd("gingham::forward", _gradients, setup_context=_set_up, lib=_library)


def evenly(mesh: Any, rows: int, source: Sequence[str], target: Sequence[str]) -> int:
    """The rows here after a move from one set of row axes to another, where the ranks cut them evenly."""
    if tuple(source) == tuple(target):
        return rows
    total = rows * prod(mesh.sizes[name] for name in source)
    return total // prod(mesh.sizes[name] for name in target)
