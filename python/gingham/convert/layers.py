"""What becomes of one module: a layer of gingham.nn that holds its weights cut, or the module itself with its weights copied."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from .. import nn
from ..autograd.relayout import relayout
from ..mesh import Mesh
from .fused import FusedLinears
from .loose import hold
from .rules import LOOSE, Rules, matches
from .vouched import reads, unknown


@dataclass
class Line:
    """One line of the plan: the module's path, what it became, and why where it stays as it was."""

    path: str
    kind: str
    layer: Any
    layout: str = ""
    reason: str = ""


PLAIN_VALUES = (int, float, str, bool, tuple, torch.dtype, type(None))


@dataclass
class Conversion:
    """One call of parallelize: what it has made. `parameters`: new ones by the id of the old; `modules`: (old, new), old kept alive."""

    model: torch.nn.Module
    mesh: Mesh
    rules: Rules
    width: int | None
    parameters: dict[int, torch.nn.Parameter] = field(default_factory=dict)
    modules: dict[int, tuple[torch.nn.Module, torch.nn.Module]] = field(default_factory=dict)
    embeddings: dict[int, nn.Embedding] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    paths: dict[str, tuple[str, torch.nn.Module]] = field(default_factory=dict)  # the old modules, by the paths they were met at
    read: set[str] = field(default_factory=set)  # paths of layers whose parameters other code reads
    cutting: dict[str, torch.nn.Module] = field(default_factory=dict)  # linears that a caller's plan cuts, and those that join
    joining: list[torch.nn.Module] = field(default_factory=list)
    copied: set[int] = field(default_factory=set)  # old parameters that every rank has whole, by id
    notes: list[str] = field(default_factory=list)
    region: Any = None  # of regions.py, one for all: a layer may stand in two

    def ends(self, role: str, body: str) -> str:
        return {
            "colwise": f"{body}->inner",
            "rowwise": f"inner->{body}",
            "keep": f"{body}->{body}",
            "head": f"{body}->inner",
            "whole": f"{body}->rows",
            "qkv": f"{body}->inner",
        }[role]

    def adopt(
        self, path: str, kind: str, old: torch.nn.Module, new: torch.nn.Module, layout: str, pairs: dict[str, str] | None = None
    ) -> Any:
        """Notes that `new` stands for `old`; pairs: new parameter names by old ones, by default the same."""
        names = pairs if pairs is not None else {name: name for name, _ in old.named_parameters(recurse=False)}
        made = dict(new.named_parameters())
        for before, after in names.items():
            if after in made and old._parameters.get(before) is not None:
                self._place(id(old._parameters[before]), new, after, made[after])
        for name, value in vars(old).items():  # what other code may ask of the layer: num_embeddings, normalized_shape, nf, a user's own
            if not name.startswith("_") and not hasattr(new, name) and isinstance(value, PLAIN_VALUES):
                setattr(new, name, value)
        new.train(old.training)
        self._hand_on_hooks(path, old, new)
        self.lines.append(Line(path, kind, new, layout))
        return new

    def follow(self, path: str, role: str, layer: torch.nn.Module) -> None:
        """Notes a linear by whose output whole features end or begin again, where nothing but a caller's plan says so."""
        if self.rules.body == "rows" and not self.rules.cut_heads:
            if role in ("colwise", "head", "qkv"):
                self.cutting[path] = layer
            elif role == "rowwise":
                self.joining.append(layer)

    def _place(self, before: int, new: torch.nn.Module, name: str, parameter: Any) -> None:
        """A parameter that several modules share stays one where it is cut alike in them; see also _check_ties."""
        first: Any = self.parameters.setdefault(before, parameter)
        if first is not parameter and (first.placements, first.shape) == (parameter.placements, parameter.shape):
            owner, _, last = name.rpartition(".")
            new.get_submodule(owner)._parameters[last] = first

    def _hand_on_hooks(self, path: str, old: torch.nn.Module, new: torch.nn.Module) -> None:
        kinds = [name for name in vars(old) if name.endswith("_hooks") and getattr(old, name) and "state_dict" not in name]
        for name in kinds:
            getattr(new, name).update(getattr(old, name))
        for name in [f"{kind}_{way}" for kind in kinds for way in ("with_kwargs", "always_called")]:
            if name in vars(old):
                getattr(new, name).update(getattr(old, name))
        if kinds:
            warnings.warn(f"parallelize: hooks on {path} now see this rank's blocks, laid out as its line of the plan says", stacklevel=2)


