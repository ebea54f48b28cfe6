"""parallel= with "auto" in it, made the configuration that the planner chooses.

parallel="auto"                                       data, pipeline and tensor, all three
dict(data="auto", tensor=dict(mode="auto"))           no pipeline, since the key is left out
dict(tensor=dict(size=4, mode="auto"))                data follows from the number of ranks, as without "auto"
dict(data=dict(size=2, shard="auto"), tensor=..)      how weights are cut over data
dict(pipeline=dict(size=2, schedule="auto"), ..)      and microbatches, where they are left out
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import MeshError
from ..plan.choose import Machine
from ..plan.hybrids import SHARDS, Hybrid, Wish, choose_hybrid
from ..plan.pipeline import SCHEDULES
from ..plan.workload import Workload
from .parallel_config import parse_parallel

AUTO = "auto"
EVERYTHING: dict[str, Any] = {"data": AUTO, "pipeline": AUTO, "tensor": {"mode": AUTO}}


def has_auto(parallel: Any) -> bool:
    """Whether something in a configuration is left to the planner; attention="auto" is decided by each layer."""
    if isinstance(parallel, Mapping):
        return any(has_auto(given) for name, given in parallel.items() if name != "attention")
    return isinstance(parallel, str) and parallel == AUTO


def chosen(parallel: Any, ranks: int, workload: Workload, machine: Machine) -> tuple[Hybrid, str]:
    """The cheapest hybrid of so many ranks among those that a configuration with "auto" allows, and why it is. Raises MeshError for what is
    wrong in the configuration, and where none is possible, with reasons."""
    wish = _wish(EVERYTHING if parallel == AUTO else parallel)
    try:
        return choose_hybrid(workload, ranks, machine, wish)
    except MeshError as error:
        raise MeshError(f"parallel={parallel!r}: {error}") from None


def _wish(parallel: Mapping[str, Any]) -> Wish:
    # all that is said must be right, "auto" standing for any number
    parse_parallel(_without(parallel))
    data, pipeline = parallel.get("data"), parallel.get("pipeline", 1)
    data = data if isinstance(data, Mapping) else {"size": data, **({"shard": AUTO} if data == AUTO else {})}
    pipeline = pipeline if isinstance(pipeline, Mapping) else {"size": pipeline}
    open_pipeline = pipeline.get("size", 1) == AUTO
    schedule = pipeline.get("schedule", AUTO if open_pipeline else "1f1b")
    tensor, size = _tensor(parallel.get("tensor"))
    return Wish(
        data=_number(data.get("size")),
        shards=SHARDS if data.get("shard") == AUTO else (data.get("shard"),),
        pipeline=_number(pipeline.get("size", 1) or 1),
        schedules=SCHEDULES if schedule == AUTO else (schedule or "1f1b",),
        microbatches=_number(pipeline.get("microbatches")),
        tensor=tensor,
        size=size,
    )


def _number(given: Any) -> int | None:
    return None if given == AUTO else given


def _tensor(given: Any) -> tuple[dict[str, Any] | None, int | None]:
    """(axes_of's arguments, or None where the mode is open; the size, or None)."""
    if given is None or given == 1:
        return {"mode": None, "size": 1}, 1
    if given == AUTO:
        return None, None
    if not isinstance(given, Mapping) or given.get("mode") != AUTO:
        return {"mode": None, **parse_parallel({"tensor": given})}, None
    others = [name for name in given if name not in ("size", "mode") and given[name] not in (None, False)]
    if others:
        raise MeshError(f"parallel tensor={dict(given)}: mode='auto' chooses {', '.join(others)} itself: leave it out, or name a mode")
    return None, _number(given.get("size"))


def _without(parallel: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with what is left open taken out."""
    found: dict[str, Any] = {}
    for name, given in parallel.items():
        if isinstance(given, Mapping):
            given = {key: value for key, value in given.items() if value != AUTO and not (name == "tensor" and given.get("mode") == AUTO)}
            if name == "tensor" and not given:
                continue
        if given != AUTO:
            found[name] = given
    return found
