"""Operations that move elements: shapes, orders of dims, pieces and what is put together of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from ..mesh.layout import Cuts, Names
from .rules import SCRAMBLED, After, Unknown, Wrong, any_cut, checked_in, described, is_checked, mark, name_of, plain_parameters


def reshape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    x, old = args[0], tuple(args[0].shape)
    if not is_checked(x):
        return mark(args[1], args[1].cuts)  # like the other

    def after(result: Any) -> Any:
        return x.checks.marked(result, reshaped(x.cuts, old, tuple(result.shape)), x.partial)

    if len(args) > 1 and isinstance(args[1], torch.dtype):
        return mark(x, x.cuts)
    return after


def reshaped(cuts: Cuts, old: Sequence[int], new: Sequence[int]) -> Cuts:
    """Cuts after a reshape: of dims that become one, or one that becomes several, the first may be cut."""
    found: list[Names] = [()] * len(new)
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(a), j + len(b)
        while prod(old[k] for k in a) != prod(new[k] for k in b):
            if prod(old[k] for k in a) < prod(new[k] for k in b) and i < len(old):
                a, i = [*a, i], i + 1
            elif j < len(new):
                b, j = [*b, j], j + 1
            elif i < len(old):
                a, i = [*a, i], i + 1
            else:
                break
        held = [k for k in a if cuts[k]]
        if not held or not b:
            continue
        big = [k for k in a if old[k] != 1 or cuts[k]]
        target = next((k for k in b if new[k] != 1), b[0])
        found[target] = cuts[held[0]] if len(held) == 1 and big[0] == held[0] else SCRAMBLED
    return tuple(found)


def permuted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    x, name, n = args[0], name_of(func), args[0].dim()
    if name in (".T", "t", "adjoint", ".mT", ".H"):
        order = list(range(n))
        order[-2:] = order[-2:][::-1]
    elif name == "permute":
        given = kwargs.get("dims", args[1:])
        order = list(given[0] if len(given) == 1 and not isinstance(given[0], int) else given)
    elif name in ("movedim", "moveaxis"):
        raise Unknown(name)
    else:
        one, other = args[1:3] if len(args) > 2 else (kwargs.get("dim0", kwargs.get("axis0")), kwargs.get("dim1", kwargs.get("axis1")))
        order = list(range(n))
        order[one], order[other] = order[other], order[one]
    return mark(x, tuple(x.cuts[dim] for dim in order), x.partial)


def inserted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    x = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if name_of(func) == "unsqueeze":
        at = dim % (x.dim() + 1)
        return mark(x, (*x.cuts[:at], (), *x.cuts[at:]), x.partial)
    gone = [each for each in range(x.dim()) if x.shape[each] == 1] if dim is None else [each % x.dim() for each in _many(dim)]
    return mark(x, tuple(names for each, names in enumerate(x.cuts) if each not in gone or x.shape[each] != 1), x.partial)


def _many(dim: Any) -> Sequence[int]:
    return dim if isinstance(dim, tuple | list) else (dim,)


def expanded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    x = args[0]
    if not is_checked(x):
        return mark(args[1], args[1].cuts)  # like the other

    def after(result: Any) -> Any:
        return x.checks.marked(result, ((),) * (result.dim() - x.dim()) + x.cuts, x.partial)

    return after


# Samples are independent: some of this rank's, or two batches of them one after the other, are rows like any.
KEEPS_ROWS = ("split", "chunk", "narrow", "tensor_split")


def is_rows(x: Any, names: Names) -> bool:
    return set(names) <= set(x.checks.mesh.outer.rows)


def pieces(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """split, chunk, unbind, narrow, select: along whole dims."""
    x, name = args[0], name_of(func)
    at = {"split": 2, "chunk": 2, "tensor_split": 2}.get(name, 1)
    dim = kwargs.get("dim", args[at] if len(args) > at else 0) % max(1, x.dim())
    if x.cuts[dim] and not (name in KEEPS_ROWS and is_rows(x, x.cuts[dim])):
        raise Wrong(
            f"{name} along a dim that ranks cut, of {described(x)}: each rank takes a piece of its own part", "take it of mesh.gather(x)"
        )
    cuts = x.cuts if name in KEEPS_ROWS else (*x.cuts[:dim], *x.cuts[dim + 1 :])
    return mark(x, cuts, x.partial)


def joined(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    tensors = args[0] if args else kwargs["tensors"]
    blocks = checked_in([tensors])
    x, stack = blocks[0], name_of(func) == "stack"
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % (x.dim() + stack)
    plain_parameters(x, [tensors], name_of(func))
    plain = [each for each in tensors if not is_checked(each) and each.numel()]
    if plain and not stack and x.cuts[dim]:
        raise Wrong(
            f"{name_of(func)} of {described(x)} and a plain tensor {tuple(plain[0].shape)} along a dim that ranks cut: each rank would put"
            " it into its own part",
            "put together full tensors, then mesh.scatter",
        )
    if any(each.cuts != x.cuts for each in blocks):
        raise Wrong(f"{name_of(func)} of {' and '.join(map(described, blocks))}: they lie on different ranks' elements", "use one layout")
    if stack:
        return mark(x, (*x.cuts[:dim], (), *x.cuts[dim:]), x.partial)
    if x.cuts[dim] and not is_rows(x, x.cuts[dim]):
        cuts = tuple(SCRAMBLED if each == dim else names for each, names in enumerate(x.cuts))
        return mark(x, cuts, x.partial)
    return mark(x, x.cuts, x.partial)


def _by_tensors(x: Any, index: Sequence[Any]) -> None:
    """Raises Wrong where plain numbers index a dim that is cut: they count from 0 on every rank. Those found in a block do not."""
    dim = 0
    for each in index:
        if each is Ellipsis:
            dim = x.dim() - sum(1 for other in index[index.index(Ellipsis) + 1 :] if other is not None)
            continue
        numbers = isinstance(each, list) or isinstance(each, torch.Tensor) and not is_checked(each) and each.dtype != torch.bool
        if numbers and x.cuts[dim]:
            raise _by_number("an index by a tensor", dim, x)
        dim += 0 if each is None else each.dim() if isinstance(each, torch.Tensor) and each.dtype == torch.bool else 1


def _by_number(what: str, dim: int, x: Any) -> Wrong:
    return Wrong(
        f"{what} along dim {dim} of {described(x)}: numbers count from 0 on every rank, each takes elements of its own part",
        "index what mesh.gather returns, or a dim that is whole",
    )


def along(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """index_select, gather, scatter, ..: by numbers along one dim."""
    x, name = args[0], name_of(func)
    at = 2 if name == "take_along_dim" else 1
    dim = kwargs.get("dim", args[at] if len(args) > at else None)
    index: Any = kwargs.get("index", kwargs.get("indices", args[3 - at] if len(args) > 3 - at else None))
    if is_checked(x) and not (is_checked(index) and any(index.cuts)):
        flat = tuple(range(x.dim())) if dim is None else (dim % max(1, x.dim()),)
        if any(x.cuts[each] for each in flat):
            raise _by_number(name, flat[0], x)
    elif is_checked(x) and dim is not None and x.cuts[dim % x.dim()] and name in ("gather", "take_along_dim", "scatter"):
        raise _by_number(name, dim % x.dim(), x)
    raise Unknown(name)


def _numbered(x: Any, index: Any) -> tuple[tuple[Any, ...], bool]:
    """The index as a tuple, and whether tensors or lists are in it. Raises Wrong where these number a cut dim."""
    index = index if isinstance(index, tuple) else (index,)
    numbered = any(isinstance(each, torch.Tensor | list) for each in index)
    if numbered and any_cut(x):
        _by_tensors(x, index)
    return index, numbered


def assigned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """x[index] = value."""
    x, index, value = args
    if not is_checked(x):
        return None
    index, numbered = _numbered(x, index)
    if numbered:
        return None
    indexed(func, (x, index), {})
    if is_checked(value):
        raise Unknown("an assignment of a block")
    return None


def found(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """nonzero, argwhere: numbers that count within a block, of good use in that block only."""
    x = args[0]
    if not any_cut(x):
        return None

    def after(result: Any) -> Any:
        many = result if isinstance(result, tuple) else (result,)
        marked = [x.checks.marked(each, (SCRAMBLED, *((),) * (each.dim() - 1))) for each in many]
        return tuple(marked) if isinstance(result, tuple) else marked[0]

    return after


def all_reduce(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """torch.distributed's, in place: what was a part of a sum is the sum."""
    x = args[0] if args else kwargs["tensor"]
    if is_checked(x):
        x.partial = ()
    return None


