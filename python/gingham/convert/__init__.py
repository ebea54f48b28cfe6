"""parallelize: a torch or Hugging Face model becomes one whose layers are cut over a mesh, in place, weights carried over."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import nn
from ..checkpoint import pretrained
from ..mesh import Mesh, current
from . import adapters, attention, calls, identity, inputs, layers, loose, meta, sequence
from .agree import agree, agreed_seed
from .entry import Above, enclose, register_forward_method
from .heads import base_of, keep_whole, known_loss
from .layers import Conversion
from .losses import is_transformers
from .regions import STACKS, batch_dim, enter, hold, region_of, roles_of_children, width_of
from .rules import REQUIRED, SHARED, Rules, matches, rules_of
from .table import show
from .wrappers import adapter_roles, check_known, core, dropouts_of_adapter, path_of, seen_paths

__all__ = ["parallelize", "register_forward_method"]

adapters.watch()


def parallelize(
    model: torch.nn.Module,
    mesh: Mesh | None = None,
    verbose: bool = False,
    io: str = "full",
    plan: Mapping[str, str] | None = None,
    tokens: int = 1024,
    whole: Sequence[str] = (),
) -> Any:
    """Turns a torch.nn model or a transformers model (GPT-2, Llama, BERT, ViT, or any with a tp_plan of colwise and rowwise
    linears) into layers of gingham.nn in place, with its weights; returns the model (a new one if it is itself one layer).

    Known models, and word for word copies of their code, keep activations cut over the whole grid between their layers. In other
    models with a tp_plan code between the linears sees whole features of this rank's rows, as the plan assumes; the plan's first
    line says so. In a model that no rule knows, every linear takes and gives whole features of this rank's rows, which is right for
    any code that treats samples independently (the first call checks that: NotImplementedError);
    plan={"path.*.fc1": "colwise", "path.*.fc2": "rowwise"} says more. Modules without a rule stay as they are, on this rank's rows,
    their weights copied and their gradients summed over the rows' ranks. A head of transformers that is not known runs whole on
    every rank, on the gathered output of its base, with its class's own loss. Wrappers are seen through: torch.compile's, FSDP's,
    peft's LoRA (also when it comes after: its adapters are converted at the next call), modules that hand on their arguments.

    io "full": the model's forward, and each public method that runs its layers, takes full inputs, the same on every rank, and gives
    full outputs, so that the calling code stays as it was (register_forward_method: other methods); labels= gives the one loss of the
    whole batch. On a mesh with data, inputs and outputs are those of this data rank's own batch, the same on its ranks: labels= gives the
    mean over the job's valid tokens; a loss that the caller takes of outputs, a mean over samples, counts with the part that these are
    of the job's. generate() there: synced_gpus=True, so that no data rank ends before the others. Tensors whose first dim is that of the
    first are cut like it, those in dicts, lists, tuples, mappings and dataclasses too; whole=("positions", "batch.positions") names those
    that are none of a batch. io "local": inputs and outputs are this rank's
    blocks (ids and masks as mesh.scatter cuts them, features in outer, logits in inner).
    Ranks that hold other values than rank 0 get rank 0's, with a warning. Optimizers that hold the parameters hold the new ones;
    those of a weight that becomes several raise at their step. A model on the `meta` device gets its blocks only, drawn by Philox from
    (rank 0's torch.initial_seed(), name, global element index) with the distributions of its own initialisation: the same bits on
    every grid, not those of the serial model.
    verbose prints the plan: every layer with its grid, its stationary operand, its block, bytes received in a step of
    `tokens` rows and memory, and every module left serial with the reason. Names of parameters stay, but for weights stored
    as one and held as three (GPT-2's c_attn, MultiheadAttention's in_proj): see the attribute `joins`.
    The lines of the plan are in `gingham_plan`. Random numbers that a model's own code draws (dropout
    as a function, noise) differ by block of rows and features, and depend on the mesh (convert/generators.py).
    Raises ShapeError where heads do not divide by the ranks that cut features; NotImplementedError for a module that would
    be wrong on a part of the rows or features, or that stands where a rule expects a linear; MeshError where a rank's model has other
    parameters, and in a call with io "full" where a rank is given other inputs than the rest; warns of rules of a plan that fit
    nothing.
    """
    made = _parallelize(model, current(mesh), io, plan, whole)
    if verbose:
        show(made, tokens)
    return made.model


def _parallelize(model: torch.nn.Module, mesh: Mesh, io: str, plan: Mapping[str, str] | None, whole: Sequence[str]) -> Conversion:
    inner = _checked(model, io)
    agree(model, mesh)
    rules, asked = rules_of(inner, plan)
    loss, apart = _look(model, inner, mesh, rules, io)
    recipes = meta.record(inner) if any(parameter.is_meta for parameter in model.parameters()) else None
    seed = agreed_seed(mesh) if recipes is not None else 0
    made = Conversion(model, mesh, rules, _width(inner) if rules.body == "outer" else None, read=layers.read_by_others(model))
    if rules.cut_heads and rules.body == "rows":
        made.lines.append(layers.whole_features(base_of(inner) or inner))
    old, ties = dict(model.named_parameters()), tied_names(model)
    top = region_of(inner) if rules.body == "rows" else ""  # around it may stand what only hands on
    batch, body = batch_dim(inner) if top else 0, "outer" if top else rules.body
    _embeddings(made, model, rules.body)
    if apart:
        _convert_base(made, inner)
    else:
        model = _convert(made, "", model, body, None)
    _retie(made, model)
    _check_ties(model, ties)
    _check_rules(made, inner)
    if recipes is not None:
        meta.draw(model, made, recipes, old, seed)
    _keep_parameters(made, old)
    for path in sorted((set(rules.unused()) & asked) - set(type(inner)._tp_plan or () if apart else ())):
        warnings.warn(f"parallelize: the rule {path!r} of the plan fits no linear of {type(inner).__name__}", stacklevel=3)
    sequence.attach(model, mesh)
    _attach(made, model, io, body, (batch, width_of(inner) if top else None, loss, whole), apart)
    for each in {id(each): each for each in (model, core(model))}.values():
        pretrained.attach(each)
    made.model = model
    return made


def _keep_parameters(made: Conversion, old: dict[str, torch.nn.Parameter]) -> None:
    names = {id(parameter): name for name, parameter in reversed(old.items())}
    own = (old, *(module._parameters for _, module in made.paths.values()))
    identity.keep(made.mesh, names, old.values(), made.parameters, own)


def _attach(
    made: Conversion, model: torch.nn.Module, io: str, body: str, rest: tuple[int, int | None, str | None, Sequence[str]], apart: bool
) -> None:
    """Puts the border around the model, or around its base where the head stands apart."""
    inner = core(model)
    base: Any = base_of(inner)
    stand = core(base) if apart else inner
    border = inputs.Border(stand, made.mesh, io, body, *rest, made.rules.cut_heads)
    calls.install()
    inputs.attach(stand, border, core(base) if base is not None and not apart else None)
    if io == "full":
        calls.note(border.inside, made.mesh)
        loose.give_outside(model, border.inside)
    elif not border.hugging:
        calls.counting(stand, made.mesh, body)
    if apart:
        holder = path_of(inner, base).partition(".")[0]
        enclose(inner, Above(border, holder))
    border.watch(made.cutting, made.joining)
    for each in {id(each): each for each in (model, inner)}.values():
        each.gingham_plan = made.lines  # type: ignore[assignment]


def _look(model: torch.nn.Module, inner: Any, mesh: Mesh, rules: Rules, io: str) -> tuple[str | None, bool]:
    """What a model is, before anything of it changes: the method of its loss, and whether its head stands apart, on whole features
    of the whole batch, since nothing vouches for it. Raises NotImplementedError for code that nothing vouches for."""
    adapters.refuse_adapters(model)
    rules.seen = {path: plain for path, plain in seen_paths(model).items() if path != plain}
    base = base_of(inner)
    if rules.body == "outer":
        check_known(inner, core(base or inner), path_of(model, core(base or inner)))
    loss = known_loss(inner) if is_transformers(inner) else None
    sequence.check_model(inner, mesh, rules.family, loss, base)
    if base is not None and loss is None and io == "full" and mesh.data.size > 1:
        raise NotImplementedError(
            f"{type(inner).__name__} on a mesh with data={mesh.data.size}: nothing vouches for its head, which would run whole on each"
            " data rank, its gradients unsummed; convert its base, and give the head layers of gingham.nn, or leave data out"
        )
    if base is not None and loss is None and io == "local" and rules.body == "outer":
        raise NotImplementedError(f"{type(inner).__name__}: nothing vouches for its head on cut features; use io='full'")
    if rules.cut_heads:
        if mesh.outer.rows and set(mesh.outer.rows) & set(mesh.inner.features):
            raise NotImplementedError(f"{type(inner).__name__} on {mesh}: sequence=True is not built for transformers models; leave it out")
        attention.register()
    return loss, base is not None and loss is None and io == "full"


def _width(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "hidden_size", None)


def _convert_base(made: Conversion, inner: Any) -> None:
    base = base_of(inner)
    path = path_of(made.model, base)  # type: ignore[arg-type]
    owner, _, name = path.rpartition(".")
    new = _convert(made, path, base, made.rules.body, made.model.get_submodule(owner))
    made.model.get_submodule(owner)._modules[name] = new
    keep_whole(made, path_of(made.model, inner), inner, new)


def _checked(model: torch.nn.Module, io: str) -> Any:
    inner = core(model)
    if io not in ("full", "local"):
        raise ValueError(f"io={io!r}: expected 'full' or 'local'")
    if hasattr(model, "gingham_plan") or hasattr(inner, "gingham_plan"):
        raise ValueError(f"parallelize: this {type(model).__name__} has been converted already")
    unknown = next((name for name, parameter in model.named_parameters() if torch.nn.parameter.is_lazy(parameter)), None)
    if unknown is not None:
        raise ValueError(f"parallelize: {unknown} has no shape yet: call the model once, on one batch, before it is converted")
    return inner


def _check_rules(made: Conversion, model: Any) -> None:
    """Raises NotImplementedError where a rule that every model of the family needs has fitted no linear."""
    left = set(REQUIRED.get(made.rules.family or "", ())) - made.rules.fitted
    if left and model.config.get_text_config().num_hidden_layers:
        rule = min(left)
        stands = {type(module).__name__ for path, (_, module) in made.paths.items() if matches(rule, made.rules.seen.get(path, path))}
        raise NotImplementedError(
            f"{type(model).__name__}: the rule {rule!r} of the family {made.rules.family!r} fits no linear;"
            f" {', '.join(sorted(stands)) or 'nothing'} stands there. Convert before the layer is replaced, or give plan="
        )


def _embeddings(made: Conversion, model: torch.nn.Module, body: str) -> None:
    """Before all else: a classifier that shares an embedding's weight may stand before it."""
    for path, module in list(model.named_modules()):
        for name, child in list(module._modules.items()):
            if type(child) is torch.nn.Embedding and layers.is_plain(child) and f"{path}.{name}".lstrip(".") not in made.read:
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
    made.paths[path] = (path, module)
    region = None
    if body == "rows" and region_of(module):
        region, body = enter(made, path, module), "outer"
    leaf = _leaf(made, path, module, body, parent)
    if leaf is not None:
        return leaf
    if isinstance(module, torch.nn.Transformer):  # it compares its inputs' sizes with these
        module.d_model = made.mesh.interval(module.d_model, made.mesh.outer.features)[1]
        module.batch_first = True
    cut = _cuts_heads(made, path, module)
    if cut is not None:
        attention.prepare(module, made.mesh, cut)
    _adapters(made, path, module)
    roles = roles_of_children(module)
    made.rules.roles.update({f"{path}.{name}".lstrip("."): role for name, role in roles.items()})
    made.rules.used.update(f"{path}.{name}".lstrip(".") for name in roles)
    for name, child in [pair for pair in module._modules.items() if pair[1] is not None]:
        module._modules[name] = _convert(made, f"{path}.{name}".lstrip("."), child, body, module)
    for group in SHARED:
        linears: list[Any] = [layers.base_layer(module._modules.get(name)) for name in group]
        if "CrossAttention" in type(module).__name__:
            linears = linears[1:]
        if linears and all(type(layer) is nn.Linear for layer in linears) and len({layer.in_features for layer in linears}) == 1:
            layers.share(made, linears)
    if cut:
        attention.copy_heads(module, made.mesh)
    _own_parameters(made, path, module, body)
    if region is not None:
        hold(module, region)
    return module


