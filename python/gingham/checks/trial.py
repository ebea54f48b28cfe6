"""An operation that no rule names is tried: on copies of its arguments, of which some elements along a cut dim are changed.

On a block it is right if each element of the result comes of one index along the cut dim and all indices are treated
alike: then the ranks' results are the parts of the job's. Two halves of the indices are changed apart; an element of the
result that changes with both mixes them (a distance, a convolution, a sum), and one order of the indices for another must
give the result in that order (a triangle and a fill by index do not). What no change reaches stays unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..mesh.layout import Names
from .rules import SCRAMBLED, After, Unknown, Wrong, described, is_checked, name_of, plain_parameters
from .rules import random as random_rule

Change = Callable[[torch.Tensor, int], torch.Tensor]  # of a block and the dim that is cut
Leaves = list[torch.Tensor]


def tried(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """A rule for any operation. Raises Unknown where a trial does not tell."""
    name = name_of(func)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    blocks = [x for x in leaves if is_checked(x)]
    units = list(dict.fromkeys(names for x in blocks for names in x.cuts if names))
    if not units or any(x.is_meta for x in blocks) or str(getattr(func, "__module__", "")).startswith("torch.distributed"):
        raise Unknown(name)
    if any(x.partial for x in blocks):
        part = next(x for x in blocks if x.partial)
        raise Wrong(f"{name} of this rank's part of a sum over {', '.join(part.partial)}", "gather first, then sum")
    plain_parameters(max(blocks, key=lambda x: sum(map(bool, x.cuts))), leaves, name)
    trial = _Trial(func, leaves, spec)
    with trial.kept():
        before, drew = trial.run(None, ())
        if drew:
            return random_rule(func, (blocks[0],), {})
        cuts: list[list[Names]] = [[()] * y.dim() for y in before]
        seen = [trial.places(unit, before) for unit in units]
    if not any(place for found in seen for place in found):
        raise Unknown(name)
    for unit, found in zip(units, seen, strict=True):
        for dims, place in zip(cuts, found, strict=True):
            for dim, aligned in place:
                rows = set(unit) <= set(blocks[0].checks.mesh.outer.rows)
                dims[dim] = SCRAMBLED if dims[dim] or len(place) > 1 or not (aligned or rows) else unit
    checks, marks = blocks[0].checks, iter(cuts)

    def marked(y: torch.Tensor) -> Any:
        return y if is_checked(y) else checks.marked(y, tuple(next(marks, ((),) * y.dim())))

    def after(result: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, marked, result)

    return after


class _Trial:
    """Calls of one operation on copies of its arguments."""

    def __init__(self, func: Any, leaves: list[Any], spec: Any) -> None:
        self.func, self.leaves, self.spec, self.name = func, leaves, spec, name_of(func)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Generators are put back; what the operation itself says of its arguments is left to the real call."""
        state = torch.get_rng_state()
        try:
            with torch.no_grad():
                yield
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError) as error:
            raise Unknown(self.name) from error
        finally:
            torch.set_rng_state(state)

    def run(self, change: Change | None, unit: Names) -> tuple[Leaves, bool]:
        """The tensors that come out, also by way of an argument, and whether random numbers were drawn."""
        copies = [self._copy(x, change, unit) for x in self.leaves]
        versions = [x._version if isinstance(x, torch.Tensor) else 0 for x in copies]
        args, kwargs = pytree.tree_unflatten(copies, self.spec)
        state = torch.get_rng_state()
        result = self.func(*args, **kwargs)
        drew = not torch.equal(state, torch.get_rng_state())
        torch.set_rng_state(state)
        found = [y for y in pytree.tree_leaves(result) if isinstance(y, torch.Tensor)]
        changed = [x for x, version in zip(copies, versions, strict=True) if isinstance(x, torch.Tensor) and x._version != version]
        return found + [x for x in changed if all(x is not y for y in found)], drew

    def _copy(self, x: Any, change: Change | None, unit: Names) -> Any:
        copied = x.detach().clone() if isinstance(x, torch.Tensor) else x
        if change is not None and is_checked(x) and unit in x.cuts and (x.is_floating_point() or not self._has_numbers()):
            copied = change(copied, x.cuts.index(unit))
        return copied

    def _has_numbers(self) -> bool:
        return any(is_checked(x) and x.is_floating_point() for x in self.leaves)

    def places(self, unit: Names, before: Leaves) -> list[list[tuple[int, bool]]]:
        """Of each result, the dims along which the unit's cut lies now, and whether index by index. Raises Wrong."""
        sizes = {x.shape[x.cuts.index(unit)] for x in self.leaves if is_checked(x) and unit in x.cuts}
        if len(sizes) != 1 or min(sizes) < 2:
            raise Unknown(self.name)
        (one, _), (other, _) = self.run(_changed(0), unit), self.run(_changed(1), unit)
        found = []
        for y, *others in zip(before, one, other, strict=True):
            marks = [_differs(y, other) for other in others]
            if y.dim() == 0 and any(mark.any() for mark in marks) or bool((marks[0] & marks[1]).any()):
                raise self._wrong(unit, "puts together what lies on several ranks along a dim that they cut")
            found.append(_dims(marks, min(sizes)))
        self._check_order(unit, before, found)
        return found

    def _check_order(self, unit: Names, before: Leaves, found: list[list[tuple[int, bool]]]) -> None:
        """Whether all indices are treated alike; plain tensors would have to be in the new order too, if they are blocks."""
        if any(isinstance(x, torch.Tensor) and not is_checked(x) and x.numel() > 1 for x in self.leaves):
            return
        rolled, _ = self.run(lambda x, dim: x.roll(1, dim), unit)
        for y, other, place in zip(before, rolled, found, strict=True):
            if len(place) == 1 and place[0][1] and bool(_differs(y.roll(1, place[0][0]), other).any()):
                raise self._wrong(unit, "goes by the index along a dim that ranks cut, which counts from 0 on every rank")

    def _wrong(self, unit: Names, words: str) -> Wrong:
        x = next(x for x in self.leaves if is_checked(x) and unit in x.cuts)
        return Wrong(f"{self.name} {words}: {described(x)}", "give it mesh.gather(x), or a layout in which that dim is whole")


