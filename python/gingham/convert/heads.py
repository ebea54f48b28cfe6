"""What stands on top of a transformers model's base, and where its border stands.

A head whose forward and loss are known (compared with the original's, or a word for word copy) is cut like the rest, and the border
stands around the whole model. Before any other head the border stands around the base: the head gets full features of the whole
batch, its weights are whole on every rank, and its class's own code gives logits and loss, so that both are the class's whatever
they are. That costs the gather of the base's output, and every rank computes the whole head.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .. import nn
from .bytecode import chains
from .layers import Conversion, Line, is_plain
from .loose import hold
from .vouched import text_of
from .wrappers import is_foreign

# classes whose logits, losses and gradients the tests compare on cut features, by the method of losses.Labelled
COMPARED = {
    "LlamaForCausalLM": "causal",
    "GPT2LMHeadModel": "causal",
    "BertForMaskedLM": "masked",
    "BertForPreTraining": "pretraining",
    "BertForNextSentencePrediction": "choices",
    "BertForSequenceClassification": "classes",
    "BertForTokenClassification": "tokens",
    "BertForQuestionAnswering": "answers",
    "GPT2ForSequenceClassification": "classes",
    "LlamaForSequenceClassification": "classes",
    "LlamaForTokenClassification": "tokens",
    "ViTForImageClassification": "classes",
}
# the loss of transformers that a class must find under its own name for its loss to be that method's
NAMED = {"causal": "ForCausalLM", "classes": "ForSequenceClassification", "tokens": "ForTokenClassification"}


@cache
def _compared() -> dict[str, str]:
    """The methods by the code of the forward."""
    import transformers

    classes = {kind: getattr(transformers, kind, None) for kind in COMPARED}
    return {text_of(cls.forward): COMPARED[kind] for kind, cls in classes.items() if cls is not None and text_of(cls.forward)}


def known_loss(model: Any) -> str | None:
    """Which method of losses.Labelled gives the loss of a model's class; None where nothing vouches for its head."""
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import LOSS_MAPPING

    if is_foreign(model) or not _plain_head(model) or _is_cut_apart(model) or "_loss_function" in vars(model):
        return None
    text = text_of(type(model).forward)
    method = _compared().get(text)
    if method in NAMED and "'loss_function'" in text:
        used = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "", LOSS_MAPPING["ForCausalLM"])
        if used is not LOSS_MAPPING[NAMED[method]] or type(model).loss_function is not PreTrainedModel.loss_function:
            return None
    return method


def _is_cut_apart(model: Any) -> bool:
    """Whether the output embedding shares its weight with a table whose class computes more than a lookup, which stays whole."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight is not None and any(
        each._parameters.get("weight") is weight and isinstance(each, torch.nn.Embedding) and not is_plain(each) for each in model.modules()
    )


def _plain_head(model: torch.nn.Module) -> bool:
    """Whether nothing but linears, dropouts and transformers' own modules stand beside the base."""
    base = base_of(model)
    return all(
        any(cls.__module__.startswith(("transformers.models.", "peft.")) for cls in type(child).__mro__)
        or isinstance(child, torch.nn.Linear | torch.nn.Dropout | torch.nn.Identity)
        for child in model.children()
        if child is not base
    )


def base_of(model: Any) -> torch.nn.Module | None:
    """The module inside a model with a head that its forward calls for hidden states, which is mostly the one that base_model_prefix
    names; None where the model is its own base."""
    base = model._modules.get(getattr(model, "base_model_prefix", ""))
    if not isinstance(base, torch.nn.Module):
        return None
    inside = set()
    for first, *rest in (chain for chain in chains(type(model).forward) or () if chain):
        if first == model.base_model_prefix:
            each: Any = base
            for name in rest:
                each = each._modules.get(name, each)
            inside.add(each)
    return inside.pop() if len(inside) == 1 else base


def keep_whole(made: Conversion, path: str, model: torch.nn.Module, base: torch.nn.Module) -> None:
    """Leaves every module beside the base as it is, its parameters whole on every rank: each computes the same, of the whole batch."""
    for name, child in list(model._modules.items()):
        if child is not None and child is not base:
            model._modules[name] = _whole(made, f"{path}.{name}".lstrip("."), child, base)
    _own(made, path, model)


def _whole(made: Conversion, path: str, module: Any, base: torch.nn.Module) -> torch.nn.Module:
    if id(module) in made.modules:
        return made.modules[id(module)][1]
    new: Any = module
    if type(module) is torch.nn.Dropout and module.p < 1:
        new = nn.Dropout(module.p, mesh=made.mesh)
        new.mesh = None  # a whole tensor: the same mask on every rank
        new.train(module.training)
    made.modules[id(module)] = (module, new)
    for name, child in list(module._modules.items()):
        if child is not None and child is not base:
            module._modules[name] = _whole(made, f"{path}.{name}", child, base)
    _own(made, path, module)
    return new


def _own(made: Conversion, path: str, module: torch.nn.Module) -> None:
    left = False
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        whole: tuple[tuple[str, ...], ...] = ((),) * parameter.dim()
        made.parameters[id(parameter)] = hold(module, name, made.mesh, whole, (), made.parameters.get(id(parameter)))
        left = True
    if left:
        words = "a head that nothing vouches for: whole on every rank, on the gathered output of the base"
        made.lines.append(Line(path, type(module).__name__, module, "whole", words))
