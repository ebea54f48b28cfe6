"""What torch's operations do to a tensor that is cut over ranks: one rule a family of them, found by name.

A rule looks at the arguments before the operation runs. It raises Wrong where the result would be this rank's instead of
the job's, Unknown where it cannot tell, and returns what marks the result (None: it is no block any more).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..mesh import mesh_of
from ..mesh.layout import Cuts, Names, words
from ..mesh.operations import told

After = Callable[[Any], Any] | None
Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], After]

CONVERSIONS = {"__float__", "__int__", "__bool__", "__index__", "__complex__"}  # not Tensor.float, ..
ARITHMETIC = {"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "div"}
KEEP_SHAPE = {
    "softmax",
    "log_softmax",
    "softmin",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "sort",
    "argsort",
    "roll",
    "flip",
    "normalize",
    "renorm",
}
GRAPH = 200  # nodes that are looked at
SCRAMBLED: Names = ("?",)  # cut, but no longer in one piece


class Wrong(Exception):
    """what: what happened and how the tensor is cut; fix: what to write instead."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


class Unknown(Exception):
    """An operation that no rule covers."""


def name_of(func: Any) -> str:
    """ "add" for torch.add, Tensor.add, add_, __add__, __radd__ and __iadd__; an attribute by its own name."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return f".{getattr(getattr(func, '__self__', None), '__name__', '')}"
    if name in CONVERSIONS:
        return name
    core = name.strip("_")
    if name.startswith("__") and core[:1] in ("r", "i") and core[1:] in ARITHMETIC:
        core = core[1:]
    return {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder"}.get(core, core)


def is_checked(x: Any) -> bool:
    return hasattr(x, "cuts") and hasattr(x, "checks")


def checked_in(args: Sequence[Any]) -> list[Any]:
    found = []
    for x in args:
        found += checked_in(x) if isinstance(x, tuple | list) else [x] if is_checked(x) else []
    return found


def tensors_in(args: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for x in args:
        found += tensors_in(x) if isinstance(x, tuple | list) else [x] if isinstance(x, torch.Tensor) else []
    return found


def described(x: Any) -> str:
    return f"a block {tuple(x.shape)} cut {words(x.cuts)}"


def mark(x: Any, cuts: Cuts, partial: Names = ()) -> After:
    """What gives results x's mesh and these cuts."""
    checks = x.checks

    def after(result: Any) -> Any:
        if isinstance(result, tuple | list) and not isinstance(result, torch.Size):
            return type(result)([checks.marked(each, cuts, partial) for each in result])
        return checks.marked(result, cuts, partial)

    return after


def any_cut(x: Any) -> bool:
    return any(x.cuts)


def unmarked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    return None


def read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """A number for Python."""
    x = args[0]
    if x.partial:
        raise Wrong(
            f"{name_of(func)}() reads this rank's part of a sum over {', '.join(x.partial)}",
            "take the loss by gingham.cross_entropy, or sum what mesh.gather returns",
        )
    return None


def plain_parameters(x: Any, args: Sequence[Any], what: str) -> None:
    """A tensor with a gradient that every rank holds for itself, and that meets a block, gets this rank's part of it."""
    if not any_cut(x):
        return
    for other in tensors_in(args):
        if is_checked(other):
            continue
        mesh = mesh_of(other) if isinstance(other, DTensor) else None
        if mesh is not None:
            parameter, fix = told(mesh, other)
            raise Wrong(f"{what} of {described(x)} with {parameter}: each rank has another part of it", fix)
        if _has_plain_parameter(other):
            raise Wrong(
                f"{what} of {described(x)} with a plain tensor {tuple(other.shape)} that has a gradient: each rank would get its own"
                " part of that gradient, and copies would drift apart",
                "use the layer of gingham.nn (Linear, LayerNorm, Embedding, ..), which sums it over the ranks",
            )