def _odd(size: int, device: torch.device) -> torch.Tensor:
    """Half of the indices, which no shift maps onto each other: those with an odd number of ones in binary."""
    return torch.tensor([bin(index).count("1") % 2 for index in range(size)], dtype=torch.bool, device=device)


def _changed(group: int) -> Change:
    """The indices of one group have other values along the dim: those before them, floating point ones a little larger."""

    def change(x: torch.Tensor, dim: int) -> torch.Tensor:
        here = (_odd(x.shape[dim], x.device) == bool(group)).nonzero().flatten()
        new = x.roll(1, dim).index_select(dim, here)
        if x.is_floating_point():
            numbers = torch.arange(new.numel(), dtype=torch.float64, device=x.device).view(new.shape)
            new = new * (1.05 + 0.2 * (numbers * 0.6180339887).frac()).to(x.dtype)
        return x.index_copy(dim, here, new)

    return change


def _differs(y: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if y.shape != other.shape:
        raise Unknown("a result whose shape goes by values")
    return (y != other) & ~(y.isnan() & other.isnan())


def _dims(marks: Leaves, size: int) -> list[tuple[int, bool]]:
    """The dims along which the results of the two groups lie apart, and whether index by index of `size`; all dims where they lie apart
    along none."""
    if not (marks[0].any() or marks[1].any()):
        return []
    found = []
    odd = _odd(size, marks[0].device)
    for dim in range(marks[0].dim()):
        one, other = (mark.movedim(dim, 0).reshape(mark.shape[dim], -1).any(1) for mark in marks)
        if not (one & other).any():
            aligned = len(one) == size and not one[odd].any() and not other[~odd].any()
            found.append((dim, bool(aligned)))
    return [each for each in found if each[1]] or found or [(dim, False) for dim in range(marks[0].dim())]
