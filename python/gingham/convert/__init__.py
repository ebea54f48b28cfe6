"""parallelize: a torch or Hugging Face model becomes one whose layers are cut over a mesh, in place, weights carried over."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from .. import nn
from ..checkpoint import pretrained
from ..functional import relayout
from ..mesh import Mesh, current
from . import attention, inputs, layers, meta
from .layers import ELEMENTWISE, Conversion
from .plan import show
from .rules import SHARED, TORCH, rules_of

__all__ = ["parallelize"]

STACKS = (
    torch.nn.Transformer,
    torch.nn.TransformerEncoder,
    torch.nn.TransformerDecoder,
    torch.nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer,
)


def parallelize(
    model: torch.nn.Module,
    mesh: Mesh | None = None,
    verbose: bool = False,
    io: str = "full",
    plan: Mapping[str, str] | None = None,
    tokens: int = 1024,
) -> Any:
    """Turns a torch.nn model or a transformers model (GPT-2, Llama, BERT, ViT, or any with a tp_plan of colwise and rowwise
    linears) into layers of gingham.nn in place, with its weights; returns the model (a new one if it is itself one layer).

    Known models keep activations cut over the whole grid between their layers. In a model that no rule knows, every linear
    takes and gives whole features of this rank's rows, which is right for any code that treats samples independently;
    plan={"path.*.fc1": "colwise", "path.*.fc2": "rowwise"} says more. Modules without a rule stay as they are, on this
    rank's rows, their weights copied and their gradients summed over the rows' ranks.

    io "full": the model takes full inputs, the same on every rank, and gives full outputs, so that the calling code stays as
    it was; labels= gives the one loss of the whole batch. io "local": inputs and outputs are this rank's blocks (ids and
    masks as mesh.scatter cuts them, features in outer, logits in inner).
    A model on the `meta` device gets its blocks only, drawn by Philox from (torch.initial_seed(), name, global element index)
    with the distributions of its own initialisation: the same bits on every grid, not those of the serial model.
    verbose prints the plan: every layer with its grid, its stationary operand, its block, bytes received in a step of
    `tokens` rows and memory, and every module left serial with the reason. Names of parameters stay, but for weights stored
    as one and held as three (GPT-2's c_attn, MultiheadAttention's in_proj): see the attribute `joins`.
    The lines of the plan are in `gingham_plan`. Dropout that a model's own code calls as a function, not as a module, draws
    from each rank's own generator.
    Raises ShapeError where heads do not divide by the ranks that cut features; NotImplementedError for a module that would
    be wrong on a part of the rows or features; warns of rules of a plan that fit nothing. A call with io "full" raises MeshError
    where a rank is given other inputs than the rest.
    """
    mesh = current(mesh)
    _check_call(model, io)
    rules, asked = rules_of(model, plan)
    config = getattr(model, "config", None)
    _check_mesh(model, mesh, rules.body)
    if rules.body == "outer":
        attention.register()
        config = config.get_text_config()  # type: ignore[union-attr]
    recipes = meta.record(model) if any(parameter.is_meta for parameter in model.parameters()) else None
    made = Conversion(model, mesh, rules, getattr(config, "hidden_size", None) if rules.body == "outer" else None)
    old = dict(model.named_parameters())
    ties = tied_names(model)
    top = region_of(model) if rules.body == "rows" else ""
    batch = batch_dim(model) if top else 0
    _embeddings(made, model, rules.body)
    model = _convert(made, "", model, "outer" if top else rules.body, None)
    _retie(made, model)
    _check_ties(model, ties)
    if recipes is not None:
        meta.draw(model, made, recipes, old)
    for path in sorted(set(rules.unused()) & asked):
        warnings.warn(f"parallelize: the rule {path!r} of the plan fits no linear of {type(model).__name__}", stacklevel=2)
    inputs.attach(model, mesh, io, "outer" if top else rules.body, batch, width_of(model) if top else None)
    pretrained.attach(model)
    model.gingham_plan = made.lines  # type: ignore[assignment]
    if verbose:
        show(made, tokens)
    return model


def _check_call(model: torch.nn.Module, io: str) -> None:
    if io not in ("full", "local"):
        raise ValueError(f"io={io!r}: expected 'full' or 'local'")
    if hasattr(model, "gingham_plan"):
        raise ValueError(f"parallelize: this {type(model).__name__} has been converted already")


def _check_mesh(model: torch.nn.Module, mesh: Mesh, body: str) -> None:
    if body == "outer" and mesh.outer.rows and set(mesh.outer.rows) & set(mesh.inner.features):
        raise NotImplementedError(f"{type(model).__name__} on {mesh}: sequence=True is not built for transformers models; leave it out")


def region_of(module: torch.nn.Module) -> str:
    """Why a module's inside may lie in outer and inner: a stack of torch's transformer layers, or a chain of linears."""
    if isinstance(module, STACKS) and layers.is_plain(module):
        return "stack"
    if isinstance(module, torch.nn.Sequential) and layers.is_plain(module) and any(isinstance(child, torch.nn.Linear) for child in module):
        links = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.RMSNorm, *ELEMENTWISE)
        if all(type(child) in links and layers.is_plain(child) for child in module):
            return "chain"
    return ""


def batch_dim(model: torch.nn.Module) -> int:
    """Which dim of a stack's input is the batch."""
    firsts = [module.batch_first for module in model.modules() if isinstance(module, torch.nn.MultiheadAttention)]
    return 0 if all(firsts) else 1