def _has_plain_parameter(x: torch.Tensor) -> bool:
    """Whether a plain tensor comes of leaves that each rank holds for itself, by torch's operations and not through a layer of ours."""
    if x.is_leaf or x.grad_fn is None:
        return x.requires_grad
    seen: set[Any] = set()
    left: list[Any] = [x.grad_fn]
    while left and len(seen) < GRAPH:
        node = left.pop()
        if node in seen or getattr(type(node), "_forward_cls", type).__module__.startswith("gingham."):
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            return True
        left += [each for each, _ in node.next_functions if each is not None]
    return False


def aligned(tensors: Sequence[Any], ndim: int) -> list[Names]:
    """The cuts of broadcast operands, dim by dim from the right."""
    found: list[Names] = []
    for back in range(ndim, 0, -1):
        here = [(x.cuts[-back], x.shape[-back]) for x in tensors if x.dim() >= back]
        wide = [cuts for cuts, size in here if size != 1 or cuts]
        cut = next((cuts for cuts in wide if cuts), ())
        if any(cuts != cut for cuts in wide):
            shown = " and ".join(described(x) for x in tensors)
            raise Wrong(
                f"an operation of {shown}: they lie on different ranks' elements",
                "bring both into one layout: layout= of the layers, or mesh.gather and mesh.scatter",
            )
        found.append(cut)
    return found


def elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    everything = [*args, *kwargs.values()]
    blocks = checked_in(everything)
    x, name = blocks[0], name_of(func)
    partial: Names = next((each.partial for each in blocks if each.partial), ())
    if partial and not _linear(func, name, args, blocks):
        raise Wrong(
            f"{name} of this rank's part of a sum over {', '.join(partial)} is not that of the sum",
            "take the sum of what mesh.gather returns, or gingham.cross_entropy for a loss",
        )
    plain_parameters(max(blocks, key=lambda each: sum(map(bool, each.cuts))), everything, name)
    ndim = max(each.dim() for each in tensors_in(everything))
    cuts = tuple(aligned(blocks, ndim))
    if partial and any(set(partial) & set(names) for names in cuts):
        raise Wrong(
            f"{name} of this rank's part of a sum over {', '.join(partial)} and elements that these ranks cut: it lacks the others' parts",
            "take the sum of mesh.gather(x), or use gingham's own function (LayerNorm, RMSNorm, SelfAttention, ..)",
        )
    _note_plain(x, everything, cuts, name)
    return mark(x, cuts, partial)


def _note_plain(x: Any, everything: Sequence[Any], cuts: Cuts, name: str) -> None:
    """Plain tensors that go with a block along a cut dim: the other ranks must have other values."""
    try:
        sizes = torch.broadcast_shapes(*(each.shape for each in tensors_in(everything)))
    except RuntimeError:
        full = next((each for each in tensors_in(everything) if not is_checked(each)), None)
        if full is None or not any(cuts):
            return  # the operation itself says it
        raise Wrong(
            f"{name} of {described(x)} and a plain tensor {tuple(full.shape)}: their sizes do not fit",
            "a full tensor? mesh.scatter(full) gives this rank's part of it",
        ) from None
    for plain in tensors_in(everything):
        for back in range(1, plain.dim() + 1) if not is_checked(plain) else ():
            unit = cuts[-back]
            if unit and plain.shape[-back] == sizes[-back] > 1:
                x.checks.note_plain(plain, plain.dim() - back, unit, f"{name} of {described(x)}")
                break


def _linear(func: Any, name: str, args: tuple[Any, ...], blocks: list[Any]) -> bool:
    if getattr(func, "__name__", "") in ("__rtruediv__", "__rdiv__", "reciprocal"):
        return False  # the sum is below
    if name in ("add", "sub", "neg", "clone", "to", "float", "double", "detach", "contiguous", "requires_grad", "cpu"):
        return True
    return name in ("mul", "div") and len(blocks) == 1 and (name == "mul" or is_checked(args[0]))


LAST_DIM = ("sort", "argsort", "topk", "kthvalue", "mode", "median_dim")  # where none is named