def _cuts_heads(made: Conversion, path: str, module: torch.nn.Module) -> bool | None:
    """Whether a transformers attention module works on some of the heads, by the roles of its projections; None for other modules."""
    if not attention.is_attention(module) or not made.rules.cut_heads:
        return None
    return any(made.rules.role(f"{path}.{name}") in ("colwise", "qkv") for name, _ in module.named_modules() if name)


def _adapters(made: Conversion, path: str, module: torch.nn.Module) -> None:
    """What stands beside a linear in peft's wrapper goes by that linear's role."""
    if "base_layer" not in module._modules:
        return
    role = made.rules.role(f"{path}.base_layer")
    roles = adapter_roles(path, module, role)
    made.rules.roles.update(roles)
    made.rules.used.update(roles)
    if role == "rowwise":
        for dropout in dropouts_of_adapter(module):
            dropout._between = True  # type: ignore[assignment]


def _leaf(made: Conversion, path: str, module: Any, body: str, parent: torch.nn.Module | None) -> torch.nn.Module | None:
    """What a module without children becomes; None where it has no rule."""
    kind = type(module)
    if made.rules.role(path) == "copied":
        layers.copy_parameters(made, path, module, "the plan says so: it serves single heads")
        return module
    if path in made.read:
        if body != "rows":
            raise NotImplementedError(
                f"{path}: other code reads the weight of this {kind.__name__}, of which a rank has a part; call it there"
            )
        layers.copy_parameters(made, path, module, "other code reads its weight")
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
            cut = _cuts_heads(made, path.rpartition(".")[0], parent)
            return layers.convert_dropout(made, path, module, "inner" if cut else "rows", (0, 1))
        inner = isinstance(parent, STACKS) and parent._modules.get("dropout") is module or getattr(module, "_between", False)
        return layers.convert_dropout(made, path, module, "inner" if inner else body)
    if layers.is_patches(module) and body == "outer":
        return layers.convert_patches(made, path, module, body)
    return None


def _own_parameters(made: Conversion, path: str, module: torch.nn.Module, body: str) -> None:
    """Parameters that stand in the module itself."""
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and made.mesh.outer.rows:
        raise NotImplementedError(
            f"{path}: {type(module).__name__} would see a part of the batch; use LayerNorm, or a mesh with whole rows"
        )
    if body == "outer" and made.rules.body == "outer":
        layers.cut_loose(made, path, module, body)
    held = _held(made) if body == "outer" else {id(parameter) for parameter in made.parameters.values()}
    left = [name for name, parameter in module._parameters.items() if parameter is not None and id(parameter) not in held]
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
