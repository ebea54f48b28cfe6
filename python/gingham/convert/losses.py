"""The losses of transformers' model classes on logits that no rank holds whole, for classes that heads.py knows.

A loss over the vocabulary runs on the logits where they lie; those over a few classes run transformers' own formula on
gathered logits, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .. import nn
from ..checks import plain
from ..mesh import Mesh

# fields of an output in the layout inner, those that have rows only, and those in outer
INNER = {"logits", "prediction_logits", "seq_relationship_logits"}
ROWS = {"start_logits", "end_logits"}
OUTER = {"last_hidden_state", "pooler_output", "hidden_states"}
LABELS = ("labels", "next_sentence_label", "start_positions", "end_positions")


def is_transformers(model: Any) -> bool:
    """Whether this is a model of transformers, whose outputs have named fields."""
    return hasattr(model, "config") and hasattr(model, "base_model_prefix")


def widths_of(model: Any) -> dict[str, int]:
    """The global features of a transformers model's outputs by field, where its configuration or its head says them."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    words = getattr(head, "out_features", None)
    found = {name: getattr(config, "hidden_size", None) for name in OUTER}
    found |= {"logits": words or getattr(model.config, "num_labels", None), "prediction_logits": words, "seq_relationship_logits": 2}
    return {name: width for name, width in found.items() if width is not None}


def gather(mesh: Mesh, y: torch.Tensor, operand: str, width: int | None, own: bool = False) -> torch.Tensor:
    """mesh.gather of a model's output; its configuration's `width` counts only where ranks cannot be asked, in a compiled graph."""
    return mesh.gather(y.contiguous(), operand, features=width if torch.compiler.is_compiling() else None, own=own)


@dataclass
class Labelled:
    """One call's output and labels. Labels are full where the model's inputs are; `cut` and `whole` give both forms.
    missing: rows that were added to the inputs, to be ignored. layout: of the logits.
    widths: global features by field, for a compiled graph. own: labels are those of this data rank; a loss is the job's all the same.
    samples: of this call, with those that were added."""

    model: Any
    output: Any
    labels: dict[str, Any]
    kwargs: dict[str, Any]
    mesh: Mesh
    full: bool
    missing: int
    layout: str
    widths: dict[str, Any]
    own: bool = False
    samples: int = 0

    def cut(self, name: str, change: Callable[[torch.Tensor], torch.Tensor] = lambda labels: labels) -> torch.Tensor:
        """This rank's part, changed along the sequence before it is cut."""
        labels = change(self.labels[name])
        if not self.full:
            return labels
        added = labels.new_full((self.missing, *labels.shape[1:]), -100)
        return plain(self.mesh.scatter(torch.cat([labels, added]) if self.missing else labels, "rows", own=self.own))

    def whole(self, name: str) -> torch.Tensor:
        if self.full and not self.own:
            return self.labels[name]
        return self._all_of(self.mesh.gather(self.cut(name), "rows"))

    def gathered(self, field: str, layout: str | None = None) -> torch.Tensor:
        return self._all_of(gather(self.mesh, self.output[field], layout or self.layout, self.widths.get(field)))

    def _all_of(self, full: torch.Tensor) -> torch.Tensor:
        """Of the rows of the job, those that were not added."""
        if not self.own:
            return full[: len(full) - self.missing]
        mine = [self.samples, self.missing]
        told = [mine] * self.mesh.data.size if torch.compiler.is_compiling() else self.mesh.joint(("data",)).sizes(mine)
        times = len(full) // max(1, sum(samples for samples, _ in told))  # rows a sample
        parts = full.split([samples * times for samples, _ in told])
        return torch.cat([part[: len(part) - added * times] for part, (_, added) in zip(parts, told, strict=True)])

    def _vocabulary(self, field: str, labels: torch.Tensor, items: Any = None) -> torch.Tensor:
        logits, reduction = self.output[field].float(), "mean" if items is None else "sum"
        loss = nn.cross_entropy(logits, labels, mesh=self.mesh, layout=self.layout, ignore_index=-100, reduction=reduction)
        return loss if items is None else loss / items

    def causal(self) -> torch.Tensor:
        shifted = self.kwargs.get("shift_labels")
        if shifted is None:
            if self.mesh.outer.time and not self.full:
                raise NotImplementedError("labels of a piece of the sequence: the next token may be another rank's; give shift_labels")
            shifted = self.cut("labels", lambda labels: F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous())
        elif self.mesh.outer.time and self.full:
            shifted = plain(self.mesh.scatter(shifted, "rows", own=self.own))
        return self._vocabulary("logits", shifted, self.kwargs.get("num_items_in_batch"))

    def masked(self) -> torch.Tensor:
        return self._vocabulary("logits", self.cut("labels"))

    def classes(self) -> torch.Tensor:
        from transformers.loss.loss_utils import ForSequenceClassificationLoss

        return ForSequenceClassificationLoss(self.whole("labels"), self.gathered("logits"), self.model.config)

    def tokens(self) -> torch.Tensor:
        return F.cross_entropy(self.gathered("logits").flatten(0, 1).float(), self.whole("labels").flatten())

    def choices(self) -> torch.Tensor:
        return F.cross_entropy(self.gathered("logits"), self.whole("labels").flatten())

    def answers(self) -> torch.Tensor | None:
        if not {"start_positions", "end_positions"} <= set(self.labels):
            return None
        from transformers.loss.loss_utils import ForQuestionAnsweringLoss

        ends = [self.gathered(name, "rows") for name in ("start_logits", "end_logits")]
        return ForQuestionAnsweringLoss(ends[0], ends[1], self.whole("start_positions"), self.whole("end_positions"))

    def pretraining(self) -> torch.Tensor | None:
        if not {"labels", "next_sentence_label"} <= set(self.labels):
            return None
        words = self._vocabulary("prediction_logits", self.cut("labels"))
        return words + F.cross_entropy(self.gathered("seq_relationship_logits"), self.whole("next_sentence_label").flatten())


LOSSES: dict[str, Callable[[Labelled], torch.Tensor | None]] = {
    "causal": Labelled.causal,
    "masked": Labelled.masked,
    "classes": Labelled.classes,
    "tokens": Labelled.tokens,
    "choices": Labelled.choices,
    "answers": Labelled.answers,
    "pretraining": Labelled.pretraining,
}


def known_or_refused(model: Any, method: str | None) -> None:
    """Raises NotImplementedError, before the call of a model with labels=, where its loss is not known."""
    if method is None or "_loss_function" in vars(model):
        made = "" if not hasattr(model, "prepare_decoder_input_ids_from_labels") else "decoder_input_ids="
        given = f" (give {made}model.prepare_decoder_input_ids_from_labels(labels) instead of them)" if made else ""
        raise NotImplementedError(
            f"{type(model).__name__}: labels= needs a loss whose code is known on cut logits, and this class's is not (or was set"
            f" after parallelize); leave labels out{given} and compute the loss from the outputs' logits"
        )


def loss_of(call: Labelled, method: str | None) -> torch.Tensor | None:
    """The loss that the model's class would give, of the whole batch, the same number on every rank; None where it gives none.

    method: a name of LOSSES, for which `known_or_refused` has looked.
    """
    return None if method is None else LOSSES[method](call)