ELEMENTWISE = (
    torch.nn.Identity,
    torch.nn.Dropout,
    torch.nn.ReLU,
    torch.nn.ReLU6,
    torch.nn.LeakyReLU,
    torch.nn.ELU,
    torch.nn.SELU,
    torch.nn.CELU,
    torch.nn.GELU,
    torch.nn.SiLU,
    torch.nn.Mish,
    torch.nn.Tanh,
    torch.nn.Sigmoid,
    torch.nn.Softplus,
    torch.nn.Hardswish,
)
PLAIN = (
    *(torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.MultiheadAttention, torch.nn.Sequential),
    *(torch.nn.Transformer, torch.nn.TransformerEncoder, torch.nn.TransformerDecoder),
    *(torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer),
)


def is_plain(module: torch.nn.Module) -> bool:
    """Whether a module computes what its class of torch does: no forward of its own, no weight made of others (weight_norm, pruning)."""
    known = next((cls for cls in PLAIN if isinstance(module, cls)), None)
    if known is None:
        return True
    own = type(module).forward is not known.forward or "forward" in vars(module)
    return not own and not hasattr(module, "parametrizations") and (not hasattr(module, "weight") or "weight" in module._parameters)


def check_plain(path: str, module: torch.nn.Module) -> None:
    """Raises NotImplementedError for what would be wrong on a part of its features: a weight made of others, a function between torch's
    linears that mixes features."""
    if isinstance(module, PLAIN) and (
        hasattr(module, "parametrizations") or hasattr(module, "weight") and "weight" not in module._parameters
    ):
        kind = type(module).__name__
        raise NotImplementedError(f"{path}: the weight of {kind} is made of other parameters (weight_norm, pruning); remove that first")
    function = getattr(module, "activation", None)
    if isinstance(module, torch.nn.TransformerEncoderLayer | torch.nn.TransformerDecoderLayer) and not is_elementwise(function):
        raise NotImplementedError(
            f"{path or type(module).__name__}: activation {function!r} may mix features of several ranks; take relu, gelu, silu, .."
        )


def is_elementwise(function: Any) -> bool:
    functions = {F.relu, F.gelu, F.silu, F.leaky_relu, F.elu, F.selu, F.mish, F.relu6, F.hardswish, F.softplus, torch.relu, torch.tanh}
    return function in functions or type(function) in ELEMENTWISE


def given_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(recurse=False))


def convert_linear(made: Conversion, path: str, old: Any, body: str, transposed: bool) -> torch.nn.Module | None:
    """torch.nn.Linear, or with `transposed` transformers' Conv1D, whose weight is [in, out]."""
    into, out = old.weight.shape if transposed else reversed(old.weight.shape)
    pattern = made.rules.pattern(path)
    role = "keep" if pattern is None else made.rules.roles[pattern]
    if pattern is not None:
        made.rules.fitted.add(pattern)
    elif body == "outer" and made.rules.body == "outer":
        raise NotImplementedError(
            f"{path}: no rule of {type(made.model).__name__} says how this linear is cut, and its code would meet cut features;"
            f" say it with plan={{{path!r}: 'colwise' | 'rowwise' | 'keep'}}"
        )
    if role == "qkv":
        fused = FusedLinears(path, into, out, made.mesh, given_of(old), made.ends(role, body), transposed)
        if transposed:
            be_conv1d(fused, into, out)
        made.follow(path, role, fused)
        return made.adopt(path, "linear x 3", old, fused, made.ends(role, body), {})
    layout = made.ends(role, body)
    tied = made.embeddings.get(id(old.weight))
    if tied is None and id(old.weight) in made.copied and layout == "rows->rows":
        return None  # its weight is a table that stays whole: so does it
    if tied is not None and not transposed:
        given = {"bias": old.bias} if old.bias is not None else {}
        new: torch.nn.Module = nn.Classifier(into, out, old.bias is not None, made.mesh, tied=tied, layout=layout, given=given)
        return made.adopt(path, "classifier, tied", old, new, layout)
    swapped = None if made.mesh.outer != made.mesh.inner else "auto"
    new = nn.Linear(into, out, old.bias is not None, made.mesh, layout, swapped, transposed=transposed, given=given_of(old))
    made.follow(path, role, new)
    return made.adopt(path, "linear", old, new, layout)


