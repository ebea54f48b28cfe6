"""The published configuration, parallel=dict(pipeline=.., tensor=dict(size=, mode=, depth=)), read and checked.

    dict(data=2, tensor=dict(size=4, mode="2d"))       on 8 ranks; data may be left out
    dict(data=dict(size=2, shard="all"), tensor=..)    the same with weights cut over data too (ZeRO-3)
    dict(data=dict(size=2, shard="state"), tensor=..)  cut at rest, and whole from one optimizer step to the next (ZeRO-1 and 2)
    dict(pipeline=2, tensor=dict(size=4, mode="2d"))   on 16 ranks: 2 pipeline x 2 data x 4 tensor, outermost first
    dict(pipeline=dict(size=2, schedule="1f1b", microbatches=8))   what gingham.pipeline takes where it is told nothing else
    dict(pipeline=dict(size=2))                        the same as pipeline=2; no tensor: size 1, mode None
    dict(tensor=4)                                        an error: it does not say how the 4 ranks are arranged

The number of ranks is data x pipeline x tensor, so data's size follows from the other two.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from ..errors import MeshError
from ..mesh import axes_of
from ..mesh.modes import SHARDS
from ..plan.pipeline import SCHEDULES

TENSOR = {"size", "mode", "depth", "grid", "sequence", "shard_depth", "attention"}


def parse_parallel(parallel: Mapping[str, Any], world: int | None = None) -> dict[str, Any]:
    """axes_of's arguments for one stage from the configuration; world: the number of ranks, None where it is not known yet.

    Raises MeshError for what is wrong, naming got, expected and the fix.
    """
    if not isinstance(parallel, Mapping):
        raise MeshError(f"parallel={parallel!r}: expected dict(pipeline=.., tensor=dict(size=.., mode=..))")
    unknown = set(parallel) - {"tensor", "pipeline", "data"}
    if unknown:
        raise MeshError(f"parallel={dict(parallel)}: unknown {sorted(unknown)}, expected tensor, pipeline, data")
    tensor = _tensor(parallel.get("tensor", 1))
    sizes = {"tensor": _tensor_size(tensor), "pipeline": parse_pipeline(parallel)["size"]}
    data = parallel.get("data")
    shard = _shard(data)
    if data is not None and (not isinstance(data, Mapping) or data.get("size") is not None):
        sizes["data"] = _size("data", data, {"shard"})
    if world is not None:
        sizes["data"] = _data_size(world, sizes)
    if sizes.get("data", 1) > 1:
        tensor |= {"data": sizes["data"], "shard": shard}
    return tensor


def parse_pipeline(parallel: Mapping[str, Any]) -> dict[str, Any]:
    """size, schedule and microbatches of pipeline=2 or dict(size=2, schedule="1f1b", microbatches=8); the last two None where not said.
    Raises MeshError for what is wrong."""
    given = parallel.get("pipeline", 1)
    found: dict[str, Any] = {"size": _size("pipeline", given, {"schedule", "microbatches"}), "schedule": None, "microbatches": None}
    if isinstance(given, Mapping):
        found |= {name: given.get(name) for name in ("schedule", "microbatches")}
    schedule, count = found["schedule"], found["microbatches"]
    if schedule not in (None, *SCHEDULES):
        raise MeshError(f"parallel pipeline schedule={schedule!r}: expected {', '.join(map(repr, SCHEDULES))}")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise MeshError(f"parallel pipeline microbatches={count!r}: expected a number of at least 1")
    return found


def _shard(data: Any) -> str | None:
    """Of data=dict(size=, shard=): see with_data."""
    shard = data.get("shard") if isinstance(data, Mapping) else None
    if shard not in (None, "all", "state"):
        raise MeshError(f"parallel data shard={shard!r}: expected {SHARDS}")
    return shard


def _size(name: str, given: Any, others: Set[str] = frozenset()) -> int:
    """others: what a dict may have beside its size."""
    if isinstance(given, Mapping):
        known = {"size"} | others
        if set(given) - known:
            raise MeshError(f"parallel {name}={dict(given)}: unknown {sorted(set(given) - known)}, expected {', '.join(sorted(known))}")
        given = given.get("size", 1)
    if given is None:
        return 1
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise MeshError(f"parallel {name}={given!r}: expected a number of at least 1 or dict(size=...)")
    return given


def _tensor(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        given = {"size": _size("tensor", given)}
    unknown = set(given) - TENSOR
    if unknown:
        raise MeshError(f"parallel tensor={dict(given)}: unknown {sorted(unknown)}, expected some of {sorted(TENSOR)}")
    size = given.get("size", 1)
    if given.get("mode") is None and "grid" not in given and size not in (None, 1):
        _size("tensor", size)
        try:
            axes_of(None, size)  # mesh/modes.py knows the modes' names
        except MeshError as error:
            raise MeshError(f"tensor={size} without a mode, write tensor=dict(size={size}, mode=...): {error}") from None
    return dict(given)


def _tensor_size(tensor: Mapping[str, Any]) -> int:
    """The ranks of a tensor configuration that some mesh has; MeshError where none has."""
    if tensor.get("mode") != "sequence":
        return axes_of(**{"mode": None, **tensor}).size
    others = {name for name in tensor if name not in ("size", "mode", "attention") and tensor[name] not in (None, False)}
    if others:
        raise MeshError(f"parallel tensor={dict(tensor)}: {sorted(others)} belong to other modes than 'sequence'")
    if tensor.get("size") is None:
        raise MeshError("mode 'sequence' needs size=, the number of ranks")
    return _size("tensor", tensor["size"])


def _data_size(world: int, sizes: Mapping[str, int]) -> int:
    rest = sizes["pipeline"] * sizes["tensor"]
    if world % rest:
        raise MeshError(
            f"{world} ranks do not divide by pipeline {sizes['pipeline']} x tensor {sizes['tensor']} = {rest}: start a multiple of {rest}"
        )
    if sizes.get("data", world // rest) != world // rest:
        raise MeshError(f"data={sizes['data']} x pipeline {sizes['pipeline']} x tensor {sizes['tensor']}: the job has {world} ranks")
    return world // rest
