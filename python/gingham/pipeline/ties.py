"""Parameters that stages of several pipeline ranks use, an embedding that is also the head: each rank has a copy, all have one gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..mesh import Mesh
from ..mesh.layout import members
from .cut import Part, tied
from .wire import Wire

TAG = (1 << 30) + 1

Ties = Sequence[tuple[torch.nn.Parameter, list[int]]]


def line_of(mesh: Mesh) -> list[int]:
    """The job's ranks at this one's place in each stage mesh."""
    whole = mesh.whole
    assert whole is not None
    return [whole.ranks[each] for each in members(("pipeline",), whole.sizes, whole.coordinates)]


def ties_of(stages: Sequence[Sequence[Part]], place_of: Sequence[int], place: int) -> list[tuple[torch.nn.Parameter, list[int]]]:
    """Parameters that stages of several pipeline ranks use, and those ranks; all but the first mark theirs as a copy."""
    found = []
    for parameter, users in tied(stages):
        places = list(dict.fromkeys(place_of[stage] for stage in users))
        if len(places) > 1:
            found.append((parameter, places))
            if place != places[0]:
                parameter.tied_to_earlier_stage = True  # type: ignore[attr-defined]
    return found


def sum_ties(mesh: Mesh, ties: Ties, place: int, wire: Wire | None) -> None:
    """Adds up the gradients of parameters that stages of several ranks have, on each of them."""
    assert wire is not None or not ties
    line = line_of(mesh) if ties else []
    for parameter, places in ties:
        if place not in places:
            continue
        held = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        local = getattr(held, "_local_tensor", held)
        mine, others = local.clone(), [each for each in places if each != place]
        found = {each: torch.empty_like(mine) for each in others}
        works = [dist.isend(mine, line[each], tag=TAG) for each in others]
        works += [dist.irecv(found[each], line[each], tag=TAG) for each in others]
        assert wire is not None
        for work, each in zip(works, others * 2, strict=True):
            wire._wait(work, each)
        found[place] = mine
        local.copy_(sum(found[each] for each in sorted(found)))  # type: ignore[arg-type]
        parameter.grad = held
        for each in others:
            wire.count(each, mine, mine)
