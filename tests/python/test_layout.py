"""Cuts, blocks and relayouts are arithmetic: checked against torch.chunk and by moving numbered columns."""

import pytest
import torch

from gingham.mesh import layout
from gingham.mesh.layout import Layout

SIZES = {"k": 2, "n": 3, "m": 2}


def test_chunks_are_torch_chunk_axis_by_axis() -> None:
    assert layout.chunks(37, [2, 3]) == [7, 7, 5, 6, 6, 6]
    assert layout.chunks(3, [4]) == [1, 1, 1, 0] and layout.chunks(0, [2, 2]) == [0] * 4
    for size in range(20):
        for parts in range(1, 6):
            expected = [len(piece) for piece in torch.arange(size).chunk(parts)] if size else []
            assert layout.chunks(size, [parts]) == expected + [0] * (parts - len(expected))


def test_coordinates_are_row_major() -> None:
    assert [layout.coordinates_of(rank, {"row": 2, "col": 2}) for rank in range(4)] == [
        {"row": a, "col": b} for a in range(2) for b in range(2)
    ]
    assert layout.members(("n",), SIZES, layout.coordinates_of(7, SIZES)) == [7, 9, 11]
    assert layout.members(("k", "n"), SIZES, layout.coordinates_of(1, SIZES)) == [1, 3, 5, 7, 9, 11]


def test_a_dim_cut_against_mesh_order_is_refused() -> None:
    assert layout.dims_of_axes(("k", "n", "m"), (("n",), ("k", "m"))) == [1, 0, 1]
    with pytest.raises(ValueError, match="mesh"):
        layout.dims_of_axes(("k", "n", "m"), (("n", "k"),))


def test_blocks_are_found_from_shapes() -> None:
    cuts = (("m",), ("k", "n"))
    places = [layout.coordinates_of(rank, SIZES) for rank in range(12)]
    blocks = [layout.block((5, 19), cuts, SIZES, place) for place in places]
    shapes = [[length for _, length in block] for block in blocks]
    assert layout.blocks_from_shapes(shapes, cuts, SIZES) == ([5, 19], blocks)
    shapes[3] = [9, 9]
    with pytest.raises(ValueError, match="disagree"):
        layout.blocks_from_shapes(shapes, cuts, SIZES)


def moved(before: list[layout.Block], after: list[layout.Block], full: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """What every member holds when its relayout is done, and the words that travelled."""
    held = [full[layout.slices(block)] for block in before]
    plans = [layout.relayout(before, after, me) for me in range(len(before))]
    words, results = 0, []
    for me, plan in enumerate(plans):
        new = torch.full([length for _, length in after[me]], -1)
        new[layout.slices(plan.kept[1])] = held[me][layout.slices(plan.kept[0])]
        for piece in plan.receives:
            sent = [other.block for other in plans[piece.peer].sends if other.peer == me]
            assert len(sent) == 1
            new[layout.slices(piece.block)] = held[piece.peer][layout.slices(sent[0])]
            words += layout.volume(piece.block)
        results.append(new)
    return results, words


@pytest.mark.parametrize("features", [24, 19, 3, 1])
@pytest.mark.parametrize("sizes", [{"k": 2, "n": 2}, {"k": 2, "n": 3}, {"k": 4, "n": 2}])
def test_relayout_moves_every_column_once(features: int, sizes: dict[str, int]) -> None:
    outer, inner = Layout((), ("k", "n")), Layout((), ("n", "k"))
    places = [layout.coordinates_of(rank, sizes) for rank in range(sizes["k"] * sizes["n"])]
    full = torch.arange(2 * features).view(2, features)
    before, after = ([layout.block(full.shape, each.cuts(2), sizes, place) for place in places] for each in (outer, inner))
    results, words = moved(before, after, full)
    for result, block in zip(results, after, strict=True):
        assert torch.equal(result, full[layout.slices(block)])
    stay = sum(layout.volume(layout.intersection(a, b)) for a, b in zip(before, after, strict=True))
    assert words == full.numel() - stay


def test_replicated_to_cut_moves_nothing_and_back_is_an_all_gather() -> None:
    sizes, full = {"tp": 4}, torch.arange(20).view(2, 10)
    places = [layout.coordinates_of(rank, sizes) for rank in range(4)]
    whole, cut = ([layout.block(full.shape, Layout((), names).cuts(2), sizes, place) for place in places] for names in ((), ("tp",)))
    assert moved(whole, cut, full)[1] == 0
    results, words = moved(cut, whole, full)
    assert words == 3 * full.numel() and all(torch.equal(result, full) for result in results)
