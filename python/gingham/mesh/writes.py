"""What changes a parameter on a mesh in place does to its blocks what it does to one process's tensor.

weight.copy_(full); weight.mul_(mask); weight += full        a plain tensor of the global shape is cut as the parameter is
weight[0] = 0; table.data[pad].zero_(); weight[:, 3].fill_(1)  made on the whole tensor and cut again: every rank calls it
weight.data = full; weight.data = other.data                 the parameter has those values, and their dtype
weight.grad = full                                            cut as the parameter is, for every optimizer
copy.deepcopy(model) after backward                          gradients too
torch._foreach_mul_(parameters, 0.9)                         counts up their versions, as it does those of plain tensors
weight.share_memory_()                                       refused: it has no memory of its own, and torch would crash

torch's DTensor refuses the first, changes a copy that nobody sees in the second and nothing in the third. DTensors on other
meshes are left as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils import _pytree as pytree

from ..errors import MeshError, ShapeError
from . import promised
from .layout import block, slices
from .mesh import Mesh, cuts_of, mesh_of

# each element by itself, or drawn by torch's DTensor as one process draws it: blocks are changed where they are
BY_ELEMENT = {
    *("abs_", "add_", "addcdiv_", "addcmul_", "bernoulli_", "clamp_", "clamp_max_", "clamp_min_", "copy_", "div_", "erfinv_", "exp_"),
    *("fill_", "lerp_", "log_", "masked_fill_", "mul_", "neg_", "normal_", "pow_", "reciprocal_", "relu_", "rsqrt_", "sign_", "sqrt_"),
    *("square_", "sub_", "tanh_", "sigmoid_", "uniform_", "zero_", "__iadd__", "__imul__", "__isub__", "__itruediv__"),
}
# these change what a tensor is, not its values
NO_WRITES = {"detach_", "requires_grad_", "rename_", "resize_", "resize_as_", "set_", "share_memory_", "apply_", "map_", "map2_"}
MOVES = {"t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_"}
PARTS = ("select", "narrow", "chunk", "split", "unbind", "diagonal", "tensor_split", "view", "reshape", "flatten")

_data: Any = torch.Tensor.data
_grad: Any = torch.Tensor.grad
_deepcopy = torch.Tensor.__deepcopy__


def install() -> None:
    names = {name for name in dir(torch.Tensor) if name.endswith("_") and not name.startswith("_")} - NO_WRITES - MOVES
    for name in {*names, *BY_ELEMENT, "__setitem__"}:
        setattr(DTensor, name, _writing(name, getattr(torch.Tensor, name)))
    for name in ("__getitem__", *PARTS):
        setattr(DTensor, name, _looking(name, getattr(torch.Tensor, name)))
    for name in dir(torch):
        if name.startswith("_foreach_") and name.endswith("_"):
            setattr(torch, name, _counting(getattr(torch, name)))
    DTensor.data = property(_get_data, _set_data)  # type: ignore[assignment,method-assign]
    DTensor.grad = property(_grad.__get__, _set_grad, _grad.__delete__)  # type: ignore[assignment]
    DTensor.__deepcopy__ = _copied  # type: ignore[assignment,method-assign]
    DTensor.share_memory_ = _refuse_sharing  # type: ignore[assignment,method-assign]


NOTED = 1 << 16  # memories whose last write is known by itself

_writes = 0
_last: dict[int, int] = {}  # number of the last write to a block's memory
_before = 0  # of those that are not known any more


def _note_writes(tensors: Iterable[Any]) -> None:
    global _writes, _before
    for each in tensors:
        if isinstance(each, DTensor):
            if len(_last) >= NOTED:
                _last.clear()
                _before = _writes
            _writes += 1
            _last[each._local_tensor.untyped_storage()._cdata] = _writes


def last_write(parameter: DTensor) -> int:
    """A number that changes where a DTensor on the parameter's memory was written to in place: parameter.data.mul_(2) counts up no
    version."""
    return _last.get(parameter._local_tensor.untyped_storage()._cdata, _before)


def owner_of(tensor: DTensor) -> Mesh | None:
    """The mesh of ours on which a DTensor lies as parameters do: dims cut or whole, no parts of sums."""
    return mesh_of(tensor) if all(type(place) in (Shard, Replicate) for place in tensor.placements) else None


def _held(tensor: DTensor) -> Mesh | None:
    """The mesh of ours on whose ranks the elements of a DTensor lie, also in the order of a view: weight.view(-1)."""
    return None if any(place.is_partial() for place in tensor.placements) else mesh_of(tensor)


@torch.no_grad()
def fill(mesh: Mesh, parameter: Any, full: torch.Tensor) -> None:
    """Puts this rank's block of a full tensor into a DTensor of the mesh."""
    if tuple(full.shape) != tuple(parameter.shape):
        raise ShapeError(f"rank {mesh.rank} got a full tensor {tuple(full.shape)} for a parameter {tuple(parameter.shape)}")
    if promised.waits(parameter):
        promised.keep(parameter)
    if owner_of(parameter) is None:
        everywhere = [Replicate()] * len(parameter.placements)
        mine = DTensor.from_local(full, parameter.device_mesh, everywhere, run_check=False).redistribute(placements=parameter.placements)
        parameter._local_tensor.copy_(mine._local_tensor)
    else:
        cuts = cuts_of(mesh, parameter.placements, parameter.dim())
        parameter._local_tensor.copy_(full[slices(block(full.shape, cuts, mesh.sizes, mesh.coordinates))])
    torch.autograd.graph.increment_version(parameter)