def _embeddings(made: Conversion, model: torch.nn.Module, body: str) -> None:
    """Before all else: a classifier that shares an embedding's weight may stand before it."""
    for path, module in list(model.named_modules()):
        for name, child in list(module._modules.items()):
            if type(child) is torch.nn.Embedding and layers.is_plain(child):
                if id(child) not in made.modules:
                    new = layers.convert_embedding(made, f"{path}.{name}".lstrip("."), child, body)
                    made.modules[id(child)] = (child, new)
                module._modules[name] = made.modules[id(child)][1]


def _convert(made: Conversion, path: str, module: Any, body: str, parent: torch.nn.Module | None) -> torch.nn.Module:
    """What stands for a module; for one that stands in several places, the same in all."""
    if id(module) not in made.modules:
        made.modules[id(module)] = (module, _converted(made, path, module, body, parent))
    return made.modules[id(module)][1]


def _converted(made: Conversion, path: str, module: Any, body: str, parent: torch.nn.Module | None) -> torch.nn.Module:
    if type(module).__module__.startswith("gingham."):
        return module
    layers.check_plain(path, module)
    if body == "rows" and region_of(module):
        _enter(made, path, module)
        body = "outer"
    leaf = _leaf(made, path, module, body, parent)
    if leaf is not None:
        return leaf
    if isinstance(module, torch.nn.Transformer):  # it compares its inputs' sizes with these
        module.d_model = made.mesh.interval(module.d_model, made.mesh.outer.features)[1]
        module.batch_first = True
    if attention.is_attention(module) and body == "outer" and made.rules.body == "outer":
        attention.prepare(module, made.mesh)
    roles = _roles_of_children(module)
    made.rules.roles.update({f"{path}.{name}".lstrip("."): role for name, role in roles.items()})
    made.rules.used.update(f"{path}.{name}".lstrip(".") for name in roles)
    for name, child in [pair for pair in module._modules.items() if pair[1] is not None]:
        module._modules[name] = _convert(made, f"{path}.{name}".lstrip("."), child, body, module)
    for group in SHARED:
        linears = [module._modules.get(name) for name in group]
        if "CrossAttention" in type(module).__name__:
            linears = linears[1:]
        if linears and all(type(layer) is nn.Linear for layer in linears):
            layers.share(made, linears)
    _own_parameters(made, path, module, body)
    return module


def _leaf(made: Conversion, path: str, module: Any, body: str, parent: torch.nn.Module | None) -> torch.nn.Module | None:
    """What a module without children becomes; None where it has no rule."""
    kind = type(module)
    if made.rules.role(path) == "copied":
        layers.copy_parameters(made, path, module, "the plan says so: it serves single heads")
        return module
    if layers.is_plain(module) and isinstance(module, torch.nn.Linear) or kind.__name__ == "Conv1D" and hasattr(module, "nf"):
        return layers.convert_linear(made, path, module, body, not isinstance(module, torch.nn.Linear))
    if layers.is_plain(module) and isinstance(module, torch.nn.LayerNorm | torch.nn.RMSNorm) or layers.is_root_norm(kind):
        return layers.convert_norm(made, path, module, body)
    if isinstance(module, torch.nn.MultiheadAttention):
        if body != "outer":
            raise NotImplementedError(f"{path}: a MultiheadAttention outside of torch's transformer layers; use gingham.nn.SelfAttention")
        new = attention.MultiheadAttention(module, made.mesh)
        return made.adopt(path, "attention", module, new, "outer->outer", {"in_proj_weight": "", "in_proj_bias": ""})
    if isinstance(module, torch.nn.Dropout):
        if parent is not None and attention.is_attention(parent) and attention.dropout_of(parent) is module:
            return layers.convert_dropout(made, path, module, "inner", (0, 1))
        inner = isinstance(parent, STACKS) and parent._modules.get("dropout") is module or getattr(module, "_between", False)
        return layers.convert_dropout(made, path, module, "inner" if inner else body)
    if layers.is_patches(module) and body == "outer":
        return layers.convert_patches(made, path, module, body)
    return None


