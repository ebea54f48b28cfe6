"""What stands around a model or a layer without changing it, seen through when paths are matched to rules.

peft puts `base_layer` between a layer's name and its weight (and adapters beside it), torch.compile `_orig_mod`, FSDP
`_fsdp_wrapped_module`. Example: h.0.attn.c_attn.base_layer is seen as h.0.attn.c_attn. A module of the user's own is seen through
where it hands its arguments on and returns what comes back.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import torch

from .entry import HERE

AROUND = ("base_layer", "original_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
LIBRARIES = ("torch.", "transformers.", "peft.", "gingham.")


def core(model: Any) -> Any:
    """The model that wrappers stand around: its class, configuration and forward are what rules and the border go by."""
    while True:
        if _is_peft(model) and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        elif passes_on(model):
            inner = next(child for child in model._modules.values() if child is not None)
        else:
            inner = next((model._modules[name] for name in AROUND if model._modules.get(name) is not None), None)
        if inner is None or inner is model:
            return model
        model = inner


def _is_peft(module: Any) -> bool:
    return any(cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def path_of(model: torch.nn.Module, inner: torch.nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is inner)


def seen_paths(model: torch.nn.Module) -> dict[str, str]:
    """Of every module's path, also where it is one of several, the path without the names of wrappers."""
    seen: dict[str, str] = {}

    def walk(module: torch.nn.Module, path: str, plain: str) -> None:
        seen[path] = plain
        around = passes_on(module)
        for name, child in module._modules.items():
            if child is not None:
                hidden = around or name in AROUND or name == "modules_to_save" or path.endswith("modules_to_save")
                walk(child, f"{path}.{name}".lstrip("."), plain if hidden else f"{plain}.{name}".lstrip("."))

    walk(model, "", "")
    return seen


def passes_on(module: torch.nn.Module) -> bool:
    """Whether a module of the user's own does nothing: one child, no tensor, and a forward that hands on what it is given and returns
    what comes back. It is tried on objects that can do nothing else."""
    children = [name for name, child in module._modules.items() if child is not None]
    if len(children) != 1 or module._parameters or module._buffers or "forward" in vars(module) or not is_foreign(module):
        return False
    return all(_hands_on(module, children[0], training) for training in (True, False))


class _Child(torch.nn.Module):
    """Stands for the child of a wrapper: keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.result = object()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((*args, *kwargs.values()))
        return self.result


def _hands_on(module: torch.nn.Module, name: str, training: bool) -> bool:
    stub, child = object.__new__(type(module)), _Child()
    vars(stub).update(vars(module), _modules={name: child}, training=training)
    vars(stub).pop(HERE, None)  # what a border sees for the first time is no batch
    args, kwargs = [], {}
    for parameter in inspect.signature(type(module).forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            args += [object(), object()]
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            kwargs["given"] = object()
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kwargs[parameter.name] = object()
        else:
            args.append(object())
    try:
        returned = type(module).forward(stub, *args[1:], **kwargs)
    except Exception:  # whatever its code asks of an object that can do nothing
        return False
    given = {id(each) for each in (*args[1:], *kwargs.values())}
    return returned is child.result and len(child.calls) == 1 and {id(each) for each in child.calls[0]} <= given


def tree_of(function: Any) -> ast.FunctionDef | None:
    """A function's syntax, None where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def is_foreign(module: torch.nn.Module) -> bool:
    """Whether a module's forward is none of the libraries' that this package knows."""
    forward = vars(module).get("forward", type(module).forward)
    return not f"{inspect.unwrap(forward).__module__}.".startswith(LIBRARIES)


def check_known(model: torch.nn.Module, base: torch.nn.Module, path: str) -> None:
    """Raises NotImplementedError for code inside a known model that is not the model's: nothing says that it may see cut features."""
    for name, module in base.named_modules():
        if is_foreign(module) and not passes_on(module):
            raise NotImplementedError(
                f"{f'{path}.{name}'.strip('.') or 'the model'}: {type(module).__name__} stands in a {type(model).__name__}, whose"
                " activations are cut along their features; nothing vouches for its code on a part of them. Put the model's own module"
                " there, or parallelize a wrapper that only hands on its arguments"
            )


def adapter_roles(path: str, module: torch.nn.Module, role: str) -> dict[str, str]:
    """Roles of the linears of low rank that peft's LoRA puts beside a linear of a role, [in, r] and [r, out]: x -> B(A(x)) + y.
    Raises NotImplementedError for variants whose code reads weights."""
    if not isinstance(module._modules.get("lora_A"), torch.nn.ModuleDict):
        return {}
    for name in ("lora_magnitude_vector", "lora_embedding_A"):
        if len(getattr(module, name, ())):
            raise NotImplementedError(f"{path}: LoRA with {name} reads whole weights, which no rank has; use plain LoRA on linears")
    first = "rowwise" if role == "rowwise" else "keep"
    second = "keep" if role == "rowwise" else role
    found = {f"{path}.lora_A.{name}": first for name in module.lora_A}  # type: ignore[union-attr]
    return found | {f"{path}.lora_B.{name}": second for name in module.lora_B}  # type: ignore[union-attr, operator]


def dropouts_of_adapter(module: torch.nn.Module) -> list[torch.nn.Module]:
    held = module._modules.get("lora_dropout")
    return [each for each in held.children() if isinstance(each, torch.nn.Dropout)] if held is not None else []
