"""Initial values for a model built on the meta device: each rank draws its own blocks only.

The model's own initialisation runs on its meta tensors, where it costs nothing, and what it would do to each parameter is
written down: a draw, then element by element operations. A block's draw is Philox4x64-10 (Salmon et al. 2011) keyed by
(torch.initial_seed(), the parameter's name) at the element's global index, so that it depends on no grid. Example: normal_
with deviation 0.02 on [1000, 64] cut in two: rank 1 of 2 draws elements 32000 to 63999.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from math import prod
from typing import Any
from unittest.mock import patch

import numpy
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..autograd.casts import local_of
from ..mesh import Mesh, promised
from ..mesh.layout import Block, block
from .loose import cuts_of

aten = torch.ops.aten
Recipe = list[tuple[Any, tuple[Any, ...]]]

VIEWS = (aten.detach.default, aten.alias.default)
PLAIN = (aten.mul_.Tensor, aten.add_.Tensor, aten.div_.Tensor, aten.erfinv_.default, aten.clamp_.default)
DRAWS = (aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar)


class _Record(TorchDispatchMode):
    """Writes down what is done in place to the tensors of `known`; their row views too."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.recipes: dict[int, Recipe] = {id(tensor): [] for tensor in known}
        self._views: dict[int, tuple[int, int | None]] = {id(tensor): (id(tensor), None) for tensor in known}
        self._alive = list(known)

    def truncated(self, tensor: torch.Tensor, mean: float, std: float, a: float, b: float, generator: Any = None) -> torch.Tensor:
        self.recipes[self._views[id(tensor)][0]] = [("truncated", (mean, std, a, b))]
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        place = self._views.get(id(args[0])) if args and isinstance(args[0], torch.Tensor) else None
        if place is None:
            return out
        of, row = place
        if func in VIEWS or (func is aten.select.int and row is None and args[1] == 0):
            self._views[id(out)] = (of, args[2] if func is aten.select.int else row)
            self._alive.append(out)
        elif row is not None and func in (aten.zero_.default, aten.fill_.Scalar):
            self.recipes[of].append((func, (row, *args[1:])))
        elif func in DRAWS and row is None:
            self.recipes[of] = [(func, args[1:])]
        elif func in PLAIN and row is None:
            self.recipes[of].append((func, args[1:]))
        elif func._schema.is_mutable:
            raise NotImplementedError(f"initialisation on meta by {func}: load a checkpoint into the model, or build it on the CPU")
        return out


def record(model: torch.nn.Module) -> dict[int, Recipe]:
    """What the model's own initialisation does to each parameter, by the parameter's id."""
    mode = _Record([parameter for parameter in model.parameters() if parameter.is_meta])
    # torch's own does nothing to a meta tensor, not even an operation that could be seen
    with patch("torch.nn.init._no_grad_trunc_normal_", mode.truncated), torch.no_grad(), mode:
        model.apply(lambda module: _initialise(model, module))  # children first: a parent may draw theirs anew
    return mode.recipes


def _initialise(model: Any, module: Any) -> None:
    if hasattr(model, "_init_weights"):
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if hasattr(tensor, "_is_hf_initialized"):
                del tensor._is_hf_initialized
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)) and not any(True for _ in module.parameters(recurse=False)):
            return
        model._init_weights(module)
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()
    elif hasattr(module, "_reset_parameters"):
        module._reset_parameters()


def draw(model: torch.nn.Module, made: Any, recipes: dict[int, Recipe], old: dict[str, torch.nn.Parameter], seed: int) -> None:
    """Fills the blocks of every parameter whose original was on meta, and its buffers. old: the original ones by name; seed: of draws."""
    names = {id(parameter): name for name, parameter in reversed(old.items())}
    pieces = dict(_pieces(model, old))
    done: set[int] = set()
    for before in old.values():
        after = made.parameters.get(id(before))
        if before.is_meta and after is not None and id(after) not in done:
            done.add(id(after))
            whole = tuple((0, size) for size in before.shape)
            _fill(after, whole, tuple(before.shape), names[id(before)], recipes[id(before)], made.mesh, seed)
    for after, (name, place) in pieces.items():
        before = old[name]
        if before.is_meta:
            done.add(id(after))
            _fill(after, place, tuple(before.shape), name, recipes[id(before)], made.mesh, seed)
    empty = [name for name, parameter in model.named_parameters() if id(parameter) not in done]
    if empty:
        raise NotImplementedError(f"parameters {empty} were not on meta, or have no rule to initialise them; build the model on one device")
    _buffers(model, made.mesh)


