"""The first step is checked: tensors say how they are cut, and an operation that is wrong on a block is an error with its line.

scatter hands out `Checked` tensors and layers pass them on, until the first backward pass is over (or, where none comes,
scatter is called from the same place again after layers used what it gave, or eight times; if nothing in between had a
gradient, it was an evaluation, and the check only rests until scatter is called from a new place with gradients). Each of torch's
operations on them goes by a rule (table): elementwise ones keep the cuts, views move them, a sum over a cut dim is a
part, and what would give this rank's answer instead of the job's is a LayoutError. After that plain tensors flow and
nothing is paid.

    GINGHAM_CHECK=0 never, =1 always; torch.compile switches it off.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import LayoutError
from ..mesh import Mesh
from ..mesh.checksums import checksum
from ..mesh.layout import Cuts, Layout, Names, coordinates_of, odd_ranks, words
from .notes import Notes
from .rules import After, Unknown, Wrong
from .table import rule_of
from .trial import tried

log = logging.getLogger("gingham")

OURS, TORCH = str(Path(__file__).parent.parent), str(Path(torch.__file__).parent)
BATCH = 8  # tensors that one loop over scatter hands out in a step, at most, as far as the check can tell
_compiled = False  # torch.compile was called in this process
_running: weakref.WeakSet[Checks] = weakref.WeakSet()  # those of every mesh
_plain_of = WeakTensorKeyDictionary()  # of a plain tensor, the Checked one that it is a view of


class Checked(torch.Tensor):
    """A block with its cuts, one tuple of axes a dim; partial: the axes over which it is a part of a sum."""

    cuts: Cuts
    partial: Names
    checks: Checks
    checks_operations = True  # by which backward passes know the class

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        text = repr(_as_plain(self))
        return f"{text} (this rank's part of a sum over {said(self.partial)})" if self.partial and self.checks.on else text

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.checks.marked(copy.deepcopy(_as_plain(self), memo), self.cuts, self.partial)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _as_plain(self).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Checked)]
        with torch._C.DisableTorchFunctionSubclass():
            if not leaves or not leaves[0].checks.on:
                return plain(func(*plain(args), **plain(kwargs))) if leaves and not _in_place(func) else func(*args, **kwargs)
            checks = leaves[0].checks
            try:
                after = _followed(func, args, kwargs)
            except Wrong as wrong:
                raise checks.error(wrong) from None
            except Unknown as unknown:
                checks.leave(f"{getattr(func, '__name__', func)} ({unknown})")
                return func(*args, **kwargs)
            result = func(*args, **kwargs)
            return after(result) if after is not None else result


def _followed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """By its rule, or by a trial where it has none or its arguments come in an order that the rule does not know."""
    try:
        return rule_of(func)(func, args, kwargs)
    except (Unknown, AttributeError, LookupError, TypeError, ValueError):
        return tried(func, args, kwargs)


def _in_place(func: Any) -> bool:
    return getattr(func, "__name__", "").strip("_") != getattr(func, "__name__", "").lstrip("_") or func is torch.Tensor.requires_grad_


def plain(value: Any) -> Any:
    """With every Checked tensor as the plain one that it is."""
    return pytree.tree_map_only(Checked, _as_plain, value)


def _as_plain(x: Checked) -> torch.Tensor:
    """A view of x, which x must not keep: it keeps x."""
    with torch._C.DisableTorchFunctionSubclass():
        made = x.as_subclass(torch.Tensor)
    _plain_of[made] = weakref.ref(x)
    return made


def origin(x: torch.Tensor) -> torch.Tensor:
    """The Checked tensor that x is the plain one of, else x: the same for all who were given it."""
    made_of = _plain_of.get(x)
    found = None if made_of is None else made_of()
    return x if found is None else found


class Checks:
    """Of one mesh: whether the step is still checked, and what to say when something is wrong."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.always = os.environ.get("GINGHAM_CHECK", "") == "1"
        self.on, self.ending = True, False
        # where scatter was called from: how many blocks layers had used by then, how many results had gradients, and how often
        self.places: dict[Any, tuple[int, int, int]] = {}
        self.uses = self.gradients = 0
        self.made = WeakTensorKeyDictionary()  # Checked ones, which are plain again when the check ends
        self.calls: dict[Any, tuple[Any, int]] = {}  # the block that a layer took where it was called; results with gradients by then
        self.told: set[str] = set()
        self.notes = Notes()
        _running.add(self)

    def marked(self, x: Any, cuts: Cuts, partial: Names = (), fresh: bool = False) -> Any:
        """x as a Checked tensor. fresh: nobody else has x, which becomes one itself; as_subclass would make a view of it."""
        if not isinstance(x, torch.Tensor):
            return x
        if len(cuts) != x.dim():
            self.leave(f"an operation with a result of shape {tuple(x.shape)}")
            return plain(x)
        fresh = fresh and type(x) is torch.Tensor and x not in _plain_of
        made: Any = x if fresh or isinstance(x, Checked) else x.as_subclass(Checked)
        made.cuts, made.partial, made.checks = cuts, partial, self
        if fresh:
            made.__class__ = Checked
        self.made[made] = None
        return made

    def hand_out(self, block: torch.Tensor, cuts: Cuts) -> torch.Tensor:
        """For scatter."""
        if _compiled or torch.compiler.is_compiling():
            self.end()
            return block
        if self.mesh.job.orphaned:  # a data loader's worker: the ranks of the job know nothing of it
            return block
        if not self.on and not torch.is_grad_enabled():
            return block
        place = _place()
        if not self.on and place in self.places:
            return block
        self.on = True
        uses, gradients, visits = self.places.get(place, (self.uses, self.gradients, 0))
        if visits:
            self.compare()
        if self.uses > uses or visits + 1 >= BATCH:  # the second time round, not the next tensor of one batch
            self.end(rest=self.gradients == gradients)
        self.places[place] = self.uses, self.gradients, visits + 1
        return self.marked(block, cuts) if self.on else block

    def alike(self, x: torch.Tensor, own: bool = False) -> None:
        """With GINGHAM_CHECK=1: whether every rank (own: of this data rank) scatters the same values."""
        if not self.always or torch.compiler.is_compiling():
            return
        words = f"{tuple(x.shape)} {x.dtype}".encode()
        sums = [each for (each,) in self.mesh.world.sizes([checksum(x, crc32(words))])]
        places = [coordinates_of(index, self.mesh.sizes).get("data", 0) * own for index in range(self.mesh.size)]
        odd = []
        for data in sorted(set(places)):
            near = [at for at, place in enumerate(places) if place == data]
            odd += odd_ranks([sums[at] for at in near], [self.mesh.ranks[at] for at in near])[0]
        if odd:
            others = "the others of their data rank" if own else "the others"
            raise self.error(
                Wrong(
                    f"scatter got a tensor {tuple(x.shape)} whose values on ranks {odd} are not those of {others}",
                    "give every rank the same full tensor: seed generators and samplers alike",
                )
            )

    def again(self, what: Any, x: torch.Tensor) -> bool:
        """Whether the very same call was made before: a loop over one forward pass, which ends the check or lets it rest. what: the
        layer, or the other operand."""
        place = (*_place(), id(what))
        known, gradients = self.calls.get(place, (None, 0))
        self.calls[place] = weakref.ref(x), self.gradients
        if known is None or known() is not x:
            return False
        self.compare()
        self.end(rest=self.gradients == gradients)
        return not self.on

    def take(self, x: Any, cuts: Cuts | None, what: str, fix: str = "") -> Any:
        """The plain tensor, if it is cut as `what` expects; None: any cuts."""
        if not isinstance(x, Checked):
            return x
        self.uses += 1
        if x.partial and self.on:
            raise self.error(Wrong(f"{what} got this rank's part of a sum over {said(x.partial)}", "gather first, then sum"))
        if cuts is not None and x.cuts != cuts and self.on:
            raise self.error(
                Wrong(
                    f"{what} got a tensor {tuple(x.shape)} cut {words(x.cuts)}, expected it cut {words(cuts)}",
                    fix or "use the layout that the layer before gives, or mesh.gather and mesh.scatter between them",
                )
            )
        return _as_plain(x)

    def give(self, y: Any, cuts: Cuts) -> Any:
        """What a function of ours returns."""
        if not self.on or not isinstance(y, torch.Tensor):
            return y
        made = self.marked(y, cuts, fresh=True)
        if made.requires_grad:
            self.gradients += 1
            with torch._C.DisableTorchFunctionSubclass():
                made.register_hook(self._end_with_backward)
        return made

    def give_own(self, full: Any, cuts: Cuts) -> Any:
        """What gather returns of one data rank's rows, which are a block of the job's: a loss of theirs that trains is a part of a sum."""
        held: Cuts = tuple(tuple(name for name in names if name == "data") for names in cuts)
        return self.give(full, held) if any(held) and full.requires_grad else full

    def take_full(self, x: Any, own: bool) -> Any:
        """For scatter, whose own rows may be those that gather gave."""
        given = own and isinstance(x, Checked) and all(names in ((), ("data",)) for names in x.cuts)
        return self.take(x, None if given else ((),) * x.dim(), "scatter", "scatter takes the full tensor, the same on every rank")

    def _end_with_backward(self, gradient: torch.Tensor) -> None:
        if self.on and not self.ending:
            self.ending = True
            self.compare()
            torch.autograd.Variable._execution_engine.queue_callback(self.end)

    def compare(self) -> None:
        """What met blocks since the last time, with the other ranks."""
        found = self.notes.compare(self.mesh)
        if found is not None:
            raise self.error(*found)

    def end(self, rest: bool = False) -> None:
        """From here on plain tensors. rest: until a program that has only evaluated so far trains."""
        self.ending = False
        if not self.always or _compiled:
            self.on = False
            for made in list(self.made):
                made.__class__ = torch.Tensor
            self.made.clear()
            self.calls.clear()
            if not rest:
                self.mesh.checks = None
                _running.discard(self)

    def note_plain(self, plain: torch.Tensor, dim: int, unit: Names, words: str) -> None:
        self.notes.apart(plain, dim, unit, words, here())

    def note_random(self, name: str) -> None:
        self.notes.alike(name, here())

    def leave(self, what: str) -> None:
        """Says once that an operation is not followed."""
        if what not in self.told:
            self.told.add(what)
            file, line = here()
            log.info("checked mode does not follow %s (%s:%d); what comes of it is not checked", what, file, line)

    def error(self, wrong: Wrong, site: tuple[str, int] | None = None) -> LayoutError:
        file, line = site or here()
        return LayoutError(f"rank {self.mesh.rank}: {file}:{line}: {wrong.what}. {wrong.fix[:1].upper()}{wrong.fix[1:]}.")


