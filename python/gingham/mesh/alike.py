"""Elementwise operations on DTensors that lie alike, as the steps of optimizers are made of: made on this rank's blocks at once.

torch's DTensor looks for a rule, wraps and unwraps at each call, some 30 us, which a step of AdamW without fused=True pays eight times a
parameter; where all operands are cut alike the blocks' own result is the result. Everything else goes on as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .partials import block_of_whole
from .writes import owner_of

Operation = Any  # torch._ops.OpOverload
Handler = Callable[[Operation, tuple[Any, ...], dict[str, Any]], Any]

aten = torch.ops.aten


def install(handlers: dict[Operation, Handler], otherwise: Handler) -> None:
    """Puts these operations into torch's table of handlers. otherwise: how those go on that have none there."""
    for op in _elementwise():
        handlers[op] = partial(_one, handlers.get(op, otherwise), op._schema.arguments[0].is_write)
    handlers[aten.detach.default] = partial(_detached, handlers.get(aten.detach.default, otherwise))
    for op in _lists():
        handlers[op] = partial(_each, handlers.get(op, otherwise), op._schema.arguments[0].is_write)


def _elementwise() -> Iterator[Operation]:
    """torch's operations that make one tensor, each element of the elements at its place."""
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        if name == schema.name or "out" in schema.overload_name or name.startswith("_"):
            continue
        op = getattr(getattr(aten, name, None), schema.overload_name or "default", None)
        if op is None or torch.Tag.pointwise not in op.tags or torch.Tag.nondeterministic_seeded in op.tags or op.is_view:
            continue
        kinds = {argument.type.kind() for argument in schema.arguments}
        if len(schema.returns) == 1 and schema.returns[0].type.kind() == "TensorType" and "ListType" not in kinds:
            yield op


def _lists() -> Iterator[Operation]:
    """Those of lists: _foreach_mul_, _foreach_sqrt, _fused_adamw_. Norms and maxima, which are none, do not exist in place."""
    for name in dir(torch):
        in_place = name if name.endswith("_") else f"{name}_"
        if not name.startswith("_foreach_" if in_place != name else ("_foreach_", "_fused_")) or not hasattr(torch, in_place):
            continue
        packet = getattr(aten, name)
        yield from (getattr(packet, overload) for overload in packet.overloads() if "out" not in overload)


def _is_cut(tensor: DTensor) -> bool:
    """Whether it lies on a mesh of ours as parameters do. Looked up once a spec."""
    kept = vars(tensor._spec)
    if "_cut" not in kept:
        kept["_cut"] = owner_of(tensor) is not None
    return bool(kept["_cut"])


def _lies_as(spec: Any, other: Any) -> bool:
    """Whether blocks of the two hold the same elements; what was found is kept with the spec."""
    if spec is other or vars(spec).get("_lies_as") is other:
        return True
    same = spec.placements == other.placements and spec.shape == other.shape and spec.mesh == other.mesh
    if same and spec.shard_order == other.shard_order:
        vars(spec)["_lies_as"] = other
        return True
    return False


def _detached(go_on: Handler, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What autograd does to each gradient that it stores."""
    (first,) = args
    return _wrapped(first._local_tensor.detach(), first) if _is_cut(first) else go_on(op, args, kwargs)


def _one(go_on: Handler, in_place: bool, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first: Any = next((each for each in args if type(each) is DTensor), None)
    if first is None or not _is_cut(first) or any(isinstance(each, torch.Tensor) for each in kwargs.values()):
        return go_on(op, args, kwargs)
    blocks = []
    for each in args:
        if isinstance(each, torch.Tensor):
            if type(each) is DTensor and _lies_as(each._spec, first._spec):
                each = each._local_tensor
            elif type(each) is DTensor or each.dim():
                return go_on(op, args, kwargs)
        blocks.append(each)
    if in_place and first is not args[0]:
        return go_on(op, args, kwargs)
    found = op(*blocks, **kwargs)
    if in_place:
        return first
    return _wrapped(found, first) if _is_a_block(found, first) else go_on(op, args, kwargs)


def apart(op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation of lists in which plain tensors lie beside DTensors of ours, each element by itself: made on the two kinds one after
    the other. NotImplemented of other lists."""
    firsts = args[0]
    kinds = [type(each) is DTensor for each in firsts]
    if all(kinds) or not any(_is_cut(each) for each, kind in zip(firsts, kinds, strict=True) if kind):
        return NotImplemented
    found: list[Any] = list(firsts)
    for wanted in (True, False):
        places = [place for place, kind in enumerate(kinds) if kind == wanted]

        def those(value: Any, places: list[int] = places) -> Any:
            if isinstance(value, torch.Tensor):  # a number for each, or one for all
                return value[places] if value.dim() and len(value) == len(kinds) else value
            return [value[place] for place in places] if isinstance(value, list | tuple) and len(value) == len(kinds) else value

        made = op(*map(those, args), **{name: those(value) for name, value in kwargs.items()})
        for place, each in zip(places, made or (), strict=False):
            found[place] = each
        if op._schema.arguments[0].is_write and not wanted:
            torch.autograd.graph.increment_version([firsts[place] for place in places])
    return found if op._schema.returns else None


def _each(go_on: Handler, in_place: bool, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    firsts = args[0]
    if (found := apart(op, args, kwargs)) is not NotImplemented:
        return found
    if not all(type(each) is DTensor and _is_cut(each) for each in firsts):
        return go_on(op, args, kwargs)
    for tensors in (*args, *kwargs.values()):
        many = isinstance(tensors, list | tuple)
        for each, first in zip(tensors, firsts, strict=False) if many else [(tensors, firsts[0])]:
            if isinstance(each, torch.Tensor) and each.dim() and not (many and type(each) is DTensor and _lies_as(each._spec, first._spec)):
                return go_on(op, args, kwargs)
    blocks = [list(map(_block, tensors)) if isinstance(tensors, list | tuple) else _number(tensors) for tensors in args]
    found = op(*blocks, **kwargs)
    if in_place:
        return firsts if op._schema.returns else None
    pairs = list(zip(found, firsts, strict=True))
    return [_wrapped(*pair) for pair in pairs] if all(_is_a_block(*pair) for pair in pairs) else go_on(op, args, kwargs)


def _number(value: Any) -> Any:
    """One for all of a list, such as the factor of a clipped norm."""
    return block_of_whole(value) if type(value) is DTensor else value


def _block(tensor: Any) -> Any:
    return tensor._local_tensor if type(tensor) is DTensor else tensor


def _is_a_block(found: torch.Tensor, first: Any) -> bool:
    """Whether a result can have the spec of an operand: of a comparison it has another dtype."""
    held = first._local_tensor
    return found.dtype == held.dtype and found.shape == held.shape and found.stride() == held.stride()


def _wrapped(block: torch.Tensor, first: Any) -> DTensor:
    return DTensor.__new__(DTensor, block, first._spec, requires_grad=False)


def _count_steps(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step: torch's foreach operations change DTensors without counting up their versions."""
    if not torch.compiler.is_compiling():
        changed = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, DTensor) and p.grad is not None]
        torch.autograd.graph.increment_version(changed)


register_optimizer_step_post_hook(_count_steps)