def _roles_of_children(module: torch.nn.Module) -> dict[str, str]:
    """Roles that a module of torch gives its linears: a transformer layer by name, a chain by pairs of them."""
    for cls in type(module).__mro__:
        if cls.__name__ in TORCH and cls.__module__.startswith("torch."):
            return TORCH[cls.__name__]
    if region_of(module) != "chain":
        return {}
    roles: dict[str, str] = {}
    first: str | None = None
    between: list[torch.nn.Module] = []
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            if first is None:
                first, between = name, []
            else:
                roles |= {first: "colwise", name: "rowwise"}
                for each in between:
                    each._between = True  # type: ignore[assignment]
                first = None
        elif first is not None and type(child) not in ELEMENTWISE:
            first = None
        elif first is not None:
            between.append(child)
    return roles


def _enter(made: Conversion, path: str, module: torch.nn.Module) -> None:
    """A region inside a model of whole features: its input loses the features of other ranks, its output regains them."""
    mesh = made.mesh
    if not path or mesh.outer == mesh.layout("rows"):
        return
    if isinstance(module, STACKS) and batch_dim(module) != 0:
        raise NotImplementedError(f"{path}: {type(module).__name__} with batch_first=False inside another model; make it batch_first")

    def moved(x: Any, source: str, target: str) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() < 2:
            return x
        width = x.shape[-1] if source == "rows" else width_of(module)
        return relayout(x, mesh, mesh.layout(source), mesh.layout(target), width)

    def before(each: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        taken = {"src", "tgt", "memory", "input"}
        return (
            tuple(moved(x, "rows", "outer") if index < len(inputs.streams(module)) else x for index, x in enumerate(args)),
            {name: moved(x, "rows", "outer") if name in taken else x for name, x in kwargs.items()},
        )

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(lambda each, args, y: moved(y, "outer", "rows"))


def width_of(module: torch.nn.Module) -> int:
    """Features of a region's output."""
    linears = [each for each in module.modules() if isinstance(each, nn.Linear)]
    if isinstance(module, torch.nn.Sequential):
        return linears[-1].out_features
    return next(each.embed_dim for each in module.modules() if isinstance(each, attention.MultiheadAttention))


def _own_parameters(made: Conversion, path: str, module: torch.nn.Module, body: str) -> None:
    """Parameters that stand in the module itself."""
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and made.mesh.outer.rows:
        raise NotImplementedError(
            f"{path}: {type(module).__name__} would see a part of the batch; use LayerNorm, or a mesh with whole rows"
        )
    if body == "outer" and made.rules.body == "outer":
        layers.cut_loose(made, path, module, body)
    left = [name for name, parameter in module._parameters.items() if parameter is not None and id(parameter) not in _held(made)]
    if not left:
        return
    if body == "outer":
        named = ", ".join(f"{path}.{name}".lstrip(".") for name in left)
        raise NotImplementedError(f"{named} of {type(module).__name__}: no rule says how it is cut, and copied it would meet cut features")
    kind = type(module).__name__
    layers.copy_parameters(made, path, module, f"no layer of ours for {kind}: runs on this rank's rows with copied weights")


def _held(made: Conversion) -> set[int]:
    """Parameters that are new, or old ones whose new form is known and is put in at the end."""
    return {id(parameter) for parameter in made.parameters.values()} | set(made.parameters)


def _retie(made: Conversion, model: torch.nn.Module) -> None:
    """Modules that share a parameter share its new form."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in made.parameters:
                module._parameters[name] = made.parameters[id(parameter)]


def tied_names(model: torch.nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _check_ties(model: torch.nn.Module, ties: list[list[str]]) -> None:
    """Raises NotImplementedError where one parameter has become several, which would then be trained apart."""
    now = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    for group in ties:
        # a weight held as three lies in a module that itself must be one
        if len({now.get(name, id(model.get_submodule(name.rpartition(".")[0]))) for name in group}) > 1:
            raise NotImplementedError(f"{', '.join(group)} share one parameter and need it cut in different ways; untie them")
