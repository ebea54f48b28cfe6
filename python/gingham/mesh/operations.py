"""What torch's operations do with a parameter on a mesh where torch's DTensor fails: the right result, or an error that names it.

torch.where(w > 0, w, full); torch.lerp(w, full, 0.1)      a plain tensor of w's shape is all of it, as for w * full: cut as w is
ema.lerp_(w, 0.1); ema.copy_(w)                            a plain tensor of w's shape gets all of w; every rank calls it
total.add_(w.grad.norm())                                  a plain tensor of one element gets the whole number; every rank calls it
torch.unique(w); for row in w; mask.view(-1)[index] = 0    what torch has no rule for is made on the whole, on every rank
torch.nn.functional.linear(x, w); torch.cat([w, x])        MeshError: of x nobody knows whether it is a block

torch asks a table of handlers before its own rules, so that operations of two tensors or more, which alone can mix, and those whose rules
are wrong pass through here first; its rules for the others fail in one method. What lies alike, as in steps of optimizers, is made at
once (alike.py). DTensors on other meshes are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils import _pytree as pytree

from ..errors import MeshError
from . import alike
from .layout import chunks, words
from .mesh import Mesh, cuts_of, mesh_of
from .named import leaves, parameter_of
from .partials import operations, settled
from .writes import fill, owner_of, whole

Operation = Any  # torch._ops.OpOverload
Handler = Callable[[Operation, tuple[Any, ...], dict[str, Any]], Any]

aten = torch.ops.aten
# beside those that torch tags as pointwise: also these want operands of one shape
ONE_SHAPE = {aten.copy_, aten.allclose, aten.dist, aten.soft_margin_loss, aten.binary_cross_entropy_with_logits}
REDUCED = ("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy")
ONE_SHAPE |= {getattr(aten, name + end) for name in REDUCED for end in ("", "_backward")}
MASKED = {aten.index, aten.index_put, aten.index_put_}  # weight[mask], and its gradient
# torch's rules are wrong: means and their gradients by the size of a block, rows drawn by the same numbers, other columns' neighbours
WRONG_RULES = {*(ONE_SHAPE - {aten.copy_, aten.allclose, aten.dist}), aten.multinomial, aten.convolution, aten.convolution_backward}
# of which a rank without elements has none: norms are extremes too, of infinite order. Of nothing weight_norm's kernel ends the process
EXTREMES = {aten.max, aten.min, aten.amax, aten.amin, aten.aminmax, aten.argmax, aten.argmin, aten.norm, aten.linalg_vector_norm, aten.dist}
EXTREMES |= {aten._weight_norm_interface, aten._weight_norm_interface_backward}
COMPARING = {aten.equal, aten.allclose, aten.isclose, aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge}  # no gradient goes through them
FAMILIES = ("_foreach", "_fused", "_amp", "_cudnn", "_mkldnn", "_nested", "_sparse", "mkldnn", "sparse", "cudnn", "miopen", "quantized")


def install() -> None:
    dispatcher: Any = DTensor._op_dispatcher  # type: ignore[attr-defined]
    handlers: dict[Operation, Handler] = dispatcher._custom_op_handlers
    alone = [getattr(packet, name) for packet in EXTREMES for name in packet.overloads() if "out" not in name]
    for op in (*_mixing(), *alone, aten.multinomial.default):
        handlers[op] = partial(_guard, handlers.get(op, _as_torch_does))
    for op in operations():
        handlers.setdefault(op, _as_torch_does)
    handlers[aten._foreach_norm.Scalar] = _norms
    alike.install(handlers, _as_torch_does)
    fails = getattr(dispatcher, "_propagate_op_sharding_dispatch_slow_path", None)
    if fails is not None:
        dispatcher._propagate_op_sharding_dispatch_slow_path = _without_rule(fails)


def told(mesh: Mesh, tensor: DTensor) -> tuple[str, str]:
    """Of a DTensor of the mesh: the parameter that it is or is made of and how that is cut; what to write instead of torch's operation."""
    found = parameter_of(tensor)
    parameter: Any
    path, parameter = found if found is not None and isinstance(found[1], DTensor) else ("", tensor)
    if all(type(place) in (Shard, Replicate) for place in parameter.placements):
        how = f"cut {words(cuts_of(mesh, parameter.placements, parameter.dim()))}"
    else:
        how = f"placed {tuple(parameter.placements)}"
    made = "" if parameter is tensor else f"a DTensor {tuple(tensor.shape)} made of "
    what = f"{made}{f'the parameter {path}' if path else 'a DTensor'} {tuple(parameter.shape)} {how}"
    return what, (
        f"call the layer, layer(x), or for a function of all of it take {path or 'layer.weight'}.full_tensor(), on every rank, whose"
        " gradient is right beside whole tensors, and beside blocks in the forward of a model of gingham.parallelize"
    )


def read_by_name(tensor: DTensor) -> list[Any]:
    """Of a DTensor with a gradient, for each parameter that it is or is made of what the conversion left on it whose own code reads it by
    name (convert/loose.py): it stands for a whole tensor then. None for other parameters."""
    found = [each for each in leaves(tensor) if isinstance(each, DTensor) and each.is_leaf] if tensor.requires_grad else []
    return [getattr(each, "read_by_name", None) for each in found]


