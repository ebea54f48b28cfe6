"""Sums of gradients over ranks that travel behind the rest of the backward pass.

Where weights are replicated over depth, dW must be summed over it before backward() returns, but nobody reads it until then; where the
mesh lies on several hosts, the same holds for the gradients of biases, norms and tables, each of whose sums would wait for the network. A
thread of each rank makes the sums, in the order in which the layers ask (the same on every rank), in a program of its own. Autograd gets
no gradient of such a parameter; a callback at the end of the backward pass waits for the sums and adds them to .grad. Where something may
read the gradient earlier (a hook, autograd.grad) the layer waits for its sum at once: the same message by the same way, so that a hook may
stand on one rank only.

On a GPU there is no thread: the sums are queued on a stream beside the one that computes, by the mesh's own axes, in the same order.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from queue import Empty, SimpleQueue
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.hooks import BackwardHook

from .. import native
from ..mesh import Mesh
from ..mesh.layout import Names, chunks
from .casts import like

AxisOf = Callable[[Names], native.Axis | None]
Work = Callable[[AxisOf, torch.Tensor], torch.Tensor]  # part -> sum, by the axes of whichever program makes it
LOOKING = 0.05  # seconds between two looks at whether another rank waits for a sum that is kept back
HEARING = 0.05  # seconds between two looks at the other ranks' news while a sum is waited for


@dataclass
class Pending:
    """A sum on its way. parameters: whose gradient it is, row by row where they are several; none: somebody waits for it."""

    parameters: Sequence[Any]
    total: torch.Tensor
    work: Work
    label: str
    task: int
    epoch: int  # of the mesh's program: where memory ran out since, the sum was given up on all ranks
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Sums:
    """The gradients of one mesh that have not been delivered. How their sums are made: _give, all that was given up to `last` at once
    (_let_go), and _wait."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.pending: list[Pending] = []

    def now(self, part: torch.Tensor, work: Work, label: str) -> torch.Tensor:
        """The sum, behind all that was asked for before."""
        entry = Pending((), part, work, label, -1, self.mesh.program.epoch)
        self._let_go(entry)
        return self._wait(entry)

    def later(self, parameters: Sequence[torch.Tensor], part: torch.Tensor, work: Work, label: str) -> None:
        task = torch._C._current_graph_task_id()
        if not any(entry.task == task for entry in self.pending):
            callback = partial(self._deliver, task)
            weakref.finalize(callback, self._forget, task)  # a backward pass that raises drops it uncalled
            torch.autograd.Variable._execution_engine.queue_callback(callback)
        entry = Pending(parameters, part, work, label, task, self.mesh.program.epoch)
        self.pending.append(entry)
        self._give(entry)

    def stop(self) -> None:
        """The mesh ends."""

    def expect(self, parameters: Sequence[Any]) -> None:
        """The sum of these parameters' gradients is asked for next."""

    def _give(self, entry: Pending) -> None:
        self._let_go(entry)

    def _let_go(self, *last: Pending) -> None:
        raise NotImplementedError

    def _wait(self, entry: Pending) -> torch.Tensor:
        raise NotImplementedError

    def _forget(self, task: int) -> None:
        self.pending = [entry for entry in self.pending if entry.task != task]

    @torch.no_grad()
    def _deliver(self, task: int) -> None:
        mine = [entry for entry in self.pending if entry.task == task]
        self._let_go()
        for entry in reversed(mine):  # the last first, so that this thread wakes once
            self._wait(entry)
        self._forget(task)
        for entry in mine:
            whole, several = self._wait(entry), len(entry.parameters) > 1
            for parameter, total in zip(entry.parameters, whole.unbind() if several else [whole], strict=True):
                if parameter.grad is not None:
                    getattr(parameter.grad, "_local_tensor", parameter.grad).add_(total)
                    continue
                parameter.grad = like(total if total.dtype == parameter.dtype else total.to(parameter.dtype), parameter)