def like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    """x.new_zeros(size): dims as long as x's are cut as they are."""
    x = args[0]

    def after(result: Any) -> Any:
        fits = result.dim() == x.dim()
        cuts = tuple(names if fits and size == length else () for names, size, length in zip(x.cuts, result.shape, x.shape, strict=False))
        return x.checks.marked(result, cuts) if fits else result

    return after


def indexed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> After:
    x, index = args[0], args[1]
    if not is_checked(x):
        return None
    index, numbered = _numbered(x, index)
    if numbered and any_cut(x):
        raise Unknown("an index by a tensor")
    if numbered:
        return None
    left = x.dim() - sum(each is not None and each is not Ellipsis for each in index)
    cuts: list[Names] = []
    dim = 0
    for each in (*index, *([] if Ellipsis in index else [Ellipsis])):
        if each is None:
            cuts.append(())
        elif each is Ellipsis:
            cuts += x.cuts[dim : dim + left]
            dim += left
        else:
            whole = isinstance(each, slice) and each in (slice(None), slice(0, None), slice(None, None, 1))
            if x.cuts[dim] and not whole and not (isinstance(each, slice) and is_rows(x, x.cuts[dim])):
                raise Wrong(
                    f"an index {each} into dim {dim} of {described(x)}: each rank takes an element of its own part",
                    "index what mesh.gather returns, or a dim that is whole",
                )
            if isinstance(each, slice):
                cuts.append(x.cuts[dim])
            dim += 1
    return mark(x, tuple(cuts), x.partial)