def stands_whole(tensor: DTensor) -> bool:
    """Whether a DTensor beside a plain tensor may be taken for all of it: of parameters that a model's own code reads by name, or where no
    gradient is asked for and every rank has it whole."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        marks = read_by_name(tensor)
        return bool(marks) and None not in marks
    return all(place.is_replicate() for place in tensor.placements) and torch._C._current_graph_task_id() == -1


def mixed(mesh: Mesh, name: str, tensor: DTensor, plain: torch.Tensor) -> Exception:
    """The error of an operation `name` on a DTensor and a plain tensor, of which nobody knows what part it is."""
    what, fix = told(mesh, tensor)
    return MeshError(
        f"{name}: rank {mesh.rank} got a plain tensor {tuple(plain.shape)} beside {what}, of which a rank has a part; expected no such"
        f" mixture: {fix}"
    )


def _mixing() -> Iterator[Operation]:
    """torch's operations of two tensors or more."""
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        if name == schema.name or "out" in schema.overload_name or name.startswith(FAMILIES) or sum(map(_tensors_of, schema.arguments)) < 2:
            continue
        op = getattr(getattr(aten, name, None), schema.overload_name or "default", None)
        if op is not None:
            yield op


def _tensors_of(argument: Any) -> int:
    """How many tensors an argument of a schema may be: 2 for a list."""
    kind = argument.type
    if kind.kind() not in ("ListType", "OptionalType"):
        return int(kind.kind() == "TensorType")
    inner = kind.getElementType().kind()
    return 2 if kind.kind() == "ListType" and inner in ("TensorType", "OptionalType") else int(inner == "TensorType")


def _name(op: Operation) -> str:
    return str(op.overloadpacket.__name__).strip("_")


