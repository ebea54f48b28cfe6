"""Full tensors in, full tensors out: what stands around a converted model so that the code that calls it stays as it was.

Before the call every batched argument, and what arguments hold (nested.py), is cut to this rank's rows (hidden states to its features
too); after it outputs are gathered by the name of their field. labels= are taken out of the call: the loss is that of the whole batch.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .. import nn
from ..checks import plain
from ..errors import ShapeError
from ..mesh import Mesh
from ..mesh.layout import Names, chunks
from . import entries, late, nested, probe, sequence
from .agree import check_alike
from .caches import is_cache, keep_rows
from .calls import Inside, Within, summed_over, under_way
from .entry import enclose
from .generators import own_numbers
from .loose import shared_gradient
from .losses import INNER, LABELS, OUTER, ROWS, Labelled, gather, is_transformers, known_or_refused, loss_of, widths_of
from .shares import Share, inward, outward

# arguments whose first dim is not the batch even where its size is
WHOLE = {"mask", "src_mask", "tgt_mask", "memory_mask", "attn_mask", "cache_position", "head_mask", "logits_to_keep", "num_items_in_batch"}
STREAMS = {"src", "tgt", "memory", "inputs_embeds", "input", "encoder_hidden_states"}
# the argument whose first dim says how many samples there are: others may have 1 row, for all of them
SAMPLES = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


def streams(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a stack of torch's layers, or of a chain, that are activations; they come first."""
    names = list(inspect.signature(module.forward).parameters)
    return tuple(name for name in names if name in STREAMS)


