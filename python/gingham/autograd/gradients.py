"""Sums of weight gradients over depth that travel behind the rest of the backward pass.

Where weights are replicated over depth, dW must be summed over it before backward() returns, but nobody reads it until
then. A thread of each rank does the sums, in the order in which the layers ask (the same on every replica), on a
communicator of its own; a callback at the end of the backward pass waits for them. Where something may read or add to
the gradient earlier (.grad is already set, a hook, autograd.grad, a second use) the layer waits for its sum at once: the
same message by the same way, so that a hook may stand on one rank only.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from queue import SimpleQueue
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.hooks import BackwardHook
from torch.utils.weak import WeakIdKeyDictionary

from ..mesh import Mesh
from ..mesh.layout import Names

HEARING = 0.05  # seconds between two looks at the other ranks' news while a sum is waited for


@dataclass
class Pending:
    """A gradient on its way: autograd holds `unsummed`, the thread works on the copy `summed`."""

    weight: torch.Tensor
    unsummed: torch.Tensor
    summed: torch.Tensor
    task: int
    mesh: Mesh
    epoch: int  # of the mesh's program: where memory ran out since, the sum was given up on all ranks
    settled: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def wait(self) -> None:
        while not self.done.wait(HEARING):
            self.mesh.program.hear()
        if self.error is not None:
            raise self.error


class DepthSums:
    """The thread of one mesh and the gradients it has not delivered."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.axis = mesh, mesh.background_axis()
        self.pending: list[Pending] = []
        self._queue: SimpleQueue[Pending | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="gingham depth sums", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            try:
                self.mesh.background.enter(entry.epoch)
                try:
                    self.axis.all_reduce_(entry.summed)
                finally:
                    self.mesh.background.leave()
            except BaseException as error:
                entry.error = error
            entry.done.set()

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _copied(self, weight: torch.Tensor, gradient: torch.Tensor, task: int) -> Pending:
        epoch = self.mesh.program.epoch
        return Pending(weight, gradient, self.mesh.background_empty(gradient).copy_(gradient), task, self.mesh, epoch)

    def sum_now(self, gradient: torch.Tensor) -> None:
        """In place, behind all that was asked for before."""
        entry = self._copied(gradient, gradient, -1)
        self._queue.put(entry)
        entry.wait()
        gradient.copy_(entry.summed)

    def add(self, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if not any(entry.task == task for entry in self.pending):
            callback = partial(self.finish, task)
            weakref.finalize(callback, self._forget, task)  # a backward pass that raises drops it uncalled
            torch.autograd.Variable._execution_engine.queue_callback(callback)
        entry = self._copied(weight, gradient, task)
        self.pending.append(entry)
        self._queue.put(entry)

    def _forget(self, task: int) -> None:
        self.pending = [entry for entry in self.pending if entry.task != task]

    def settle(self, weight: torch.Tensor) -> bool:
        """If a gradient of `weight` is on its way, completes it where autograd holds it; returns whether one was
        (in this pass: every later use of the weight is summed at once too)."""
        mine = [entry for entry in self.pending if entry.weight is weight]
        for entry in mine:
            if not entry.settled:
                entry.wait()
                entry.unsummed.copy_(entry.summed)
                entry.settled = True
        return bool(mine)

    @torch.no_grad()
    def finish(self, task: int) -> None:
        mine = [entry for entry in self.pending if entry.task == task]
        self._forget(task)
        for entry in mine:  # all of them: below this thread may use the axis itself, in the same order on every rank
            entry.wait()
        for entry in mine:
            if entry.settled or entry.weight.grad is None:
                continue
            local = entry.weight.grad._local_tensor  # type: ignore[attr-defined]
            if local.data_ptr() == entry.unsummed.data_ptr():
                local.copy_(entry.summed)
                continue
            # something else was added in: replicas round differently, so one of them speaks for all
            total = local + (entry.summed - entry.unsummed)
            self.axis.broadcast_(total, 0)
            local.copy_(total)


def sums_of(mesh: Mesh) -> DepthSums:
    if mesh.depth_sums is None:
        mesh.depth_sums = DepthSums(mesh)
    return mesh.depth_sums


def may_sum_later(mesh: Mesh, weights: list[torch.Tensor], nodes: list[Any]) -> bool:
    """Whether the sums over depth of these weights' gradients may wait for the end of this backward pass.

    nodes: the autograd nodes that receive the gradients. Gradients of the same weights already under way are completed
    when the answer is no, since autograd will add to them.
    """
    alone = (_accumulates_alone(weight, node) for weight, node in zip(weights, nodes, strict=True))
    free = not _hooked and not torch.is_grad_enabled() and all(alone)
    used = [sums_of(mesh).settle(weight) for weight in weights] if mesh.depth_sums is not None else []
    return free and not any(used)


def has_thread(mesh: Mesh, weights: list[torch.Tensor]) -> bool:
    """Whether the sums over depth of these weights' gradients are a thread's: on a GPU they are queued on a stream and need none,
    those of 16-bit weights are made of wider ones inside the step."""
    if mesh.axis(mesh.axes.depth) is None or not mesh.has_background:
        return False
    return all(weight.dtype in (torch.float32, torch.float64) for weight in weights)


# Backward hooks of modules that live graphs hold: what such a hook reads must be complete. torch makes one object a call
# of a module that has hooks, and tells nobody.
_hooked: WeakSet[BackwardHook] = WeakSet()


def _noting(make: Callable[..., None]) -> Callable[..., None]:
    @wraps(make)
    def make_and_note(self: BackwardHook, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            _hooked.add(self)

    return make_and_note


BackwardHook.__init__ = _noting(BackwardHook.__init__)  # type: ignore[method-assign]


def _accumulates_alone(weight: torch.Tensor, node: Any) -> bool:
    if getattr(node, "variable", None) is not weight:
        return False
    if weight.grad is not None or weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf under torch.autograd.grad
        return False


_inside = WeakIdKeyDictionary()  # parameters in a no_sync block
_owed = WeakIdKeyDictionary()  # parameters whose .grad holds this rank's part of a sum, with the function that makes it


@contextmanager
def no_sync(module: torch.nn.Module) -> Iterator[None]:
    """Gradient accumulation: backward passes inside leave out the sums of parameters' gradients over ranks that hold other
    rows; the first backward pass after it makes them once, over all that has accumulated. Named as
    DistributedDataParallel's; every rank must enter and leave it alike, or all raise MeshError.

        with gingham.no_sync(model):
            for ids, target in micro_batches[:-1]:
                (loss(model(ids), target) / n).backward()
        (loss(model(last_ids), last_target) / n).backward()

    Left out: the sum over depth of the weights of linears and embeddings, and the sums over the row axes of the biases of
    linears and of norms' parameters. Made each time: the reduce-scatter of weights' gradients over the row axes, since a
    rank keeps no more than its block of a gradient and the step adds straight into the owner's; sums of parameters that
    parallelize left whole; everything in compiled graphs. No memory is added. Until that backward pass .grad holds
    parts, which clip_grad_norm_ refuses; zero_grad() drops them.
    """
    entered = [parameter for parameter in module.parameters() if parameter not in _inside]
    for parameter in entered:
        _inside[parameter] = True
    try:
        yield
    finally:
        for parameter in entered:
            del _inside[parameter]


def deferring(parameters: Iterable[torch.Tensor | None]) -> bool:
    """Whether the sum of one of these parameters' gradients is to be left out, or made of more than this gradient."""
    return bool(_inside or _owed) and any(each is not None and (each in _inside or each in _owed) for each in parameters)


def owing(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether a .grad among these is a part of a sum that no_sync left out."""
    return bool(_owed) and any(each in _owed and each.grad is not None for each in parameters)


@torch.no_grad()
def make_sums(parameters: Iterable[torch.Tensor]) -> None:
    """The sums that no_sync left out of these parameters' gradients, now and not in a next backward pass; in their order, which is the
    same on all ranks."""
    for parameter in parameters:
        total = _owed.pop(parameter, None)
        if total is not None and parameter.grad is not None:
            held = getattr(parameter.grad, "_local_tensor", parameter.grad)
            held.copy_(total(held.float() if held.dtype.itemsize == 2 else held.clone(memory_format=torch.contiguous_format)))


def sum_over_depth(mesh: Mesh, gradient: torch.Tensor) -> torch.Tensor:
    """Where weights are replicated over depth; 16-bit parts travel and are added in float32."""
    axis = mesh.axis(mesh.axes.depth)
    if axis is None:
        return gradient
    wide = gradient.float() if gradient.dtype.itemsize == 2 else gradient
    axis.all_reduce_(wide)
    return wide.to(gradient.dtype)


put_off: list[Callable[[], None]] | None = None  # products of weights' gradients of this backward pass, where it is split


@contextmanager
def weights_later() -> Iterator[list[Callable[[], None]]]:
    """Backward passes inside make the gradients of inputs, biases, norms and tables; those of linears' weights are made, and added to
    .grad, by calling the functions of the list."""
    global put_off
    before, put_off = put_off, []
    try:
        yield put_off
    finally:
        put_off = before


def inside_no_sync(parameter: torch.Tensor) -> bool:
    return parameter in _inside


def owe(parameter: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A part of a sum is held back, which total(.grad's own block) makes; settle_owed: it has been made."""
    _owed[parameter] = total


def settle_owed(parameter: torch.Tensor) -> None:
    _owed.pop(parameter, None)


def sum_or_defer(
    mesh: Mesh, names: Names, parameter: torch.Tensor, part: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """total(part), the sum over the axes `names`; inside no_sync the part; after it the total of all parts so far."""
    if parameter not in _inside and parameter not in _owed:
        return total(part)
    held = None if parameter.grad is None else getattr(parameter.grad, "_local_tensor", parameter.grad)
    if parameter in _inside:
        # a gradient that is complete already: one of those who will be summed keeps it
        if parameter not in _owed and held is not None and any(mesh.coordinates[name] for name in names):
            held.zero_()
        _owed[parameter] = total
        return part
    del _owed[parameter]
    if held is not None:
        part = part + held
        held.zero_()  # autograd adds the total to it
    return total(part)