def convert_late(path: str, old: torch.nn.Linear, mesh: Mesh, layout: str, three: bool) -> torch.nn.Module:
    """A linear that came into the model after it was converted; three: beside one whose weight is three."""
    if three:
        new: torch.nn.Module = FusedLinears(path, old.in_features, old.out_features, mesh, given_of(old), layout, False)
    else:
        swapped = None if mesh.outer != mesh.inner else "auto"
        new = nn.Linear(old.in_features, old.out_features, old.bias is not None, mesh, layout, swapped, given=given_of(old))
    return new.train(old.training)


def share(made: Conversion, linears: list[Any]) -> None:
    """Linears called on one x: one step. Their weights may be cut anew, which replaces them."""
    before = {id(parameter): (layer, name) for layer in linears for name, parameter in layer.named_parameters()}
    kept = [parameter for layer in linears for parameter in layer.parameters()]  # alive, so that no id is used again
    nn.share_input(*linears)
    for old, new in list(made.parameters.items()):
        if id(new) in before:
            layer, name = before[id(new)]
            made.parameters[old] = layer.get_parameter(name)
    del kept


def be_conv1d(fused: FusedLinears, into: int, out: int) -> None:
    """Makes what stands for transformers' Conv1D an instance of it, by which tools such as peft know a linear."""
    from transformers.pytorch_utils import Conv1D

    if not _CONV1D:
        _CONV1D.append(type("FusedLinears", (FusedLinears, Conv1D), {"__module__": __name__, "__doc__": FusedLinears.__doc__}))
    fused.__class__ = _CONV1D[0]
    fused.nx, fused.nf = into, out  # type: ignore[assignment]


_CONV1D: list[type] = []


def convert_embedding(made: Conversion, path: str, old: torch.nn.Embedding, body: str) -> torch.nn.Module:
    if old.max_norm is not None or old.scale_grad_by_freq or old.sparse:
        raise NotImplementedError(f"{path}: Embedding with max_norm, scale_grad_by_freq or sparse gradients; use a plain one")
    new = nn.Embedding(old.num_embeddings, old.embedding_dim, made.mesh, padding_idx=old.padding_idx, given=given_of(old))
    made.embeddings[id(old.weight)] = new
    leave(new, made.mesh, body, old.embedding_dim)
    return made.adopt(path, "embedding", old, new, body)


def leave(layer: torch.nn.Module, mesh: Mesh, body: str, features: int) -> None:
    """A layer whose output is in outer hands it on in the layout `body`."""
    if mesh.layout(body) != mesh.outer:
        layer.register_forward_hook(lambda module, args, y: relayout(y, mesh, mesh.outer, mesh.layout(body), features))


def convert_norm(made: Conversion, path: str, old: Any, body: str) -> torch.nn.Module | None:
    """A norm over the width of the model; None for one over anything else, which the caller copies."""
    root = isinstance(old, torch.nn.RMSNorm) or is_root_norm(type(old))
    shape = tuple(old.normalized_shape) if hasattr(old, "normalized_shape") else tuple(old.weight.shape)
    if made.rules.role(path) == "copied" or len(shape) != 1 or made.width not in (None, shape[0]):
        return None
    if root:
        eps = old.eps if hasattr(old, "eps") else old.variance_epsilon
        new: torch.nn.Module = nn.RMSNorm(shape[0], eps, made.mesh, body, given=given_of(old))
        return made.adopt(path, "rms norm", old, new, body)
    affine = old.elementwise_affine
    new = nn.LayerNorm(shape[0], old.eps, made.mesh, body, old.bias is not None, elementwise_affine=affine, given=given_of(old))
    return made.adopt(path, "layer norm", old, new, body)


def is_root_norm(cls: Any) -> bool:
    """Whether a class computes what Llama's norm does: transformers has dozens of copies, and some that add 1 to the weight."""
    if not cls.__name__.endswith("RMSNorm") or not cls.__module__.startswith("transformers."):
        return False
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    forwards = [inspect.getsource(inspect.unwrap(each.forward)) for each in (cls, LlamaRMSNorm)]
    return forwards[0] == forwards[1]