def cut_as(mesh: Mesh, parameter: DTensor, full: torch.Tensor) -> DTensor:
    """A full tensor cut as a DTensor is, in its own dtype."""
    if not full.is_floating_point():  # a mask, which is no parameter
        held = DTensor.from_local(full.detach(), parameter.device_mesh, [Replicate()] * len(parameter.placements), run_check=False)
        return held.redistribute(placements=parameter.placements)
    cut: Any = mesh.parameter(full.detach(), cuts_of(mesh, parameter.placements, parameter.dim())).detach()
    return cut


def whole(tensor: DTensor) -> torch.Tensor:
    """All of it, in memory of its own."""
    full: torch.Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full.clone() if full.untyped_storage().data_ptr() == tensor._local_tensor.untyped_storage().data_ptr() else full


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.dim() > 0


def _writing(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    by_element = name in BY_ELEMENT

    @wraps(method)
    def write(self: DTensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _note_writes((self,))
        # torch says what is wrong with a leaf that is changed where its gradient would be lost
        if torch.compiler.is_compiling() or torch.is_grad_enabled() and self.requires_grad:
            return method(self, *args, **kwargs)
        if self._local_tensor.is_meta and promised.waits(self):
            return promised.write(self, name, method, args, kwargs)
        given = (*args, *kwargs.values())
        nested = any(isinstance(each, list | tuple | dict) for each in given)
        plain = any(map(_is_plain, pytree.tree_leaves(given) if nested else given))
        source = getattr(self, "_part_of", None)
        if by_element and not plain and source is None:
            return method(self, *args, **kwargs)
        mesh = _held(self)
        if mesh is None:
            return method(self, *args, **kwargs)
        with torch.no_grad():
            if by_element and not plain:
                method(self, *args, **kwargs)
            else:
                # a copy overwrites all of it: nothing is fetched
                full = torch.empty(self.shape, dtype=self.dtype, device=mesh.device) if name == "copy_" else whole(self)
                method(full, *pytree.tree_map_only(DTensor, whole, args), **pytree.tree_map_only(DTensor, whole, kwargs))
                fill(mesh, self, full)
            if source is not None:
                _write_back(mesh, self, *source)
        return None if name == "__setitem__" else self

    return write


def _counting(foreach: Callable[..., Any]) -> Callable[..., Any]:
    """torch's in-place operation on a list of tensors, which counts up no DTensor's version: backward could not tell that one changed."""

    @wraps(foreach)
    def change(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            for each in tensors:
                if isinstance(each, DTensor) and each._local_tensor.is_meta and promised.waits(each):
                    raise _foreach_on_meta(foreach.__name__, each)
        result = foreach(tensors, *args, **kwargs)
        if not torch.compiler.is_compiling():
            _note_writes(tensors)
            changed = [each for each in tensors if isinstance(each, DTensor) and not each.is_inference()]
            if changed:
                torch.autograd.graph.increment_version(changed)
        return result

    return change


def _foreach_on_meta(name: str, parameter: DTensor) -> MeshError:
    return MeshError(
        f"torch.{name} on a parameter {tuple(parameter.shape)} that was built under torch.device('meta') on the mesh of a pipeline: it has"
        " no values yet; call gingham.pipeline first"
    )


def _write_back(mesh: Mesh, part: DTensor, owner: DTensor, how: Any) -> None:
    """What was read off a cut tensor is a copy of that part, so that the tensor gets it again."""
    if isinstance(how, str):
        raise MeshError(
            f"rank {mesh.rank} changed {how}() of a parameter {tuple(owner.shape)} placed {tuple(owner.placements)} in place, which is a"
            " copy where ranks hold blocks; index the parameter instead: weight[start:stop].zero_() or weight[start:stop] = value"
        )
    owner[how] = part


def _looking(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def look(self: DTensor, *args: Any, **kwargs: Any) -> Any:
        found = method(self, *args, **kwargs)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() and self.requires_grad or _held(self) is None:
            return found
        mine = self._local_tensor.untyped_storage().data_ptr()
        for part in found if isinstance(found, tuple | list) else [found]:
            if isinstance(part, DTensor) and (part._local_tensor.untyped_storage().data_ptr() != mine or hasattr(self, "_part_of")):
                part._part_of = (self, args[0] if name == "__getitem__" else name)  # type: ignore[attr-defined]
        return found

    return look


def _get_data(self: DTensor) -> Any:
    found = _data.__get__(self)
    if hasattr(self, "_part_of") and not torch.compiler.is_compiling():
        found._part_of = self._part_of
    if "_promise" in self.__dict__:
        found._promise = promised.promise_of(self)
    return found


def _cut_here(self: DTensor, mesh: Mesh, what: str, kind: str, new: torch.Tensor) -> DTensor:
    """A full tensor that takes the place of the parameter's data or grad. Raises ShapeError for one of another shape."""
    if new.shape != self.shape:
        raise ShapeError(
            f"{what}: rank {mesh.rank} got a plain tensor {tuple(new.shape)} for a parameter {tuple(self.shape)}; expected the full"
            f" {kind}, the same on every rank, or a DTensor placed as the parameter is"
        )
    return cut_as(mesh, self, new)


def _set_data(self: DTensor, new: torch.Tensor) -> None:
    mesh = None if torch.compiler.is_compiling() else owner_of(self)
    if mesh is None:
        _data.__set__(self, new)
        return
    if not isinstance(new, DTensor):
        new = _cut_here(self, mesh, "data", "tensor", new)
    elif new.placements != self.placements and new.shape == self.shape:
        new = new.redistribute(self.device_mesh, self.placements)
    promise = promised.promise_of(new) if promised.waits(new) else None
    if promise is None:
        promised.drop(self)
    elif promise is not getattr(self, "_promise", None):
        self._promise = promise.copy()  # type: ignore[attr-defined]
    held: Any = new.detach()
    _data.__set__(self, held)
    self._local_tensor, self._spec = held._local_tensor, held._spec
    _note_writes((self,))  # new memory may lie where an older block of the same parameter lay


def _set_grad(self: DTensor, new: torch.Tensor | None) -> None:
    if new is not None and not isinstance(new, DTensor) and isinstance(new, torch.Tensor) and not torch.compiler.is_compiling():
        mesh = owner_of(self)
        if mesh is not None:
            new = _cut_here(self, mesh, "grad", "gradient", new)
    _grad.__set__(self, new)


def _copied(self: DTensor, memo: dict[int, Any]) -> Any:
    """torch's looks for the storage of a block that begins inside one, which a DTensor has not."""
    if id(self) in memo:
        return memo[id(self)]
    if not self.is_leaf or mesh_of(self) is None:
        return _deepcopy(self, memo)
    new: Any = DTensor(self._local_tensor.detach().clone(), self._spec, requires_grad=False)
    memo[id(self)] = new
    if self.requires_grad:
        new.requires_grad_()
    if self.grad is not None:
        new.grad = copy.deepcopy(self.grad, memo)
    new.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return new


def _refuse_sharing(self: DTensor) -> Any:
    if mesh_of(self) is None:
        return torch.Tensor.share_memory_(self)
    raise MeshError(
        f"share_memory_ of a parameter {tuple(self.shape)} on a gingham mesh: a rank holds a block of it, in memory that the ranks share"
        " already; give other processes its .full_tensor()"
    )


install()
