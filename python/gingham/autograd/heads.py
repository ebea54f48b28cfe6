"""All-to-all of heads: a rank that has a piece of the sequence with all heads gets the whole sequence with some of the heads, and back.

Example, 2 ranks, 4 places, 2 heads: rank 0 has places 0 and 1 of both heads; it sends its places of head 1 and gets places 2 and 3 of
head 0. Also known as Ulysses (Jacobs et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ShapeError
from ..function import Function
from ..graph_ops import KNOWN, Meta, Traced, find, names_of, traced
from ..plan.formulas import shares
from .ring import CutSequence, Way, attend_cut


def attend_by_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, way: Way) -> torch.Tensor:
    """`attend_cut` of pieces q [time here, batch, heads, width], k and v [time here, batch, kv heads, width] -> as q: each rank attends
    over the whole sequence with heads / r of the heads, that is with its part of the key and value heads and the queries that share them.

    Bytes a rank, where all divides: (2 q + kv) (r-1)/r^2 words forward and the same backward, q those of the queries over the whole
    sequence, kv of keys and values; masks of queries add theirs, forward. Kept for backward: q, k, v, out of its heads. Raises ShapeError
    where there are fewer key and value heads than ranks.
    """
    at = way.sequence
    heads, kv_heads, width = q.shape[2], k.shape[2], q.shape[3]
    parts = cut_heads(kv_heads, len(at.lengths), way.owner, at.mesh.rank)
    shared = heads // kv_heads
    columns = [(shared + 2) * width * count for count in parts]
    label = f"{way.owner}: heads over {' and '.join(at.names)} (causal={way.causal}, scale={way.scale:.6g}, p={way.p:g})"
    split = [part.split([count * each for count in parts], 2) for part, each in ((q, shared), (k, 1), (v, 1))]
    packed = torch.cat([part.flatten(2) for each in zip(*split, strict=True) for part in each], 2)
    mine = parts[at.place]
    whole = turn(packed, at, columns, True, label).unflatten(2, (-1, width))
    qw, kw, vw = whole.split([mine * shared, mine, mine], 2)
    first = sum(parts[: at.place]) * shared
    if mask is not None:
        mask = _mask(mask, at, [count * shared for count in parts], f"{label}, its mask")
    out = attend_cut(qw, kw, vw, mask, way.turned_to(heads, first))
    return turn(out.flatten(2), at, [count * shared * width for count in parts], False, label).unflatten(2, (-1, width))


def cut_heads(kv_heads: int, ranks: int, owner: str, rank: int) -> list[int]:
    """How many of the key and value heads each rank attends with."""
    if kv_heads < ranks:
        raise ShapeError(
            f"{owner}: rank {rank} got {kv_heads} heads of keys and values for all-to-all of heads over {ranks} ranks, expected at least"
            f" {ranks}; a ring (ring=True, attention='ring') takes any number"
        )
    return shares(kv_heads, ranks)


def _mask(mask: torch.Tensor, at: CutSequence, parts: Sequence[int], label: str) -> torch.Tensor:
    """A mask [batch, heads, time here, keys] (each may be 1) for all queries and the heads of this rank, keys in their order."""
    axis = at.mesh.joint(at.names)
    own = at.lengths[at.place]
    varies = mask.shape[2] == own if torch.compiler.is_compiling() else _varies([rows for (rows,) in axis.sizes([mask.shape[2]])], at)
    if varies:
        rows = mask.expand(-1, -1, own, -1).permute(2, 1, 0, 3)  # [time here, heads, batch, keys]
        counts = parts if mask.shape[1] > 1 else [1] * len(parts)
        rows = rows.expand(-1, sum(counts), -1, -1).flatten(1).unsqueeze(1)
        moved = turn(rows, at, [mask.shape[0] * mask.shape[3] * count for count in counts], True, label)
        return moved.reshape(len(moved), -1, mask.shape[0], mask.shape[3]).permute(2, 1, 0, 3)
    return mask if mask.shape[1] == 1 else mask.narrow(1, sum(parts[: at.place]), parts[at.place])


def _varies(rows: Sequence[int], at: CutSequence) -> bool:
    """Whether a mask is one of queries; a rank of one place cannot tell by its own."""
    return any(count > 1 for count in rows) or max(at.lengths) <= 1


def turn(x: torch.Tensor, at: CutSequence, columns: Sequence[int], there: bool, label: str) -> torch.Tensor:
    """there: x [time here, batch, all columns] -> [time, batch, this rank's columns], in the order of the sequence; else back. columns: of
    each rank, side by side. Differentiable, the gradient of each being the other; what a rank has it keeps, the rest is one message a
    peer."""
    if torch.compiler.is_compiling():
        words = [at.mesh.handle, ",".join(at.names), ",".join(map(str, at.lengths)), str(at.place), str(int(at.zigzag))]
        return traced("turn", [*words, ",".join(map(str, columns)), str(int(there)), label], [x])[0]
    return _Turn.apply(x, at, tuple(columns), there, label)


class _Turn(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, at: CutSequence, columns: tuple[int, ...], there: bool, label: str) -> torch.Tensor:
        ctx.arguments = at, columns, there, label
        at.mesh.say(label)
        return (_there if there else _back)(x, at, columns)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        at, columns, there, label = ctx.arguments
        return turn(grad, at, columns, not there, label), None, None, None, None


def _there(x: torch.Tensor, at: CutSequence, columns: Sequence[int]) -> torch.Tensor:
    time, batch, _ = x.shape
    parts, mine = x.split(list(columns), 2), columns[at.place]
    shapes = {peer: [length, batch, mine] for peer, length in enumerate(at.lengths)}
    arrived = _exchanged(x, at, parts, shapes, sum(columns) * batch)
    whole = at.mesh.empty([sum(at.lengths), batch, mine], x.dtype)
    for peer, piece in {**arrived, at.place: parts[at.place]}.items():
        done = 0
        for position, count in at.runs(peer):
            whole[position : position + count] = piece[done : done + count]
            done += count
    return whole


def _back(x: torch.Tensor, at: CutSequence, columns: Sequence[int]) -> torch.Tensor:
    batch, own = x.shape[1], at.lengths[at.place]
    pieces = [torch.cat([x[position : position + count] for position, count in at.runs(peer)]) for peer in range(len(at.lengths))]
    shapes = {peer: [own, batch, count] for peer, count in enumerate(columns)}
    arrived = _exchanged(x, at, pieces, shapes, sum(columns) * batch)
    here = at.mesh.empty([own, batch, sum(columns)], x.dtype)
    for peer, part in zip(range(len(columns)), here.split(list(columns), 2), strict=True):
        if part.numel():
            part.copy_(pieces[peer] if peer == at.place else arrived[peer])
    return here


def _exchanged(
    x: torch.Tensor, at: CutSequence, sends: Sequence[torch.Tensor], shapes: dict[int, list[int]], agreed: int
) -> dict[int, torch.Tensor]:
    """What the peers send, by peer. agreed: a number that all must have alike."""
    peers = [peer for peer, shape in shapes.items() if peer != at.place and 0 not in shape]
    out = [(peer, at.mesh.empty(each.shape, x.dtype).copy_(each)) for peer, each in enumerate(sends) if peer != at.place and each.numel()]
    rows = at.lengths[0] if len(set(at.lengths)) == 1 else -1
    dtype = str(x.dtype).removeprefix("torch.")
    made = at.mesh.joint(at.names).exchange(out, [(peer, shapes[peer]) for peer in peers], dtype, rows=rows, features=agreed)
    return dict(zip(peers, made, strict=True))


def _arguments(words: list[str], tensors: list[torch.Tensor]) -> list[Any]:
    mesh, names, lengths, place, zigzag, columns, there, label = words
    at = CutSequence(find(mesh), names_of(names), tuple(map(int, names_of(lengths))), int(place), zigzag == "1")
    return [tensors[0], at, tuple(map(int, names_of(columns))), there == "1", label]


def _results(words: list[str], tensors: list[torch.Tensor]) -> list[Meta]:
    x, at, columns, there, _ = _arguments(words, tensors)
    if there:
        return [((sum(at.lengths), x.shape[1], columns[at.place]), x.dtype)]
    return [((at.lengths[at.place], x.shape[1], sum(columns)), x.dtype)]


KNOWN["turn"] = Traced(_Turn, _arguments, _results, saves=False)