def _place() -> tuple[tuple[int, int], ...]:
    """The calls that led here, each by its instruction: what a loop comes back to, not another call on the same line."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


def here() -> tuple[str, int]:
    """The innermost line that is neither ours nor torch's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((OURS, TORCH, "<frozen")):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def said(names: Names) -> str:
    return ", ".join(names)


def layer_forward(forward: Callable[..., Any], profiled: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A layer's forward that takes Checked tensors and gives them while the step is checked. profiled: the forward that torch.profiler
    sees."""

    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        region = self._region
        if region is not None and region.within is None:
            return region.alone(call, self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        within = vars(self).get("_only_within")  # of a model with io="full" (convert/calls.py)
        if within is not None:
            within(self)
        run = profiled if profiled is not None and torch.autograd._profiler_enabled() else forward
        checks = None if self.mesh is None else self.mesh.checks
        for x in (*args, *kwargs.values()) if kwargs else args:
            if type(x) is not torch.Tensor and isinstance(x, Checked):
                return _checked(checks, run, self, args, kwargs)
        return run(self, *args, **kwargs)

    return call


def _checked(checks: Checks | None, run: Callable[..., Any], layer: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A forward on blocks of which one at least is Checked."""
    x = args[0] if args else kwargs.get("x")
    if checks is None or isinstance(x, Checked) and checks.again(layer, x):
        return run(layer, *plain(args), **plain(kwargs))
    ends = layer.ends(x) if isinstance(x, Checked) else None
    if ends is not None and isinstance(x, Checked):
        checks.take(x, ends[0], type(layer).__name__)
    checks.uses += 1
    y = run(layer, *plain(args), **plain(kwargs))
    if ends is None:
        return y
    if isinstance(y, tuple):
        return checks.give(y[0], ends[1]), *y[1:]
    return checks.give(y, ends[1])


def cuts_of_block(layout: Layout, ndim: int, dim: int = 0) -> Cuts:
    """Of an activation in a layout; one of a single dim has features only."""
    return (layout.features,) if ndim == 1 else layout.cuts(ndim, dim)


def row_dim(x: Any, layout: Layout, ids: bool = False) -> int:
    """Where the rows of a block lie, for layers that do the same with each row: along dim 1 where axes cut a sequence there, else dim 0."""
    if not isinstance(x, Checked) or layout.time or not layout.rows or x.dim() < (2 if ids else 3):
        return 0
    return int(x.cuts == layout.cuts(x.dim(), 1, ids))


def install(mesh: Mesh) -> None:
    """For init."""
    if os.environ.get("GINGHAM_CHECK", "") != "0" and mesh.size > 1 and not _compiled:
        mesh.checks = Checks(mesh)


def _noting(compile: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(compile)
    def compile_and_note(*args: Any, **kwargs: Any) -> Any:
        global _compiled
        if not _compiled:
            _compiled = True
            log.info("torch.compile was called: the first step is not checked")
        for checks in list(_running):  # blocks that were handed out before: a graph takes plain tensors only
            checks.end()
        return compile(*args, **kwargs)

    return compile_and_note


torch.compile = _noting(torch.compile)  # type: ignore[assignment]
