"""What a converted model takes beside its input: masks of padding, positions, types of tokens, of one micro-batch at a time.

Every stage is given the whole batch's, as it is given x (every rank loads the batch anyway), and cuts its micro-batch's rows: nothing of
them crosses a border. Example: attention_mask [16, 12] in 4 micro-batches on 2 ranks that cut rows: [2, 12] beside each [2, 12, width].
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import ShapeError
from ..mesh import Mesh
from ..nn.sequence import first_of_piece

MASK, POSITIONS, TYPES = "attention_mask", "position_ids", "token_type_ids"


class Given:
    """now: this rank's parts of the current micro-batch's, by name; {} outside of a step and where nothing was given."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.now: dict[str, torch.Tensor] = {}

    def positions(self, x: torch.Tensor) -> torch.Tensor:
        """[rows or 1, time here], for ids or activations [rows, time here, ..]."""
        found = self.now.get(POSITIONS)
        if found is not None:
            return found
        start = first_of_piece(self.mesh, x.shape[1])
        return torch.arange(start, start + x.shape[1], device=x.device).unsqueeze(0)

    def mask(self, base: Any, x: torch.Tensor, causal: bool) -> torch.Tensor | None:
        """What the layers of a base model of transformers take as their attention_mask, as its own forward makes it; x: activations."""
        mask = self.now.get(MASK)
        # positions that begin anew are texts packed into one row; transformers looks for them where it makes no cache
        positions = self.now.get(POSITIONS) if causal and not base.config.use_cache else None
        if mask is None and positions is None:
            return None
        if mask is not None and self.mesh.outer.time:
            return mask
        make = getattr(sys.modules[_origin(type(base)).__module__], "create_causal_mask" if causal else "create_bidirectional_mask")
        named = dict(config=base.config, inputs_embeds=x, input_embeds=x, attention_mask=mask, cache=None, past_key_values=None)
        named |= dict(position_ids=positions, cache_position=torch.arange(x.shape[1], device=x.device))
        known = inspect.signature(make).parameters
        return make(**{name: value for name, value in named.items() if name in known})  # type: ignore[no-any-return]


def _origin(cls: type) -> type:
    """The class of transformers that a converted model's is made of."""
    return next(each for each in cls.__mro__ if each.__module__.startswith("transformers."))


def check(what: str, mesh: Mesh, x: torch.Tensor, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises TypeError for what a model does not take in a pipeline, ShapeError where it does not fit x."""
    for name, each in given.items():
        if name not in known:
            takes = f"x, labels{''.join(f', {name}' for name in known)}" if known else "x and labels alone"
            raise TypeError(f"step: rank {mesh.rank} got {name}=, which a {what} in a pipeline does not take; it takes {takes}")
        rows, time = x.shape[:2]
        fitting: list[tuple[int, ...]] = [(rows, time)]
        fitting += [(1, time)] if name == POSITIONS else [(rows, 1, time, time)] if name == MASK else []
        if not isinstance(each, torch.Tensor) or tuple(each.shape) not in fitting:
            got = tuple(each.shape) if isinstance(each, torch.Tensor) else type(each).__name__
            raise ShapeError(
                f"step: rank {mesh.rank} got {name} {got} beside x {tuple(x.shape)}, expected {' or '.join(map(str, fitting))}"
            )


def split(given: Mapping[str, torch.Tensor], rows: int, parts: int) -> list[dict[str, torch.Tensor]]:
    """By micro-batch; what has one row for all samples is every micro-batch's."""
    cut = {name: x.tensor_split(parts) if len(x) == rows else (x,) * parts for name, x in given.items()}
    return [{name: pieces[part] for name, pieces in cut.items()} for part in range(parts)]


def cut(mesh: Mesh, given: Mapping[str, torch.Tensor], rows: int, samples: Sequence[str]) -> dict[str, torch.Tensor]:
    """This rank's part of a micro-batch's of so many rows, which the axes `samples` cut."""
    return {name: _cut(mesh, name, x if len(x) != rows else x.narrow(0, *mesh.interval(rows, tuple(samples)))) for name, x in given.items()}


def _cut(mesh: Mesh, name: str, mine: torch.Tensor) -> torch.Tensor:
    """Of this rank's rows its piece of the sequence; of masks the queries', in the form that attention over cut sequences takes."""
    if not mesh.outer.time:
        return mine
    piece = mesh.interval(mine.shape[-1], mesh.outer.time)
    if name != MASK:
        return mine.narrow(-1, *piece)
    if mine.dim() == 2:
        return mine.bool()[:, None, None, :]  # of keys, which all queries see
    found = mine.narrow(2, *piece)
    found.of_queries = True  # type: ignore[attr-defined]
    return found