class ThreadSums(Sums):
    """Those of a thread."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self._kept_back: list[Pending] = []
        self._at_once = bool(mesh.program.spans) or has_idle_cores(mesh)
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Pending | str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="gingham sums", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        program = self.mesh.background
        while True:
            try:
                entry = self._queue.get(timeout=LOOKING if self._kept_back else None)
            except Empty:
                if program.awaited:
                    self._at_once = True  # a rank that reads its gradients in between is likely to go on doing so
                    self._let_go()
                continue
            if entry is None:
                return
            if isinstance(entry, str):
                continue
            try:
                program.enter(entry.epoch)
                try:
                    program.say(native.Label(entry.label))
                    with torch.inference_mode(False), torch.no_grad():
                        entry.total = entry.work(self.mesh.background_axis, entry.total)
                finally:
                    program.leave()
            except BaseException as error:
                entry.error = error
            entry.done.set()

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _wait(self, entry: Pending) -> torch.Tensor:
        while not entry.done.wait(HEARING):
            self.mesh.program.hear()
        if entry.error is not None:
            raise entry.error
        return entry.total

    def _let_go(self, *last: Pending) -> None:
        """Gives the thread what was kept back, in its order."""
        with self._lock:
            for entry in (*self._kept_back, *last):
                self._queue.put(entry)
            self._kept_back.clear()

    def _give(self, entry: Pending) -> None:
        if self._at_once:
            return self._let_go(entry)
        with self._lock:
            self._kept_back.append(entry)
            if len(self._kept_back) == 1:
                self._queue.put("look")  # from now on, whether another rank waits
        return None


class StreamSums(Sums):
    """Those of a GPU, queued on a stream of their own. An entry keeps its tensor until the caller's stream waits for them: its memory is
    the caller's stream's, which would use it again.

    Messages leave a rank in one order. A sum that was queued as soon as its layer has made its part would hold back the messages of the
    next layer, whose products wait for them; nobody waits for the sum. So it is queued behind the next layer's call, though not behind
    its kernels: its stream follows a mark that was made before them. This changes the order of messages, which must be one on all ranks,
    whereas a hook, which needs the sum at once, may stand on one rank only. Hence the ranks say once a pass whether any of the parameters
    whose sums have been asked for before has a hook, and a parameter that is new is summed at once. A hook that one rank sets within the
    pass is named as a disagreement."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self._stream_known: Any = None
        self._task, self._in_turn = -1, False
        self._asked: dict[int, Any] = {}  # parameters whose sums have been asked for, weakly
        self._new: list[Any] = []  # of those asked for now, the ones that have not been before
        self._marked: list[tuple[Pending, int]] = []

    def expect(self, parameters: Sequence[Any]) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            known = [parameter for each in self._asked.values() if (parameter := each()) is not None]
            quiet = bool(known) and not _hooked and not any(map(_is_hooked, known))
            self._task, self._in_turn = task, all(bit for (bit,) in self.mesh.world.sizes([int(quiet)]))
        self._new = [each for each in parameters if (asked := self._asked.get(id(each))) is None or asked() is not each]
        self._asked |= {id(parameter): weakref.ref(parameter) for parameter in self._new}

    def _give(self, entry: Pending) -> None:
        if not self._in_turn or self._new:
            return self._let_go(entry)
        before, self._marked = self._marked, [(entry, self.mesh.program.job.mark())]
        self._queue(before)
        return None

    def _let_go(self, *last: Pending) -> None:
        before, self._marked = self._marked, []
        self._queue([*before, *((entry, 0) for entry in last)])

    def _queue(self, entries: Sequence[tuple[Pending, int]]) -> None:
        job = self.mesh.program.job
        for entry, mark in entries:
            self.mesh.say(entry.label)
            part, beside = entry.total, job.beside(mark)
            try:
                with nullcontext() if job.on_host else torch.cuda.stream(self._stream(beside)):
                    entry.total = entry.work(self.mesh.axis, part)
            finally:
                job.back()
            if entry.total is not part and not job.on_host:  # each is memory of one stream's, and the other uses it
                entry.total.record_stream(torch.cuda.current_stream())
                part.record_stream(self._stream(beside))

    def _stream(self, number: int) -> Any:
        """Torch's of that number: workspace is torch's, whose memory is used again in the order of its current stream."""
        if self._stream_known is None or self._stream_known.cuda_stream != number:
            self._stream_known = torch.cuda.ExternalStream(number, device=self.mesh.device)
        return self._stream_known

    def _wait(self, entry: Pending) -> torch.Tensor:
        self.mesh.program.job.join()
        return entry.total

    def _forget(self, task: int) -> None:
        if any(entry.task == task for entry in self.pending):
            self._marked = [each for each in self._marked if each[0].task != task]  # of a pass that raised
            self.mesh.program.job.join()
        super()._forget(task)


