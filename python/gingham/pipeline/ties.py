"""Parameters that stages of several pipeline ranks use, an embedding that is also the head: each rank has a copy, all have one gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..mesh import Mesh
from ..mesh.layout import members
from .cut import Part, tied
from .wire import Wire

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


def sum_ties(mesh: Mesh, ties: Ties, place: int, wire: Wire | None, first: int) -> None:
    """Adds up the gradients of parameters that stages of several ranks have, on each of them. first: of the wire's tags for it."""
    assert wire is not None or not ties
    for number, (parameter, places) in enumerate(ties):
        if place not in places:
            continue
        assert wire is not None
        held = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        local = getattr(held, "_local_tensor", held)
        others = [each for each in places if each != place]
        tags = [first + number * mesh.pipeline.size + each for each in range(mesh.pipeline.size)]  # by who sends
        key = "tie", number, local.dtype
        sends = [(local, each, tags[place], key) for each in others]
        begun = wire.exchange(sends, [(each, tags[each], key) for each in others])
        found = {each: wire.wait(message) for each, message in zip(others, begun, strict=True)} | {place: local}
        local.copy_(sum(found[each] for each in sorted(found)))  # type: ignore[arg-type]
        parameter.grad = held
        wire.finish()


def tags_of(ties: Ties, size: int) -> int:
    """How many sum_ties uses on `size` pipeline ranks."""
    return len(ties) * size
