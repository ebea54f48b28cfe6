"""What a method takes off its self, read from its bytecode: notebooks and spawned processes have no source.

Example: `return self.norm(self.fc.weight.sum())` gives [("norm",), ("fc", "weight", "sum")]; a bare self, as in self(x), gives ().
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF", "STORE_FAST_LOAD_FAST")
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR")
NOISE = ("PUSH_NULL", "CACHE", "RESUME", "NOP", "EXTENDED_ARG", "COPY_FREE_VARS", "PRECALL")


def chains(function: Any) -> list[tuple[str, ...]] | None:
    """Attributes taken one after the other off a function's first argument, each chain until something else is done with it; None
    for what is not written in Python or has no argument."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or not code.co_argcount:
        return None
    return list(_chains(code, code.co_varnames[0]))


def _chains(code: CodeType, me: str) -> Iterator[tuple[str, ...]]:
    steps: list[tuple[str, str]] = []
    for each in dis.get_instructions(code):
        if each.opname in NOISE:
            continue
        if each.opname.startswith(LOADS):
            names = each.argval if isinstance(each.argval, tuple) else (each.argval,)
            steps += [("load", name) for name in names]
        else:
            steps.append(("attribute" if each.opname in ATTRIBUTES else each.opname, str(each.argval)))
    for index, step in enumerate(steps):
        if step != ("load", me):
            continue
        found = []
        for kind, name in steps[index + 1 :]:
            if kind != "attribute":
                break
            found.append(name)
        if found or not steps[index + 1][0].startswith(("LOAD_SUPER", "MAKE_CELL", "STORE")):
            yield tuple(found)
    for constant in code.co_consts:  # comprehensions and functions inside
        if isinstance(constant, CodeType) and me in constant.co_freevars:
            yield from _chains(constant, me)