def _pieces(model: torch.nn.Module, old: dict[str, torch.nn.Parameter]) -> Iterator[tuple[torch.nn.Parameter, tuple[str, Block]]]:
    """Parameters that hold a part of an original one: its name and their place in it."""
    for path, module in model.named_modules():
        for name, (parts, dim) in getattr(module, "joins", {}).items():
            original, offset = f"{path}.{name}".lstrip("."), 0
            for part in parts:
                parameter = module.get_parameter(part)
                place = [(0, size) for size in parameter.shape]
                place[dim] = (offset, parameter.shape[dim])
                offset += parameter.shape[dim]
                yield parameter, (original, tuple(place))


@torch.no_grad()
def _fill(parameter: Any, place: Block, shape: tuple[int, ...], name: str, recipe: Recipe, mesh: Mesh, seed: int) -> None:
    """place: of the whole parameter in the original one of `shape`, whose elements are counted."""
    if not recipe:
        raise NotImplementedError(f"{name}: nothing in the model initialises it; load a checkpoint into it, or build the model on the CPU")
    if promised.waits(parameter):
        promised.note(parameter, lambda made: _fill(made, place, shape, name, recipe, mesh, seed))
        return
    local = local_of(parameter)
    mine = block(parameter.shape, cuts_of(mesh, parameter), mesh.sizes, mesh.coordinates)
    here = tuple((start + origin, length) for (start, length), (origin, _) in zip(mine, place, strict=True))
    for func, args in recipe:
        if func is aten.normal_.default:
            mean, deviation = (*args, 0.0, 1.0)[:2] if len(args) != 1 else (args[0], 1.0)
            local.copy_(torch.special.ndtri(uniforms(name, shape, here, seed)) * deviation + mean)
        elif func == "truncated":
            mean, deviation, least, most = args
            low, high = (
                torch.special.ndtr(torch.tensor((end - mean) / deviation, dtype=torch.float64, device="cpu")) for end in (least, most)
            )
            local.copy_(torch.special.ndtri(uniforms(name, shape, here, seed) * (high - low) + low) * deviation + mean)
        elif func is aten.uniform_.default:
            low, high = args if args else (0.0, 1.0)
            local.copy_(uniforms(name, shape, here, seed) * (high - low) + low)
        elif func in (aten.zero_.default, aten.fill_.Scalar) and len(args) == (2 if func is aten.fill_.Scalar else 1):
            row, value = args[0] % shape[0], args[1] if len(args) > 1 else 0.0
            if here[0][0] <= row < here[0][0] + here[0][1]:
                local[row - here[0][0]] = value
        else:
            func(local, *args)


def uniforms(name: str, shape: tuple[int, ...], here: Block, seed: int) -> torch.Tensor:
    """Doubles in (0, 1), one for each element of the block `here` of a tensor of `shape`, by its global index."""
    key = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") << 64 | seed
    # trailing dims that the block has whole make one run of numbers with the dim before them
    whole = len(shape)
    while whole > 1 and here[whole - 1] == (0, shape[whole - 1]):
        whole -= 1
    inner = prod(shape[whole:])
    run = (here[whole - 1][0] * inner, here[whole - 1][1] * inner) if shape else (0, 1)
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    out = numpy.empty([length for _, length in here[: max(0, whole - 1)]] + [run[1]])
    for index in numpy.ndindex(*out.shape[:-1]):
        first = run[0] + sum((start + step) * stride for (start, _), step, stride in zip(here, index, strides, strict=False))
        generator = numpy.random.Philox(key=key)
        generator.advance(first // 4)
        raw = generator.random_raw(first % 4 + run[1])[first % 4 :]
        out[index] = ((raw >> numpy.uint64(11)).astype(numpy.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(out).reshape([length for _, length in here])


def _buffers(model: Any, mesh: Mesh) -> None:
    """Buffers that were on meta are made anew by the model's own code."""
    for path, module in model.named_modules():
        names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not names:
            continue
        if not hasattr(model, "_init_weights"):
            raise NotImplementedError(f"buffers {names} of {path or 'the model'} are on meta and nothing makes them; build them on the CPU")
        for name in names:
            module._buffers[name] = torch.full_like(module._buffers[name], -1, device=mesh.device)
            module._buffers[name]._is_hf_initialized = False
        with torch.device(mesh.device):  # also inside torch.device("meta")
            model._init_weights(module)
