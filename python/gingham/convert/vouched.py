"""Which code of transformers may run on a part of the features: that of classes whose results were compared with the original's,
and word for word copies of it, of which transformers has dozens.

A tp_plan says what its linears become, not that the code between them works on cut features: a norm without a weight, a softmax over
the width look like nothing from outside. So a body is cut along features ("outer") only where every forward in it is known here;
elsewhere its code sees whole features of this rank's rows ("rows"), which is all that a tp_plan assumes.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from importlib import import_module
from typing import Any

import torch

from .bytecode import chains
from .wrappers import is_foreign, passes_on, tree_of

COMPARED = ("llama", "mistral", "qwen2", "qwen3")  # decoders whose bodies the tests compare on every kind of mesh


def body_of(base: torch.nn.Module) -> str:
    """ "outer" where every forward of a model that only its tp_plan describes is known, else "rows"."""
    return "rows" if unknown(base) else "outer"


def unknown(base: torch.nn.Module) -> list[str]:
    """Classes in a model whose forward is none of the compared ones."""
    found = {
        type(module).__name__
        for module in base.modules()
        if not type(module).__module__.startswith(("torch.", "peft.", "gingham.")) and not passes_on(module) and not _is_known(module)
    }
    return sorted(found)


def _is_known(module: Any) -> bool:
    from transformers.activations import ACT2CLS

    if type(module).__module__ == "transformers.activations":
        return any(type(module) is (each[0] if isinstance(each, tuple) else each) for each in ACT2CLS.values())
    return not is_foreign(module) and text_of(type(module).forward) in known_forwards()


@cache
def known_forwards() -> frozenset[str]:
    texts = set()
    for family in COMPARED:
        try:
            module = import_module(f"transformers.models.{family}.modeling_{family}")
        except ImportError:  # an older release without the family
            continue
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, torch.nn.Module) and cls.__module__ == module.__name__:
                texts.add(text_of(cls.forward))
    return frozenset(texts - {""})


@cache
def text_of(function: Any) -> str:
    """A function's code without what does nothing: annotations, docstrings, decorators. Empty where there is no source."""
    tree = tree_of(function)
    if tree is None:
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.FunctionDef):
            node.returns, node.decorator_list = None, []
            node.body = [_plain(each) for each in node.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
        elif isinstance(node, ast.If | ast.For | ast.With):
            node.body = [_plain(each) for each in node.body]
    return ast.dump(tree)


def _plain(node: ast.stmt) -> ast.stmt:
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return ast.copy_location(ast.Assign([node.target], node.value), node)
    return node


@cache
def reads(cls: Any) -> frozenset[str]:
    """The children whose weight or bias a class's own forward, or a method that it calls, reads, but for its dtype, device or shape:
    {"embed_positions"}."""
    found, left, seen = set(), ["forward"] if "forward" in vars(cls) else [], set()
    while left:
        name = left.pop()
        seen.add(name)
        for chain in chains(getattr(cls, name)) or ():
            for last in ("weight", "bias"):
                at = chain.index(last) if last in chain else 0
                if at and (chain[at + 1 :] or ("",))[0] not in ("dtype", "device", "shape"):
                    found.add(".".join(chain[:at]))
            if chain and inspect.isfunction(vars(cls).get(chain[0])) and chain[0] not in seen:
                left.append(chain[0])
    return frozenset(found)