class Border:
    """What one model's calls cross. body: the layout of its activations; batch: the dim of its batch (1: torch's default);
    width: the features of its output, where they may be cut; loss: the method of losses.Labelled that gives its loss; whole: names of
    arguments that are no batch; heads: whether a tp_plan or a rule cuts its linears."""

    def __init__(
        self,
        model: torch.nn.Module,
        mesh: Mesh,
        io: str,
        body: str,
        batch: int,
        width: int | None,
        loss: str | None = None,
        whole: Sequence[str] = (),
        heads: bool = False,
    ) -> None:
        self.mesh, self.full, self.body, self.batch, self.loss = mesh, io == "full", body, batch, loss
        self.hugging = is_transformers(model)
        self.origin = next(cls for cls in type(model).__mro__ if "_reads_blocks" not in vars(cls))  # before it was converted
        self.inside = Inside()
        self.names = self._names_of(model.forward)
        self.whole = WHOLE | self._checked(model, whole)
        self.told: set[str] = set()
        self.crossed, self.modules, self.missing, self.tuples = False, 0, 0, False
        self.probed: set[tuple[str, bool, bool]] = set()
        self.rows: list[Any] = []  # of the call, the tensors, lists and arrays that were cut
        self.open: list[tuple[str, Any, int]] = []
        self.first: Any = None
        self.given: list[str] = []
        self.passed = nested.Passed()
        self.heads, self.stack = heads, body == "outer" and not self.hugging
        self.widths = widths_of(model) if self.hugging else {"": width}
        self.size: int | None = None
        self.share: Share | None = None
        self.labels: dict[str, Any] = {}

    @staticmethod
    def _names_of(function: Any) -> list[str]:
        """The arguments that may be given by position; what else is given so has no name."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds]

    def _checked(self, model: Any, whole: Sequence[str]) -> set[str]:
        if isinstance(whole, str):
            raise TypeError(f"whole={whole!r}: expected a sequence of names, ({whole!r},)")
        parameters = inspect.signature(model.forward).parameters
        open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        unknown = [name for name in whole if name.partition(".")[0] not in parameters and not open_ended]
        if unknown:
            raise ValueError(
                f"whole={tuple(whole)}: {type(model).__name__}.forward has no argument {unknown[0]!r}, only {list(parameters)}"
            )
        return set(whole)

    def call(self, function: Any, name: str, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of the model with full (or, with io="local", this rank's) tensors in and out. The first step's checks end here."""
        args, kwargs = nested.mapped(lambda _, x: plain(x), (args, kwargs))
        forward = name == "forward"
        if not torch.compiler.is_compiling():
            self.modules = late.look(model, self, self.crossed)
        self.crossed = True
        self.open.clear()
        args, kwargs = self.before(model, args, kwargs, self.names if forward else self._names_of(function)[1:])
        what = type(model).__name__ + ("" if forward else f".{name}")
        kind = (name, model.training, torch.is_grad_enabled())
        probed = torch.compiler.is_compiling() or kind in self.probed
        self.inside.depth += 1
        try:
            with own_numbers(model, self.mesh, self.body == "outer"), under_way(self.mesh, summed_over(self.mesh, self.body), self.inside):
                other = None if probed else self._probe(function, kind, model, args, kwargs)
                state = None if other is None else probe.State(model)
                output = function(model, *args, **kwargs)
        finally:
            self.inside.depth -= 1
        if other is not None and state is not None:
            probe.check(what, self.mesh, output, *other)
            state.check(what, self.mesh, model, other[1].here if self.parted else None)
        return self.after(model, kwargs, output, what)

    def _probe(self, function: Any, kind: tuple[str, bool, bool], model: Any, args: Any, kwargs: Any) -> tuple[Any, probe.Rows] | None:
        """At the first call of a method (in training or not, with gradients or without): what it gives beside other samples."""
        if any(is_cache(value) for _, value in nested.leaves((args, kwargs))):
            return None  # which would be filled twice
        if not self.full or not self.size:
            return None
        self.probed.add(kind)
        if not probe.is_needed(model, self.mesh, self.body == "outer") or probe.is_heard(model, self.mesh):
            return None
        rows = probe.Rows.of(self.mesh, self.size + self.missing, self._rows(), self.own)
        other = probe.run(function, model, args, kwargs, rows, self.rows, self.mesh)
        self.open.clear()
        return other, rows

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """For a copy of the model, on the same mesh."""
        new = object.__new__(Border)
        vars(new).update(vars(self))
        new.inside, new.told, new.first, new.labels, new.open = copy.deepcopy(self.inside, memo), set(), None, {}, []
        new.rows, new.passed = [], nested.Passed()
        new.probed, new.modules = set(self.probed), 0
        memo[id(self)] = new
        return new

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(names, args, strict=False))
        named |= {f"*{index}": x for index, x in enumerate(args[len(named) :])}
        self.labels, self.tuples, self.rows = {}, False, []
        if self.hugging and len(args) <= len(names):
            kwargs, named = {**kwargs, **named}, {}
            self.labels = {name: kwargs.pop(name) for name in LABELS if kwargs.get(name) is not None}
            known_or_refused(model, self.loss if self.labels else "")
            self.tuples = not _first(kwargs.pop("return_dict", None), getattr(model.config, "return_dict", True))
            if self.tuples:
                kwargs["return_dict"] = True
        given = {**named, **kwargs}
        held = {name: nested.leaves(value, name) for name, value in {**given, **self.labels}.items()}
        self.given = list(given)
        self.first, self.size = self._first_of(given, held)
        self.missing = self._missing(self.size or 0)
        self.share = Share(self.mesh, self.size or 0) if self.own else None
        if self.full:
            self._check_dims(model, given)
            self._check_open(model, held)
            self._check_alike(held)
            self.inside.samples = self.size
            if self.mesh.outer.time:
                kwargs, named = sequence.prepared(self.mesh, model, given, self.names, self.share, self.missing), {}
            for value in (x for each in held.values() for _, x in each if is_cache(x)):  # the caller's is filled in place, whatever returns
                keep_rows(value, self.mesh)
            named = {name: self._cut(name, x) for name, x in named.items()}
            kwargs = {name: self._cut(name, x) for name, x in kwargs.items()}
        return tuple(named.values()), kwargs

    def _first_of(self, given: dict[str, Any], held: dict[str, list[tuple[str, Any]]]) -> tuple[Any, int | None]:
        """The tensor that says how many samples there are, and their number: the first argument that is one. Where none is, the first
        inside of one; of the keys of a dict those of one dim (positions, weights) only where there is no other."""
        order = sorted(given.items(), key=lambda pair: pair[0] not in SAMPLES) if self.hugging else list(given.items())
        found = [(name, x) for name, x in order if self._batched(name, x)]
        if not found:
            found = [(name, x) for name, _ in order for path, x in held[name] if self._batched(path, x)]
            found.sort(key=lambda pair: pair[1].dim() == 1)
        return (found[0][1], found[0][1].shape[self._dim(*found[0])]) if found else (None, None)

    def _check_open(self, model: torch.nn.Module, held: dict[str, list[tuple[str, Any]]]) -> None:
        """Raises NotImplementedError for an object with tensors that no border can cut."""
        for path, x in (leaf for each in held.values() for leaf in each) if self._cuts_rows() else ():
            words = "" if self._is_whole(path) else nested.closed(x, self.passed)
            if words:
                raise NotImplementedError(
                    f"{type(model).__name__}: rank {self.mesh.rank} got {path}, {words}; where they are of no batch, say"
                    f" parallelize(..., whole=({path!r},))"
                )

    def _check_dims(self, model: torch.nn.Module, given: dict[str, Any]) -> None:
        """Raises ShapeError for one sample without a dim of samples, whose time or features would be taken for them."""
        least = 1 if not self.stack else 2 if isinstance(model, torch.nn.Sequential) else 3
        for name, x in given.items():
            if self.stack and name in STREAMS and isinstance(x, torch.Tensor) and x.dim() < least:
                raise ShapeError(
                    f"{type(model).__name__}: rank {self.mesh.rank} got {name} of shape {tuple(x.shape)}, expected at least {least} dims,"
                    " one of them of samples: x.unsqueeze(...)"
                )

    def _check_alike(self, held: dict[str, list[tuple[str, Any]]]) -> None:
        """Raises MeshError, on every rank, where one was given other tensors than the rest: a loader that shuffles by itself, a
        sampled token. A control message of 8 bytes."""
        if self.mesh.size == 1:
            return
        leaves = [x.detach() for name in sorted(held) for path, x in held[name] if self._batched(path, x)]
        names = ", ".join(sorted(held))
        if not torch.compiler.is_compiling():
            check_alike(leaves, self.mesh.handle, names, self.own)  # also where this rank was given none: the others wait for its word
        elif leaves:
            torch.ops.gingham.alike(leaves, self.mesh.handle, names, self.own)

    def _missing(self, size: int) -> int:
        """Rows to add, copies of the first, where a rank would have none: models' own code cannot view nothing as heads."""
        held = chunks(size, [self.mesh.sizes[name] for name in self._rows()])
        return -size % len(held) if self.full and size and min(held) == 0 else 0

    @property
    def own(self) -> bool:
        """Whether full inputs and outputs are those of this data rank, and not the job's."""
        return self.full and self.mesh.data.size > 1 and not self.mesh.one_batch

    def _rows(self) -> Names:
        """The axes that cut the samples of what a call is given."""
        outer = self.mesh.outer
        return tuple(name for name in outer.rows if name not in outer.time and not (self.own and name == "data"))

    def _cuts_rows(self) -> bool:
        return self.mesh.parts(self._rows()) > 1

    @property
    def parted(self) -> bool:
        """Whether modules inside see a part of the samples of a call, or may see one of their features."""
        return self._cuts_rows() or self.heads or self.hugging and self.mesh.size > self.mesh.data.size

    def _is_whole(self, path: str) -> bool:
        return path in self.whole or "." in path and any(path.startswith(f"{name}.") for name in self.whole)

    def _batched(self, path: str, x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x.dim() > 0 and not self._is_whole(path)

    def _dim(self, name: str, x: torch.Tensor) -> int:
        return self.batch if self.stack and name in STREAMS and x.dim() > 2 else 0

    def _cut(self, name: str, value: Any) -> Any:
        def cut(path: str, x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return entries.cut(self, path, x)
            if self.missing and self.stack and name in WHOLE and x.dim() == 3:  # a mask a head
                return torch.cat([x, x[: len(x) // (self.size or 1)].repeat(self.missing, 1, 1)])
            dim = self._dim(name, x)
            if self.mesh.outer.time and name in sequence.IMAGES:
                return x
            if not self._batched(path, x) or x.shape[dim] != self.size or sequence.is_prepared(self.mesh, name):
                return self._uncut(path, x)
            self._tell(path, x)
            x = inward(x, self.share) if self.share else x
            if self.missing:
                x = torch.cat([x, x.narrow(dim, 0, 1).repeat_interleave(self.missing, dim)], dim)
            if x.dtype == torch.bool:
                return self._noted(plain(self.mesh.scatter(x.to(torch.uint8), "rows", own=self.own)).bool())
            features = self.body == "outer" and x.is_floating_point() and (self.stack or name in STREAMS) and not name.endswith("_mask")
            y = plain(self.mesh.scatter(x, "x" if features else "rows", dim, self.own))
            return self._noted(y.transpose(0, 1).contiguous() if dim == 1 else y)

        return nested.mapped(cut, value, name, is_leaf=lambda each: entries.as_long(each, self.size or 0))

    def _noted(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(x)
        return x

    def _uncut(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A tensor that every rank uses whole on its own rows: its gradient is the sum over them."""
        if not x.requires_grad or not torch.is_grad_enabled():
            return x
        if self.body == "outer":
            raise NotImplementedError(
                f"{name} of shape {tuple(x.shape)} needs a gradient and is no batch of {self.size} samples: on cut features no rank's part"
                " of it is known; give it once for each sample"
            )
        return shared_gradient(x, self.mesh, self.mesh.outer.rows)

    def _tell(self, name: str, x: torch.Tensor) -> None:
        """Warns once of an argument that is cut for no other reason than its length."""
        if self.first is not x and self._rows() and (x.dim() == 1 or name.startswith("*")):
            words = f"argument {name!r} of shape {tuple(x.shape)} is cut like the batch, since it is as long ({self.size})"
            entries.tell(self, name, words)

    def after(self, model: Any, kwargs: Any, output: Any, what: str) -> Any:
        labels, self.labels, self.rows = self.labels, {}, []
        if self.hugging and isinstance(output, dict):
            layout = "inner" if self._cut_logits() else "rows"
            samples = (self.size or 0) + self.missing
            call = Labelled(model, output, labels, kwargs, self.mesh, self.full, self.missing, layout, self.widths, self.own, samples)
            loss = loss_of(call, self.loss) if labels else None
            output = self._fields(model, output, loss)
            return output.to_tuple() if self.tuples else output
        if not self.full:
            return output
        if self.hugging and self.body == "outer" and nested.tensors(output):
            raise NotImplementedError(f"{what}: nothing says how what it returns is cut; call the model, or use io='local'")
        return self._gather(what, output, "x" if self.body == "outer" else "rows", self.widths.get(""))

    def _cut_logits(self) -> bool:
        """Whether logits lie in inner: under a head that is known, of a model whose code was written for linears cut so."""
        return self.body == "outer" or self.heads and self.loss is not None

    def watch(self, cutting: dict[str, torch.nn.Module], joining: list[torch.nn.Module]) -> None:
        """Follows the linears that a plan cuts between whole features, so that an output that none of the second kind joined is known."""
        for path, layer in cutting.items():
            layer.register_forward_hook(lambda layer, args, y, path=path: self.open.append((path, layer, y.shape[-1])))
        for layer in joining:
            layer.register_forward_hook(lambda layer, args, y: self.open.clear())

    def _open(self, what: str, y: torch.Tensor) -> bool:
        """Whether an output is the part of its features that a linear of the plan has here. Raises ShapeError where nothing tells."""
        for path, layer, width in self.open:
            if width == layer.out_features:
                continue
            if y.dim() > 1 and y.shape[-1] == width and isinstance(layer, nn.Linear):
                return True
            raise ShapeError(
                f"{what}: {path} gives {width} of its {layer.out_features} features on rank {self.mesh.rank}, and no 'rowwise' linear"
                f" follows it before the output of shape {tuple(y.shape)}; make it 'keep' in the plan"
            )
        return False

    def _gather(self, what: str, value: Any, operand: str, width: int | None) -> Any:
        samples = 0 if self.size is None else self.size + self.missing

        def whole(path: str, y: Any) -> Any:
            if not isinstance(y, torch.Tensor):
                return nested.given_out(y, self.passed, nested.joined(what, path) if self._cuts_rows() else "")
            opened = operand == "rows" and self._open(what, y)
            if not self.mesh.outer.rows and operand == "rows" and not opened:
                return y
            if self.size is None and self._cuts_rows():
                raise NotImplementedError(
                    f"{nested.joined(what, path)}: rank {self.mesh.rank} found no tensor of samples to cut in its arguments"
                    f" ({', '.join(self.given) or 'none'}), and got an output of shape {tuple(y.shape)}, which every rank would give"
                    " once; expected the batch in tensors: arguments, or in dicts, lists, tuples and dataclasses"
                )
            features = self.open[-1][1].out_features if opened else width
            full = gather(self.mesh, y, "inner" if opened else operand, features, self.own) if y.dim() else y
            if not y.dim() or samples and len(full) % samples:
                raise NotImplementedError(
                    f"{what}: an output of shape {tuple(y.shape)} is of this rank's part of {self.size} samples, and nothing says how"
                    " the ranks' make one; return a value for each sample and reduce them outside of the model"
                )
            full = full[: len(full) // samples * (self.size or 0)] if self.missing else full
            full = outward(full, self.share) if self.share and samples else full
            return full.transpose(0, 1) if self.stack and self.batch == 1 and y.dim() > 2 else full

        return nested.mapped(whole, value)

    def _fields(self, model: Any, output: Any, loss: torch.Tensor | None) -> Any:
        for name, value in list(output.items()):
            if is_cache(value):
                keep_rows(value, self.mesh)
            elif self.full and not (name == "loss" and loss is not None):
                known = self.body == "rows" or name in INNER | ROWS | OUTER
                inner = name in INNER and self._cut_logits()
                if not known and nested.tensors(value):
                    raise NotImplementedError(f"{type(model).__name__}: nothing says how its output {name!r} is cut; use io='local'")
                operand = "inner" if inner else "rows" if name in ROWS or self.body == "rows" else "x"
                output[name] = self._gather(f"{type(model).__name__}'s {name}", value, operand, self.widths.get(name))
        # made anew: as a tuple it has its fields in the order of its class, the loss first
        return output if loss is None else type(output)(**{**output, "loss": loss})


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def attach(stand: Any, border: Border, base: Any) -> None:
    """Puts the border around the methods of `stand`: the model, or its base where the head has whole features. Its inputs are by
    name: those in WHOLE are left as they are, of the others every tensor whose first dim is that of the first tensor is cut.
    base: the base of a model that has the border itself; called alone, it has one too."""
    if not (border.full or border.hugging):
        return
    if base is not None and border.full:
        inner = Border(base, border.mesh, "full", border.body, border.batch, None, heads=border.heads)
        inner.inside = border.inside
        enclose(base, inner)
        inner.modules = late.note(base)
    enclose(stand, border)
    Within.hold(stand, border)
    border.modules = late.note(stand)
