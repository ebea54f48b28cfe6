"""The one table that says what becomes of a layer, by its path in the model: the words of Hugging Face's tp_plan and a few more.

A rule is a path pattern ("*" is one name, matched from the right) and a role. Activations between the blocks of a model lie
in its body layout, "outer" in a known model, "rows" (cut along the batch only) in one that no rule knows:

    colwise   body -> inner     the first linear of a pair; columns of a rowwise follow
    rowwise   inner -> body     the second
    keep      body -> body      any other linear
    head      body -> inner     logits: every rank has some of the classes
    whole     body -> rows      a small head whose features the model's own code takes apart
    qkv       body -> inner     three linears stored as one weight, split into three (GPT-2's c_attn)
    copied    a module on single heads or rows (q_norm): every rank has it whole, its gradient is summed over all ranks
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .vouched import body_of

ROLES = ("colwise", "rowwise", "keep", "head", "whole", "qkv", "copied")

# what transformers' own plans call the same things; the rest of its words ask for what no layer of ours needs
WORDS_OF_PLANS = {
    "colwise": "colwise",
    "rowwise": "rowwise",
    "colwise_gather_output": "head",
    "colwise_rep": "head",
    "rowwise_rep": "rowwise",
    "rowwise_split_input": "keep",
    "replicated_with_grad_allreduce": "copied",
}
SPLIT = ("rowwise_split_input",)  # words for linears whose input or output a layer's code has whole
NEEDS_NO_RULE = ("replicate", "embedding_rowwise", "embedding_colwise")  # embeddings and norms are known by their class

_HEADS = {"lm_head": "head", "score": "head", "classifier": "head", "qa_outputs": "whole", "summary": "keep"}

FAMILIES: dict[str, dict[str, str]] = {
    "gpt2": {
        "h.*.attn.c_attn": "qkv",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
        **_HEADS,
    },
    "bert": {
        "attention.self.query": "colwise",
        "attention.self.key": "colwise",
        "attention.self.value": "colwise",
        "attention.output.dense": "rowwise",
        "crossattention.self.query": "colwise",
        "crossattention.self.key": "colwise",
        "crossattention.self.value": "colwise",
        "crossattention.output.dense": "rowwise",
        "layer.*.intermediate.dense": "colwise",
        "layer.*.output.dense": "rowwise",
        "pooler.dense": "keep",
        "predictions.transform.dense": "keep",
        "predictions.decoder": "head",
        "seq_relationship": "head",
        **_HEADS,
    },
    "vit": {
        "attention.q_proj": "colwise",
        "attention.k_proj": "colwise",
        "attention.v_proj": "colwise",
        "attention.o_proj": "rowwise",
        "mlp.fc1": "colwise",
        "mlp.fc2": "rowwise",
        "pooler.dense": "keep",
        **_HEADS,
    },
    "llama": _HEADS,
}

# what every model of a family has: a rule of these that fits nothing means that something else stands there
REQUIRED: dict[str, tuple[str, ...]] = {
    family: tuple(
        pattern for pattern in roles if "attention.self" in pattern or "layer.*" in pattern or "mlp." in pattern or "attn" in pattern
    )
    for family, roles in FAMILIES.items()
}
REQUIRED["bert"] = tuple(pattern for pattern in REQUIRED["bert"] if not pattern.startswith("crossattention"))
REQUIRED["vit"] += tuple(pattern for pattern in FAMILIES["vit"] if pattern.startswith("attention."))
REQUIRED["llama"] = ()  # its own tp_plan says them

# linears called on one X, which then run as one step with one gather of it
SHARED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))

# parameters that a module adds to activations by hand, cut like the body's features
LOOSE = ("cls_token", "mask_token", "position_embeddings", "distillation_token")

TORCH: dict[str, dict[str, str]] = {
    "TransformerEncoderLayer": {"linear1": "colwise", "linear2": "rowwise"},
    "TransformerDecoderLayer": {"linear1": "colwise", "linear2": "rowwise"},
}


@dataclass
class Rules:
    """Patterns of one model. `body`: the layout between its blocks. `used`: the patterns that matched something.
    `seen`: paths as rules see them, without the names of wrappers, where they differ. `family`: the table's name for it."""

    roles: dict[str, str]
    body: str
    used: set[str] = field(default_factory=set)
    seen: dict[str, str] = field(default_factory=dict)
    family: str | None = None
    cut_heads: bool = False  # whether attention modules of transformers work on this rank's heads
    fitted: set[str] = field(default_factory=set)  # the patterns that a linear was converted by

    def pattern(self, path: str) -> str | None:
        """The longest pattern that matches, one with the wrappers' own names before others."""
        for each in (path, self.seen.get(path, path)):
            found = [pattern for pattern in self.roles if matches(pattern, each)]
            if found:
                self.used.update(found)
                return max(found, key=len)
        return None

    def role(self, path: str) -> str:
        """The role of the pattern that matches; "keep" where none does."""
        pattern = self.pattern(path)
        return "keep" if pattern is None else self.roles[pattern]

    def unused(self) -> list[str]:
        return sorted(set(self.roles) - self.used)


def matches(pattern: str, path: str) -> bool:
    """Whether the pattern fits the end of the path: "h.*.attn" fits "transformer.h.3.attn"."""
    body = re.escape(pattern).replace(r"\*", r"[^.]+")
    return re.search(rf"(^|\.){body}$", path) is not None


def rules_of(model: Any, plan: Mapping[str, str] | None) -> tuple[Rules, set[str]]:
    """The rules of a model, and those patterns of them that were asked for (a tp_plan's, the caller's) and not built in.

    A plan of the caller goes before the model's own tp_plan, that before the table. Raises NotImplementedError for a word
    of a plan that no layer of ours carries out (experts, packed weights).
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None) if hasattr(model, "base_model_prefix") else None
    family = family if family in FAMILIES else None
    own = tp_plan_of(model)
    roles = dict(FAMILIES[family]) if family else dict(_HEADS) if own else {}
    asked: dict[str, str] = {}
    gathers = False
    for given in (own, dict(plan or {})):
        for pattern, word in given.items():
            if word in NEEDS_NO_RULE:
                continue
            role = WORDS_OF_PLANS.get(word, word)
            if role not in ROLES:
                known = sorted({*ROLES, *WORDS_OF_PLANS, *NEEDS_NO_RULE})
                raise NotImplementedError(f"plan of {type(model).__name__}: {pattern!r} is {word!r}; layers here know {known}")
            if role == "head" and word != "head" and not hasattr(model, "base_model_prefix"):
                role = "keep"  # its output is whole
            if word in SPLIT or role == "head" and word != "head" and "layers." in pattern:
                role, gathers = "keep", True  # whole features inside a layer, whose code takes them apart
            asked[pattern] = role
    return Rules({**roles, **asked}, _body(model, family, own, gathers), set(), family=family, cut_heads=bool(family or own)), set(asked)


def _body(model: Any, family: str | None, own: dict[str, str], gathers: bool) -> str:
    """The layout between blocks: "outer" where code that was compared stands there, "rows" elsewhere."""
    if not family and not own or gathers:
        return "rows"
    if family and family != "llama":
        return "outer"
    base = model._modules.get(model.base_model_prefix)
    return body_of(model if base is None else base)


def tp_plan_of(model: Any) -> dict[str, str]:
    """A transformers model's plan for tensor parallelism: its configuration's for the body and its class's for the head."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "base_model_prefix"):
        return {}
    return {**(getattr(config, "base_model_tp_plan", None) or {}), **(getattr(type(model), "_tp_plan", None) or {})}