class Patches(nn.PatchEmbedding):
    """A convolution that takes images apart (kernel = stride): [rows, channels, h, w] -> [rows, width here, h / p, w / p]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y.transpose(1, 2).unflatten(2, (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1]))


def convert_patches(made: Conversion, path: str, old: torch.nn.Conv2d, body: str) -> torch.nn.Module:
    if made.mesh.layout(body) != made.mesh.outer:
        raise NotImplementedError(f"{path}: a convolution over patches in a model that no rule knows")
    high, wide = old.kernel_size
    new = Patches(None, (high, wide), old.in_channels, old.out_channels, old.bias is not None, made.mesh, given=given_of(old))
    return made.adopt(path, "patches", old, new, body)


def is_patches(module: torch.nn.Module) -> bool:
    return (
        isinstance(module, torch.nn.Conv2d)
        and module.kernel_size == module.stride
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def convert_dropout(made: Conversion, path: str, old: torch.nn.Dropout, layout: str, dims: tuple[int, int] = (0, -1)) -> torch.nn.Module:
    if old.p >= 1:
        raise NotImplementedError(f"{path}: Dropout({old.p}) leaves nothing")
    return made.adopt(path, "dropout", old, nn.Dropout(old.p, mesh=made.mesh, layout=layout, dims=dims), layout)


def copy_parameters(made: Conversion, path: str, module: torch.nn.Module, reason: str) -> None:
    """Leaves a module as it is: its parameters are whole on every rank, their gradients summed over the ranks of other rows
    (and, where a plan says that they serve single heads, of other heads)."""
    mesh = made.mesh
    heads = made.rules.role(path) == "copied"
    summed = tuple(name for name in mesh.sizes if name in {*mesh.outer.rows, *(mesh.inner.features if heads else ())})
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            whole: tuple[tuple[str, ...], ...] = ((),) * parameter.dim()
            made.copied.add(id(parameter))
            made.parameters[id(parameter)] = hold(module, name, mesh, whole, summed, made.parameters.get(id(parameter)))
    made.lines.append(Line(path, type(module).__name__, module, "heads" if heads else "rows", reason))


def whole_features(base: torch.nn.Module) -> Line:
    """The line of the plan that says why activations between the blocks of a model with a tp_plan are not cut along features."""
    left = unknown(base)
    why = f"nothing vouches for {', '.join(left)} on a part of them" if left else "its plan has layers whose code needs them"
    words = f"whole features between its layers, since {why}; the bytes of gathering them are in the lines of the linears and norms"
    return Line("", type(base).__name__, torch.nn.Identity(), "rows", words)


def base_layer(module: torch.nn.Module | None) -> torch.nn.Module | None:
    """The layer that an adapter of peft stands around."""
    while module is not None and "base_layer" in module._modules:
        module = module._modules["base_layer"]
    return module


def read_by_others(model: torch.nn.Module) -> set[str]:
    """Paths of layers whose weight or bias other code than their own forward reads, which must find a plain whole tensor there."""
    found = set()
    for path, module in model.named_modules():
        if type(module).__module__.startswith(("torch.", "peft.", "gingham.")):
            continue
        for child in reads(type(module)):  # type: ignore[arg-type]
            try:
                layer = module.get_submodule(child)
            except AttributeError:
                continue
            if isinstance(layer, torch.nn.Linear | torch.nn.Embedding | torch.nn.LayerNorm | torch.nn.RMSNorm):
                found.add(f"{path}.{child}".lstrip("."))
    return found


def cut_loose(made: Conversion, path: str, module: torch.nn.Module, body: str) -> None:
    """Parameters of a known model that its code adds to activations: cut like the body's features."""
    mesh = made.mesh
    layout = mesh.layout(body)
    for name, parameter in list(module._parameters.items()):
        if parameter is None or id(parameter) in made.parameters:
            continue
        if name not in LOOSE and not any(matches(f"*.{each}", f"{path}.{name}") for each in LOOSE):
            continue
        cuts = ((),) * (parameter.dim() - 1) + (layout.features,)
        made.parameters[id(parameter)] = hold(module, name, mesh, cuts, layout.rows)
        made.lines.append(Line(f"{path}.{name}", "parameter", None, body))