def dims_of(x: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> list[int]:
    """The dims that a reduction names, all by default."""
    given = kwargs.get("dim", kwargs.get("dims", kwargs.get("axis", args[at] if len(args) > at else None)))
    if given is None and name in LAST_DIM:
        given = -1
    if given is None and name == "normalize":
        given = 1
    if isinstance(given, bool | torch.dtype | torch.Tensor | str):
        given = None
    if given is None or given == ():
        return list(range(x.dim()))
    return [dim % max(1, x.dim()) for dim in (given if isinstance(given, tuple | list | torch.Size) else (given,))]


def reduction(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    x, name = args[0], name_of(func)
    at = {"norm": 2, "quantile": 2, "roll": 2, "topk": 2, "kthvalue": 2, "renorm": 2, "normalize": 2}.get(name, 1)
    dims = dims_of(x, name, args, kwargs, at)
    over = tuple(axis for dim in dims for axis in x.cuts[dim]) if x.dim() else ()
    partial = x.partial
    if over and name == "sum":
        partial = tuple(dict.fromkeys((*x.partial, *over)))
    elif over:
        raise Wrong(
            f"{name} over a dim that ranks cut: {described(x)}; the result is that of this rank's part",
            FIXES.get(name, "take it of mesh.gather(x), or use gingham's own function (cross_entropy, LayerNorm, accuracy, ..)"),
        )
    if x.partial and name != "sum":
        raise Wrong(f"{name} of this rank's part of a sum over {', '.join(x.partial)}", "gather first")
    if name in KEEP_SHAPE:
        return mark(x, x.cuts)
    keep = kwargs.get("keepdim", any(each is True for each in args[at + 1 : at + 3]) if len(args) > at else False)
    if keep:
        cuts: Cuts = tuple(() if dim in dims else names for dim, names in enumerate(x.cuts))
    else:
        cuts = tuple(names for dim, names in enumerate(x.cuts) if dim not in dims)
    return mark(x, cuts, partial)


FIXES = {
    "mean": "use a loss of gingham (cross_entropy: the mean over the job), or y.sum() / the global number of elements",
    "softmax": "use gingham.nn.SelfAttention or gingham.cross_entropy, or softmax of mesh.gather(x)",
    "log_softmax": "use gingham.cross_entropy(logits, target)",
    "layer_norm": "use gingham.nn.LayerNorm(features, layout=...)",
    "rms_norm": "use gingham.nn.RMSNorm(features, layout=...)",
    "argmax": "use gingham.accuracy, or argmax of mesh.gather(logits)",
}


def normalisation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """layer_norm(x, shape, weight, bias) and rms_norm: over the last dims."""
    x, shape = args[0], args[1] if len(args) > 1 else kwargs["normalized_shape"]
    dims = list(range(x.dim() - len(shape), x.dim()))
    reduction(func, (x, dims), {})
    plain_parameters(x, [*args, *kwargs.values()], name_of(func))
    return mark(x, x.cuts)


def random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    x, name = args[0], name_of(func)
    if name.endswith("dropout"):
        training = kwargs.get("training", args[2] if len(args) > 2 else True)
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        if not training or p == 0:
            return mark(x, x.cuts)
    if any_cut(x):
        raise Wrong(
            f"{name}: random numbers for {described(x)}: every rank would draw the same for its own part",
            "use gingham.nn.Dropout, whose mask goes by global position, or draw the full tensor and mesh.scatter it",
        )
    x.checks.note_random(name)
    return mark(x, x.cuts)


def matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """[.., m, k] by [.., k, n]; F.linear's weight is [n, k]."""
    first: Any = args[0]
    second: Any = args[1] if len(args) > 1 else kwargs.get("weight", kwargs.get("other", kwargs.get("mat2")))
    name = name_of(func)
    blocks = checked_in([first, second])
    fullest = max(blocks, key=lambda each: sum(map(bool, each.cuts)))
    plain_parameters(fullest, [*args, *kwargs.values()], name)
    cuts_a = first.cuts if is_checked(first) else ((),) * first.dim()
    cuts_b = second.cuts if is_checked(second) else ((),) * second.dim()
    if name == "linear":
        cuts_b = cuts_b[::-1]
    inner_b = cuts_b[-2] if len(cuts_b) > 1 else cuts_b[-1]
    if cuts_a[-1] or inner_b:
        shown = " and ".join(described(each) for each in blocks)
        raise Wrong(
            f"{name} sums over a dim that ranks cut: {shown}",
            "use gingham.nn.Linear for weights, gingham.matmul for blocks of operands 'a' and 'b', or whole features (layout 'rows')",
        )
    rows, columns = cuts_a[:-1], cuts_b[-1:] if len(cuts_b) > 1 else ()
    batch = aligned_batches(cuts_a[:-2], cuts_b[:-2], blocks)
    row = rows[-1:] if rows else ()
    if row and columns and set(row[0]) & set(columns[0]):
        raise Wrong(
            f"{name} pairs every row with every row, of {described(blocks[0])}: other ranks' rows are missing",
            "gather one of the two: mesh.gather(y)",
        )
    return mark(fullest, (*batch, *row, *columns))


def aligned_batches(a: Cuts, b: Cuts, blocks: list[Any]) -> Cuts:
    length = max(len(a), len(b))
    pairs = zip(((),) * (length - len(a)) + a, ((),) * (length - len(b)) + b, strict=True)
    found = []
    for one, other in pairs:
        if one and other and one != other:
            raise Wrong(
                f"a product of {' and '.join(map(described, blocks))}: their rows lie on different ranks", "use one layout for both"
            )
        found.append(one or other)
    return tuple(found)


def attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    q, k, v = (args[index] if len(args) > index else kwargs[name] for index, name in enumerate(("query", "key", "value")))
    for each in checked_in([q, k, v]):
        if each.cuts[-1] or (each is not q and each.cuts[-2]):
            raise Wrong(f"attention over {described(each)}: keys or features of other ranks are missing", "use gingham.nn.SelfAttention")
    x = checked_in([q, k, v])[0]
    p = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
    if p and any_cut(x):
        return random(torch.nn.functional.dropout, (x, p), {})
    return mark(x, x.cuts)


OF_FEATURES = (
    *("triplet_margin_loss", "triplet_margin_with_distance_loss", "cosine_embedding_loss"),
    *("multi_margin_loss", "multilabel_margin_loss", "multilabel_soft_margin_loss"),
)


def loss(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """Losses of torch.nn.functional on a block."""
    x, name = checked_in([*args, *kwargs.values()])[0], name_of(func)
    how = kwargs.get("reduction", next((each for each in args[2:] if isinstance(each, str)), "mean"))
    if name in OF_FEATURES and x.dim() and x.cuts[-1]:
        raise Wrong(f"{name} compares features that ranks cut: {described(x)}", "take the loss of mesh.gather(y)")
    classes = name in ("cross_entropy", "nll_loss", "kl_div") and x.dim() > 1 and x.cuts[1 if x.dim() > 1 else 0]
    if classes and name != "kl_div" or how not in ("sum", "none") and any_cut(x):
        raise Wrong(
            f"{name} on {described(x)} is the loss of this rank's part: gradients would be as many times too large as there are parts",
            "use gingham.cross_entropy(logits, target), or the loss of mesh.gather(y)",
        )
    axes = tuple(dict.fromkeys(axis for names in x.cuts for axis in names))
    if how == "sum":
        return mark(x, (), axes)
    if how == "none" and name in ("cross_entropy", "nll_loss"):
        return mark(x, (*x.cuts[:1], *x.cuts[2:]))
    if how == "none" and name in OF_FEATURES:
        return mark(x, x.cuts[:-1])
    return mark(x, x.cuts if how == "none" else ())


def lookup(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """F.embedding(ids, table)."""
    ids = args[0]
    if is_checked(ids):
        plain_parameters(ids, [*args, *kwargs.values()], "embedding")
        return mark(ids, (*ids.cuts, ()))
    return None


def convolution(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    x = args[0]
    plain_parameters(x, [*args, *kwargs.values()], name_of(func))
    if any(x.cuts[1:]):
        raise Wrong(f"{name_of(func)} of {described(x)}: neighbours lie on other ranks", "give it whole features: mesh.scatter(x, 'rows')")
    return mark(x, x.cuts)
