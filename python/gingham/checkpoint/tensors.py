"""Global tensors under plain torch keys, of which this rank holds blocks, as torch.distributed.checkpoint wants them.

A module may hold a parameter of the original model in pieces (GPT-2's c_attn.weight [in, 3 width] as q, k and v) and
says so by `joins = {"weight": (("q.weight", "k.weight", "v.weight"), 1)}`: the plain key "<module>.weight" is the
concatenation of its parameters of those names along dim 1. Example: width 8, q cut in two along dim 1: rank 1 holds of
c_attn.weight the columns 4..7 (of q), 12..15 (of k) and 20..23 (of v), three chunks of one tensor.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ..mesh import any_mesh
from ..mesh.layout import block
from .metadata import uncovered
from .together import CheckpointError

Offsets = tuple[int, ...]


@dataclass
class Whole:
    """A global tensor of `shape`: by the offset of each block that this rank holds its lengths and the tensor, or a
    function that reads it when it is needed."""

    shape: torch.Size
    dtype: torch.dtype
    chunks: dict[Offsets, tuple[torch.Size, torch.Tensor | Callable[[], torch.Tensor]]] = field(default_factory=dict)

    def size(self) -> torch.Size:
        return self.shape

    def tensor(self, offsets: Offsets) -> torch.Tensor:
        held = self.chunks[offsets][1]
        return held if isinstance(held, torch.Tensor) else held()

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        items = []
        for chunk in self.__create_chunk_list__():
            data = TensorWriteData(chunk, properties, self.shape)
            items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), lengths) for offsets, (lengths, _) in self.chunks.items()]


@dataclass(frozen=True)
class Part:
    """A tensor of the model and where it lies in the tensor of its plain key: `start` along `dim`."""

    name: str
    tensor: torch.Tensor
    dim: int = 0
    start: int = 0


def plain_keys(model: torch.nn.Module) -> dict[str, list[Part]]:
    """Parameters and persistent buffers by the keys of the original torch model, joined ones as several parts. A tensor
    that stands under two names is in it twice, as in state_dict(). Raises CheckpointError where a join does not fit."""
    named = dict(_named_tensors(model))
    joined: dict[str, str] = {}
    found: dict[str, list[Part]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, (names, dim) in getattr(module, "joins", {}).items():
            full = [_dotted(path, name) for name in names]
            held = [name for name in full if name in named]
            if not held:  # a linear without bias
                continue
            if held != full:
                raise CheckpointError(f"{_dotted(path, key)}: is joined from {full}, of which the model holds only {held}")
            parts, start = [], 0
            for name in full:
                parts.append(Part(name, named[name], dim, start))
                start += named[name].shape[dim]
                joined[name] = _dotted(path, key)
            found[_dotted(path, key)] = parts
    plain = {name: [Part(name, tensor)] for name, tensor in named.items() if name not in joined}
    twice = plain.keys() & found.keys()
    if twice:
        raise CheckpointError(f"{sorted(twice)}: a tensor of the model and a join of others have the same key")
    order = {joined.get(name, name): None for name in named}
    return {key: found.get(key) or plain[key] for key in order}


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield _dotted(path, name), parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield _dotted(path, name), buffer


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def whole_of(key: str, parts: list[Part], tensor_of: Callable[[Part], torch.Tensor] = lambda part: part.tensor) -> Whole:
    """The global tensor of a key from its parts, or from tensors of the same shapes (an optimizer's state)."""
    tensors = [tensor_of(part) for part in parts]
    shapes = [tensor.shape for tensor in tensors]
    shape = list(shapes[0])
    if len(parts) > 1:
        dim = parts[0].dim
        shape[dim] = sum(other[dim] for other in shapes)
        rests = {tuple(other[:dim]) + tuple(other[dim + 1 :]) for other in shapes}
        if len(rests) > 1 or len({tensor.dtype for tensor in tensors}) > 1:
            raise CheckpointError(f"{key}: joined along dim {dim} from shapes {[tuple(s) for s in shapes]}, {[t.dtype for t in tensors]}")
    made = Whole(torch.Size(shape), tensors[0].dtype)
    for part, tensor in zip(parts, tensors, strict=True):
        offsets, local = block_of(part.name, tensor)
        if local.is_meta:
            raise CheckpointError(
                f"{part.name}: is on the meta device and holds nothing; materialise the model first (gingham.pipeline does)"
            )
        if local.numel() or not tensor.numel():
            place = [offset + part.start * (len(parts) > 1 and dim == part.dim) for dim, offset in enumerate(offsets)]
            made.chunks[tuple(place)] = (local.shape, local)
    return made


def block_of(name: str, tensor: torch.Tensor) -> tuple[Offsets, torch.Tensor]:
    """(offsets, this rank's block) of a DTensor with Shard and Replicate placements, or those of torch's FSDP2, which cuts blocks again
    over an outer dim of its mesh; or of a plain tensor, which is whole."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tensor.detach()
    mesh, local = tensor.device_mesh, tensor._local_tensor.detach()
    if mesh.size() > 1 and not any_mesh():
        raise CheckpointError(
            f"{name}: is one block of {mesh.size()} on a mesh that has ended, {tuple(local.shape)} of {tuple(tensor.shape)}; save before"
            " gingham.destroy(), or load into a model that was made after gingham.init(...)"
        )
    axes = {str(axis): size for axis, size in enumerate(mesh.shape)}
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise CheckpointError(f"{name}: its mesh {mesh} does not contain this rank; put every parameter on one mesh")
    cuts = tuple(_cuts_along(name, tensor, dim) for dim in range(tensor.dim()))
    held = block(tensor.shape, cuts, axes, dict(zip(axes, coordinate, strict=True)))
    if tuple(length for _, length in held) != tuple(local.shape):
        raise CheckpointError(f"{name}: its block has shape {tuple(local.shape)}, expected {held} of {tuple(tensor.shape)}")
    return tuple(offset for offset, _ in held), local


def _cuts_along(name: str, tensor: DTensor, dim: int) -> tuple[str, ...]:
    """The dims of its mesh that cut a dim of a DTensor, in their order: those of torch's _StridedShard come after the later ones that
    their split_factor counts."""
    kinds: dict[str, Any] = {str(axis): placement for axis, placement in enumerate(tensor.placements)}
    if any(type(placement) not in (Shard, Replicate, _StridedShard) for placement in kinds.values()):
        raise CheckpointError(f"{name}: has placements {tensor.placements}, expected Shard, Replicate and those of fully_shard only")
    here = {axis: placement for axis, placement in kinds.items() if not isinstance(placement, Replicate) and placement.dim == dim}
    plain = [axis for axis, placement in here.items() if type(placement) is Shard]
    strided = [axis for axis, placement in here.items() if type(placement) is _StridedShard]
    inside = prod(tensor.device_mesh.size(int(axis)) for axis in plain)
    if len(strided) > 1 or strided and (here[strided[0]].split_factor != inside or strided[0] != next(iter(here))):
        raise CheckpointError(
            f"{name}: has placements {tensor.placements}, of which dim {dim} is cut in an order that is not fully_shard's"
        )
    return (*plain, *strided)


class SavePlanner(DefaultSavePlanner):
    """Takes a flat dict of Whole and, on one rank, of BytesIO."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        held = self.state_dict[index.fqn]
        return held.tensor(tuple(index.offset or ())) if isinstance(held, Whole) else held

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return object


def missing_blocks(plans: list[Any]) -> list[str]:
    """What is wrong with the blocks that all ranks are about to write, as they say in their plans: replicas count once."""
    held: dict[str, TensorStorageMetadata] = {}
    seen: set[tuple[str, Offsets]] = set()
    for item in (item for plan in plans for item in plan.items if item.tensor_data is not None):
        data, at = item.tensor_data, (item.index.fqn, tuple(item.index.offset or ()))
        saved = held.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
        if data.size != saved.size:
            return [f"{item.index.fqn}: has shape {tuple(saved.size)} on one rank and {tuple(data.size)} on another"]
        saved.chunks += [] if at in seen else [data.chunk]
        seen.add(at)
    return [reason for name, saved in held.items() for reason in uncovered(name, saved)]


class LoadPlanner(DefaultLoadPlanner):
    """Fills the tensors of a flat dict of Whole; bytes arrive as BytesIO."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor(tuple(index.offset or ()))

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = value


def check(key: str, saved: Any, wanted: Whole, strict: bool) -> list[str]:
    """What is wrong with loading the saved tensor into `wanted`: another shape, or (strict) a dtype with fewer digits."""
    if not hasattr(saved, "size") or saved.size != wanted.shape:
        got = tuple(saved.size) if hasattr(saved, "size") else "bytes"
        return [f"{key}: got shape {got}, expected {tuple(wanted.shape)}, the model's"]
    return check_dtype(key, saved.properties.dtype, wanted.dtype, strict)


def check_dtype(key: str, saved: torch.dtype, wanted: torch.dtype, strict: bool) -> list[str]:
    if strict and torch.promote_types(saved, wanted) != wanted:
        return [f"{key}: got {saved}, expected {wanted}, which cannot hold it exactly; convert the model or pass strict=False"]
    return []