def _as_torch_does(op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Without its handler; another thread that comes meanwhile goes by torch's rules too."""
    args, kwargs = settled(op, args, kwargs)
    handlers = DTensor._op_dispatcher._custom_op_handlers  # type: ignore[attr-defined]
    mine = handlers.pop(op, None)
    try:
        return op(*args, **kwargs)
    finally:
        if mine is not None:
            handlers.setdefault(op, mine)


def _guard(go_on: Handler, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = settled(op, args, kwargs)
    ours, plain = _kinds(args, kwargs)
    mesh = mesh_of(ours[0]) if ours and not torch.compiler.is_compiling() else None
    if mesh is None:
        return go_on(op, args, kwargs)
    if _is_number_written(op, args, kwargs):
        if torch.is_grad_enabled() and any(each.requires_grad for each in ours):
            raise _unheard(mesh, op, max(ours, key=lambda each: each.requires_grad))
        return op(*pytree.tree_map_only(DTensor, whole, args), **pytree.tree_map_only(DTensor, whole, kwargs))
    right = op.overloadpacket not in WRONG_RULES and not (op.overloadpacket in EXTREMES and _is_sparse(mesh, ours[0]))
    if right and not plain:
        return go_on(op, args, kwargs)
    like = max(ours, key=lambda each: (each.numel(), each.requires_grad))
    wants_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in plain) and op.overloadpacket not in COMPARING
    if plain and (wants_gradient or not (_are_of_one_shape(op, like, ours, plain) or _are_of_a_formula(plain))):
        if _are_whole(op, ours) and not _changed(op, args, kwargs):
            return op(*pytree.tree_map_only(DTensor, whole, args), **pytree.tree_map_only(DTensor, whole, kwargs))
        raise mixed(mesh, _name(op), like, plain[0])
    if any(each is one for each in plain for one in _changed(op, args, kwargs)):
        return op(*pytree.tree_map_only(DTensor, whole, args), **pytree.tree_map_only(DTensor, whole, kwargs))
    if not right:
        return _on_the_whole(mesh, op, args, kwargs)
    args, kwargs = pytree.tree_map_only(torch.Tensor, partial(_on_mesh, like), (args, kwargs))
    return go_on(op, args, kwargs)


def _norms(op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of a list, in which some lie on ranks that have nothing of others, or are plain."""
    if (made := alike.apart(op, args, kwargs)) is not NotImplemented:
        return made
    found = [mesh_of(each) if isinstance(each, DTensor) else None for each in args[0]]
    if not any(mesh is not None and _is_sparse(mesh, each) for mesh, each in zip(found, args[0], strict=True)):
        return _as_torch_does(op, args, kwargs)
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    return [torch.linalg.vector_norm(each, order, dtype=kwargs.get("dtype")) for each in args[0]]


def _is_sparse(mesh: Mesh, tensor: DTensor) -> bool:
    """Whether a rank has no element of it."""
    cuts = cuts_of(mesh, tensor.placements, tensor.dim())
    return any(0 in chunks(size, [mesh.sizes[name] for name in names]) for size, names in zip(tensor.shape, cuts, strict=True))


def _are_whole(op: Operation, ours: list[DTensor]) -> bool:
    """Whether every rank has all of them, and no gradient is asked for."""
    without = not torch.is_grad_enabled() or op.overloadpacket in COMPARING
    return without and torch._C._current_graph_task_id() == -1 and all(place.is_replicate() for each in ours for place in each.placements)


def _are_of_one_shape(op: Operation, like: DTensor, ours: list[DTensor], plain: list[torch.Tensor]) -> bool:
    """Whether each element goes with those at its place: then a tensor of the DTensor's shape is no block of a larger one."""
    if op.overloadpacket in MASKED:
        return all(each.shape == like.shape and each.dtype == torch.bool for each in plain)
    alike = torch.Tag.pointwise in op.tags or op.overloadpacket in ONE_SHAPE
    return alike and all(each.shape == like.shape or each.numel() == 1 for each in (*ours, *plain))


def _are_of_a_formula(plain: list[torch.Tensor]) -> bool:
    """Whether these are the zeros or ones that torch's own formula of a gradient puts beside it (of split, prod): of the full shapes."""
    if torch._C._current_graph_task_id() == -1:
        return False
    return all(each.numel() == 0 or (not each.requires_grad and _is_constant(each)) for each in plain)


def _is_constant(x: torch.Tensor) -> bool:
    return bool((x == x.flatten()[0]).all()) and x.flatten()[0].item() in (0, 1)


def _kinds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[DTensor], list[torch.Tensor]]:
    """DTensors, and plain tensors of more than one element, which torch takes for a number."""
    ours, plain = [], []
    for each in (*args, *kwargs.values()):
        for x in each if isinstance(each, list | tuple) else (each,):
            if isinstance(x, DTensor):
                ours.append(x)
            elif isinstance(x, torch.Tensor) and x.numel() != 1:
                plain.append(x)
    return ours, plain


def _changed(op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that the operation writes into."""
    found: list[Any] = []
    for index, argument in enumerate(op._schema.arguments if op._schema.is_mutable else ()):
        if argument.is_write:
            found.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return found


def _is_number_written(op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it writes into a plain tensor of one element: total.add_(w.norm()), norms[0] = w.norm()."""
    return any(isinstance(x, torch.Tensor) and not isinstance(x, DTensor) and x.numel() == 1 for x in _changed(op, args, kwargs))


def _unheard(mesh: Mesh, op: Operation, tensor: DTensor) -> Exception:
    return MeshError(
        f"{op.overloadpacket.__name__}: rank {mesh.rank} writes {told(mesh, tensor)[0]} into a plain tensor of one element, where its"
        " gradient would not go back; expected a new tensor, total = total + x, or x.full_tensor() in place of x, on every rank"
    )


def _on_mesh(like: DTensor, x: torch.Tensor) -> DTensor:
    """What every rank has all of."""
    if isinstance(x, DTensor):
        return x
    return DTensor.from_local(x.detach(), like.device_mesh, [Replicate()] * len(like.placements), run_check=False)


def _without_rule(fails: Callable[..., Any]) -> Callable[..., Any]:
    """torch's search for a rule, which returns how to go on, or the result itself."""

    @wraps(fails)
    def search(op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any) -> Any:
        try:
            return fails(op, args, kwargs, *rest)
        except (RuntimeError, NotImplementedError) as error:
            ours, plain = _kinds(args, kwargs)
            meshes = {id(mesh): mesh for mesh in map(mesh_of, ours)}
            mesh = next(iter(meshes.values()), None)
            if mesh is None or len(meshes) > 1 or plain or torch.compiler.is_compiling():
                raise
            if "out" in op._schema.overload_name or torch.Tag.nondeterministic_seeded in op.tags:
                what, fix = told(mesh, ours[0])
                why = str(error).split("\n")[0]
                raise MeshError(
                    f"{_name(op)}: rank {mesh.rank} got {what}, of which a rank has a part, and torch's DTensor has no rule for it ({why});"
                    f" {fix}"
                ) from error
        return _on_the_whole(mesh, op, args, kwargs)

    return search


@torch.no_grad()
def _on_the_whole(mesh: Mesh, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result for the full tensors, on every rank; what is changed in place is cut again. A view of a parameter is a copy here: who
    writes into it is told so (writes.py)."""
    changed = _changed(op, args, kwargs)
    full_args, full_kwargs = pytree.tree_map_only(DTensor, whole, (args, kwargs))
    found = op(*full_args, **full_kwargs)
    if changed:
        for mine, full in zip(changed, _changed(op, full_args, full_kwargs), strict=True):
            fill(mesh, mine, full)
        return changed[0]
    like = max(_kinds(args, kwargs)[0], key=torch.Tensor.numel)
    results = pytree.tree_map_only(torch.Tensor, partial(_on_mesh, like), found)
    if op.is_view:
        for each in pytree.tree_leaves(results):
            each._part_of = (like, _name(op))
        return results
    # gradients lie as what they are gradients of
    placed = like.placements if owner_of(like) is not None else None
    return pytree.tree_map_only(DTensor, lambda x: x.redistribute(placements=placed) if placed and x.shape == like.shape else x, results)


install()
