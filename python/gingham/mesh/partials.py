"""Results of which ranks hold parts (torch's Partial: of a sum, a norm, an extreme), as operands. torch's rules for some operations take
parts for the whole: a sum of norms, `any` as a number, a division by a sum in a gradient. So they are made whole before what is not linear.

w.norm(dim=0).sum(); (w > 0).any().float(); (w - w.mean()) / w.std()      one process's numbers and gradients
(v.square().sum() + w.square().sum()) / 2                                  stays a sum of parts, which are added up once, when it is read
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.utils import _pytree as pytree

from .mesh import mesh_of

Operation = Any  # torch._ops.OpOverload

aten = torch.ops.aten
ALONE = {aten.neg, aten.neg_, aten.sum}  # linear in their one operand; a cast is not, which would round every part
SCALED = {aten.mul, aten.div, aten.mul_, aten.div_}  # linear, where the other operand is a number
ADDED = {aten.add, aten.sub, aten.add_, aten.sub_}  # linear, where both are parts of the same kind
# what changes no number, or asks for this rank's part, of which it is told (dtensors.py)
AS_THEY_ARE = ("detach", "clone", "alias", "is_", "new_", "size", "stride", "set_", "resize", "record_stream", "requires_grad")
# an empty list of dims stands for all of them, which torch's rules take for none: so backward passes of extremes divide by counts of blocks
OVER_ALL = {aten.sum, aten.mean, aten.nansum, aten.amax, aten.amin, aten.linalg_vector_norm, aten.norm, aten.logsumexp}
OVER_ALL |= {aten.std, aten.var, aten.std_mean, aten.var_mean}
PRIVATE = {aten._to_copy, aten._softmax, aten._log_softmax, aten._is_any_true, aten._is_all_true}


def operations() -> Iterator[Operation]:
    """torch's operations of one tensor, no views of it, that make numbers of its numbers."""
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        if name == schema.name or "out" in schema.overload_name or name.startswith(AS_THEY_ARE) or name.endswith("_like"):
            continue
        packet = getattr(aten, name, None)
        op = getattr(packet, schema.overload_name or "default", None)
        if op is None or op.is_view or (name.startswith("_") and packet not in PRIVATE):
            continue
        if sum(argument.type.kind() == "TensorType" for argument in schema.arguments) == 1:
            yield op


def settled(op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operands, those whole of which a rank has a part, unless the operation is linear. Every rank makes the same calls. What is
    written into in place becomes whole itself."""
    if op.overloadpacket in OVER_ALL:
        args, kwargs = _with_dims(op, args, kwargs)
    parts = [each for each in pytree.tree_leaves((args, kwargs)) if type(each) is DTensor and _is_part(each)]
    if not parts or op.is_view or torch.compiler.is_compiling() or mesh_of(parts[0]) is None or _is_linear(op, args, kwargs, parts):
        return args, kwargs
    if op._schema.arguments[0].is_write and args[0] is parts[0]:
        made = _whole(parts[0])
        parts[0]._local_tensor, parts[0]._spec = made._local_tensor, made._spec
    settled_args, settled_kwargs = pytree.tree_map_only(DTensor, lambda x: _whole(x) if _is_part(x) else x, (args, kwargs))
    return settled_args, settled_kwargs


def _with_dims(op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for index, argument in enumerate(op._schema.arguments):
        if argument.name == "dim" and type(args[0]) is DTensor:
            dims = list(range(args[0].dim()))
            if index < len(args) and args[index] is not None and not isinstance(args[index], int) and len(args[index]) == 0:
                return (*args[:index], dims, *args[index + 1 :]), kwargs
            if kwargs.get("dim") is not None and not isinstance(kwargs["dim"], int) and len(kwargs["dim"]) == 0:
                return args, kwargs | {"dim": dims}
    return args, kwargs


def block_of_whole(x: DTensor) -> torch.Tensor:
    """Of a number that ranks have whole, or parts of: all of it."""
    return (_whole(x) if _is_part(x) else x)._local_tensor


def _is_part(x: DTensor) -> bool:
    return any(place.is_partial() for place in x._spec.placements)


@torch.no_grad()
def _whole(x: DTensor) -> DTensor:
    """Over the dims that have parts; blocks stay cut."""
    return x.redistribute(placements=[Replicate() if place.is_partial() else place for place in x._spec.placements])


def _is_linear(op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], parts: list[DTensor]) -> bool:
    """Whether torch's rule may make parts of these parts."""
    places = parts[0]._spec.placements
    sums = all(type(place) is Partial and place.reduce_op in ("sum", "avg") for place in places if place.is_partial())
    if not sums or not all(each.dtype.is_floating_point and each._spec.placements == places for each in parts):
        return False
    packet, operands = op.overloadpacket, [each for each in args if isinstance(each, DTensor)]
    if packet in ALONE:
        return kwargs.get("dtype") is None
    if packet in SCALED:
        numbers = all(not isinstance(each, torch.Tensor) or each.dim() == 0 for each in args[1:])
        return numbers and len(operands) == 1 and operands[0] is args[0] and "rounding_mode" not in kwargs
    return packet in ADDED and len(operands) == len(parts) == 2