def has_idle_cores(mesh: Mesh) -> bool:
    """Whether a host that has all the ranks has cores for their threads beside those that compute. Where it has not, sums behind a backward
    pass take time from it and wait for their turns on the cores: they are made at its end, when nothing else is done."""
    return len(os.sched_getaffinity(0)) >= mesh.job.size * (torch.get_num_threads() + 1)


def sums_of(mesh: Mesh) -> Sums:
    if mesh.sums is None:
        mesh.sums = StreamSums(mesh) if mesh.program.job.has_gpu else ThreadSums(mesh)
    return mesh.sums  # type: ignore[no-any-return]


def summed(mesh: Mesh, parameters: Sequence[Any], nodes: Sequence[Any], part: torch.Tensor, work: Work, label: str) -> torch.Tensor | None:
    """The sum over ranks of a part of a parameter's gradient, or of several as rows of one tensor; None where it comes to .grad at the end
    of this backward pass. nodes: the autograd nodes that receive the gradients."""
    if not puts_off(mesh):
        return work(mesh.axis, part)
    return behind(mesh, parameters, nodes, part, work, label)


def behind(mesh: Mesh, parameters: Sequence[Any], nodes: Sequence[Any], part: torch.Tensor, work: Work, label: str) -> torch.Tensor | None:
    """`summed`, by the thread or the stream."""
    sums = sums_of(mesh)
    sums.expect(parameters)
    if not all(map(_may_come_later, parameters, nodes)):
        return sums.now(part, work, label)
    sums.later(parameters, part, work, label)
    return None


def all_reduced(*names: Names, dtype: torch.dtype | None = None) -> Work:
    """The work of sums over axes, one set of names after the other; dtype: of the result, None for the part's."""

    def work(axis_of: AxisOf, part: torch.Tensor) -> torch.Tensor:
        axes = [axis for axis in map(axis_of, names) if axis is not None]
        rounded = dtype is not None and dtype != part.dtype
        for axis in axes[:-1] if rounded else axes:
            axis.all_reduce_(part)
        if not rounded:
            return part
        return axes[-1].all_reduce_rounded(part, str(dtype).removeprefix("torch.")) if axes else part.to(dtype)

    return work


def deep_sum(first: Names, deep: Names) -> Work:
    """The work of the sum of a vector over the axes `first` and `deep`, of which 1 / first travels over deep: a reduce-scatter over first,
    an all-reduce over deep, an all-gather over first."""

    def work(axis_of: AxisOf, part: torch.Tensor) -> torch.Tensor:
        one, other = axis_of(first), axis_of(deep)
        if one is None or other is None:
            return all_reduced(first, deep)(axis_of, part)
        own = one.reduce_scatter(part, chunks(len(part), [one.size]))
        other.all_reduce_(own)
        return torch.cat(one.all_gather(own))

    return work


def puts_off(mesh: Mesh) -> bool:
    """Whether small sums go by the thread too: on one host the wait costs less than a thread does."""
    return mesh.has_background and bool(mesh.program.spans)


def sums_later(mesh: Mesh, weights: Sequence[torch.Tensor]) -> bool:
    """Whether the sums over depth of these weights' gradients are made behind the backward pass. Those of 16-bit weights are made of
    wider ones: by a thread they would all be kept until the pass ends, so that the step makes them; a stream gives their memory back as
    it goes."""
    if mesh.axis(mesh.axes.depth) is None:
        return False
    if mesh.program.job.has_gpu:
        return len({weight.dtype for weight in weights}) == 1
    return mesh.has_background and all(weight.dtype in (torch.float32, torch.float64) for weight in weights)


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


def _is_hooked(parameter: torch.Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _may_come_later(parameter: torch.Tensor, node: Any) -> bool:
    """Whether nothing may read the parameter's gradient before the end of this backward pass."""
    if _hooked or torch.is_grad_enabled() or getattr(node, "variable", None) is not parameter:
        return False
    if not hasattr(parameter, "made_on"):  # a tool's own in our place, such as FSDP2's, which it reads as soon as its layer is done
        return False
    if _is_hooked(parameter):
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf under torch.autograd.grad
        return False
