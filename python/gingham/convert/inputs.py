"""Full tensors in, full tensors out: what stands around a converted model so that the code that calls it stays as it was.

Before the call every batched argument is cut to this rank's rows (hidden states to its features too); after it outputs are
gathered by the name of their field. labels= are taken out of the call: the loss is that of the whole batch.
"""

from __future__ import annotations

import inspect
from typing import Any
from zlib import crc32

import torch
from torch.utils import _pytree as pytree

from ..layout import chunks
from ..mesh import Mesh, MeshError
from .losses import Labelled, loss_of, takes_labels

# arguments whose first dim is not the batch even where its size is
WHOLE = {"mask", "src_mask", "tgt_mask", "memory_mask", "attn_mask", "cache_position", "head_mask", "logits_to_keep", "num_items_in_batch"}
STREAMS = {"src", "tgt", "memory", "inputs_embeds", "input", "encoder_hidden_states"}
# fields of an output in the layout inner, and those that have rows only
INNER = {"logits", "prediction_logits", "seq_relationship_logits"}
ROWS = {"start_logits", "end_logits"}


def streams(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a stack of torch's layers, or of a chain, that are activations; they come first."""
    names = list(inspect.signature(module.forward).parameters)
    return tuple(name for name in names if name in STREAMS)


class Border:
    """Both hooks of one model. body: the layout of its activations; batch: the dim of its batch (1: torch's default)."""

    def __init__(self, model: torch.nn.Module, mesh: Mesh, io: str, body: str, batch: int) -> None:
        self.mesh, self.full, self.body, self.batch = mesh, io == "full", body, batch
        self.hugging = takes_labels(model)
        self.names = list(inspect.signature(model.forward).parameters)
        self.stack = body == "outer" and not self.hugging
        self.size: int | None = None
        self.missing = 0

    def before(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(self.names, args, strict=False))
        rest = args[len(named) :]
        labels: dict[str, Any] = {}
        if self.hugging:
            labels = {name: kwargs.pop(name) for name in LABELS if kwargs.get(name) is not None}
            labels |= {name: named.pop(name) for name in LABELS if named.get(name) is not None}
            kwargs = {**kwargs, **named}
            named, rest = {}, ()
        size = next((x.shape[self._dim(name, x)] for name, x in [*named.items(), *kwargs.items()] if self._batched(name, x)), None)
        if labels:
            model.__dict__["_border_labels"] = labels
        self.size, self.missing = size, self._missing(size or 0)
        if self.full:
            self._check_alike({**named, **kwargs, **labels})
            named = {name: self._cut(name, x, size) for name, x in named.items()}
            kwargs = {name: self._cut(name, x, size) for name, x in kwargs.items()}
        return (*named.values(), *rest), kwargs

    def _check_alike(self, given: dict[str, Any]) -> None:
        """Raises MeshError, on every rank, where one was given other tensors than the rest: a loader that shuffles by itself, a
        sampled token. A control message of 8 bytes."""
        if self.mesh.size == 1 or torch.compiler.is_compiling():
            return
        sum_of = 0
        for name, value in sorted(given.items()):
            for x in pytree.tree_leaves(value):
                if self._batched(name, x) and x.device.type == "cpu":
                    sum_of = crc32(
                        memoryview(x.detach().contiguous().view(torch.uint8).numpy()), crc32(repr(tuple(x.shape)).encode(), sum_of)
                    )
        sums = [each for (each,) in self.mesh.world.sizes([sum_of])]
        usual = max(sums, key=sums.count)
        odd = [rank for rank, each in enumerate(sums) if each != usual]
        if odd:
            raise MeshError(
                f"parallelize: rank {', '.join(map(str, odd))} got other inputs than the others in {', '.join(sorted(given))}; io='full':"
                " every rank must be given the same full tensors: seed samplers and generation alike, or pass io='local'"
            )

    def _missing(self, size: int) -> int:
        """Rows to add, copies of the first, where a rank would have none: models' own code cannot view nothing as heads."""
        rows = self.mesh.outer.rows
        held = chunks(size, [self.mesh.sizes[name] for name in rows])
        return -size % len(held) if self.full and self.hugging and size and min(held) == 0 else 0

    def _batched(self, name: str, x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x.dim() > 0 and name not in WHOLE

    def _dim(self, name: str, x: torch.Tensor) -> int:
        return self.batch if self.stack and name in STREAMS and x.dim() > 2 else 0

    def _cut(self, name: str, value: Any, size: int | None) -> Any:
        def cut(x: Any) -> Any:
            if not self._batched(name, x) or x.shape[self._dim(name, x)] != size:
                return x
            if self.missing:
                x = torch.cat([x, x[:1].expand(self.missing, *x.shape[1:])])
            if x.dtype == torch.bool:
                return self.mesh.scatter(x.to(torch.uint8), "rows").bool()
            features = self.body == "outer" and x.is_floating_point() and (self.stack or name in STREAMS) and not name.endswith("_mask")
            dim = self._dim(name, x)
            y = self.mesh.scatter(x, "x" if features else "rows", dim)
            return y.transpose(0, 1).contiguous() if dim == 1 else y

        return pytree.tree_map(cut, value)

    def after(self, model: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        labels = model.__dict__.pop("_border_labels", {})
        if self.hugging:
            call = Labelled(model, output, labels, kwargs, self.mesh, self.full, self.missing, "inner" if self.body == "outer" else "rows")
            loss = loss_of(call) if labels else None
            return self._fields(output, loss)
        if not self.full:
            return output
        return self._gather(output, "x" if self.body == "outer" else "rows")

    def _gather(self, value: Any, operand: str) -> Any:
        def gather(y: Any) -> Any:
            if not isinstance(y, torch.Tensor) or y.dim() == 0:
                return y
            full = self.mesh.gather(y.contiguous(), operand)
            full = full[: self.size] if self.missing else full
            return full.transpose(0, 1) if self.stack and self.batch == 1 and y.dim() > 2 else full

        return pytree.tree_map(gather, value)

    def _fields(self, output: Any, loss: torch.Tensor | None) -> Any:
        if isinstance(output, tuple):
            raise NotImplementedError("return_dict=False: outputs of a converted model are gathered by the names of their fields")
        for name, value in list(output.items()):
            if name == "past_key_values":
                self._keep_rows(value)
            elif self.full and name != "loss":
                operand = "rows" if name in ROWS or self.body == "rows" else "inner" if name in INNER else "x"
                output[name] = self._gather(value, operand)
        if loss is not None:
            output["loss"] = loss
        return output

    def _keep_rows(self, cache: Any) -> None:
        """A cache holds this rank's rows: what moves rows by their number in the whole batch (beams) is refused."""

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(
                "generation that reorders rows (beams, contrastive search) on a mesh that cuts rows; use greedy or sampling"
            )

        for name in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
            if self.mesh.outer.rows and hasattr(cache, name):
                setattr(cache, name, refuse)


LABELS = ("labels", "next_sentence_label", "start_positions", "end_positions")


def attach(model: torch.nn.Module, mesh: Mesh, io: str, body: str, batch: int) -> None:
    """Hangs both hooks on the model. Its inputs are by name: those in WHOLE are left as they are, of the others every tensor
    whose first dim is that of the first tensor is cut."""
    border = Border(model, mesh, io, body, batch)
    if border.full or border.hugging:
        model.register_forward_pre_hook(border.before, with_kwargs=True)
        model.register_forward_hook(border.after, with_kwargs=True)
