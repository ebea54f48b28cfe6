"""SelfAttention: masks, key and value cache, sequences cut over the row ranks, dropout by global index, what it refuses."""

from typing import Any

import pytest
import torch

import gingham
import serial
from gingham import nn
from grids import GRIDS, grids, ranks_of, relative, whole

# batch, time: one sequence, uneven pieces, fewer tokens than row ranks
SHAPES = ((1, 7), (7, 5), (5, 2))


def masks(batch: int, time: int) -> dict[str, torch.Tensor | None]:
    padding = torch.arange(time) < torch.randint(1, time + 1, (batch, 1, 1, 1))
    return {
        "none": None,
        "padding": padding,
        "added, by head": torch.randn(batch, 12, time, time, dtype=torch.float64),
        "shared": torch.randn(time, time, dtype=torch.float64),
    }


def local_mask(mesh: Any, mask: torch.Tensor | None, dim: int) -> torch.Tensor | None:
    """This rank's rows; a mask without that dim, or with one row of it, as it is."""
    at = 0 if dim == 0 else 2
    if mask is None or (mask.dim() < 4 and dim == 0) or (mask.dim() == 4 and mask.shape[at] == 1):
        return mask
    return mesh.scatter(mask, "rows", mask.dim() - 2 if dim else 0)


def masked(rank: int, options: dict[str, Any]) -> dict[str, float]:
    mesh, errors = gingham.init(**options), {}
    for batch, time in SHAPES:
        for dim in (0, 1):
            torch.manual_seed(2)
            ours = nn.SelfAttention(24, 12, kv_heads=12, head_dim=4, dtype=torch.float64, dim=dim, rotary=100.0)
            torch.manual_seed(2)
            theirs = serial.Attention(24, 12, 12, 4, True, 100.0, torch.float64)
            for kind, mask in masks(batch, time).items():
                a = torch.randn(batch, time, 24, dtype=torch.float64).requires_grad_()
                b = a.detach().clone().requires_grad_()
                got = mesh.gather(ours(mesh.scatter(a, "x", dim), local_mask(mesh, mask, dim)), "x", dim)
                expected = theirs(b, mask)
                ours.zero_grad(), theirs.zero_grad()
                got.pow(2).sum().backward(), expected.pow(2).sum().backward()
                pairs = [(got, expected), (a.grad, b.grad)]
                named = dict(theirs.named_parameters())
                pairs += [(whole(p.grad), named[name].grad) for name, p in ours.named_parameters() if name != "k.bias"]
                errors[f"{batch}x{time} dim {dim} {kind}"] = max(relative(*pair) for pair in pairs)
    return errors


@grids("1d sequence", "2d")
def test_masks_in_batches_and_cut_sequences(ranks, name: str) -> None:
    for errors in ranks(ranks_of(name))(masked, GRIDS[name]):
        assert max(errors.values()) <= 1e-11, errors


def generated(rank: int, options: dict[str, Any]) -> float:
    """Worst difference of generation by pieces of 3, 1, 1, .. tokens from the whole forward pass."""
    mesh, worst = gingham.init(**options), 0.0
    for batch, dim in ((3, 0), (1, 1), (2, 1)):
        torch.manual_seed(4)
        layer = nn.SelfAttention(24, 24, kv_heads=12, head_dim=2, rotary=50.0, dtype=torch.float64, dim=dim)
        full = torch.randn(batch, 7, 24, dtype=torch.float64)
        with torch.no_grad():
            expected = mesh.gather(layer(mesh.scatter(full, "x", dim)), "x", dim)
            cache, parts = nn.KVCache(), []
            for start, stop in ((0, 3), (3, 4), (4, 5), (5, 7)):
                piece = mesh.scatter(full[:, start:stop], "x", dim)
                parts.append(mesh.gather(layer(piece, cache=cache), "x", dim))
        assert cache.length == 7
        worst = max(worst, relative(torch.cat(parts, 1), expected))
    return worst


@grids("1d sequence", "2d")
def test_generation_equals_the_whole_pass(ranks, name: str) -> None:
    assert max(ranks(ranks_of(name))(generated, GRIDS[name])) <= 1e-12


def dropped(rank: int, options: dict[str, Any]) -> list[torch.Tensor]:
    """Outputs and input gradients with dropout on the probabilities: equal everywhere only if every mask is."""
    mesh, found = gingham.init(**options), []
    for dim in (0, 1):
        torch.manual_seed(5)
        layer = nn.SelfAttention(24, 24, dropout=0.4, kv_heads=12, head_dim=2, dtype=torch.float64, dim=dim)
        x = torch.randn(5, 7, 24, dtype=torch.float64).requires_grad_()
        y = mesh.gather(layer(mesh.scatter(x, "x", dim)), "x", dim)
        y.pow(2).sum().backward()
        found += [y.detach(), x.grad]
    return found


@grids("2d")
def test_dropout_draws_by_global_index(ranks, name: str) -> None:
    serially = ranks(1)(dropped, {})[0]
    assert torch.allclose(serially[0], serially[2]), "both cuts number the same elements"
    for found in ranks(ranks_of(name))(dropped, GRIDS[name]):
        for got, expected in zip(found, serially, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_holds_scores_of_its_own_heads_only(ranks) -> None:
    """Every tensor that autograd keeps of [batch, heads, time, time] has this rank's heads and rows."""

    def shapes(rank: int) -> set[tuple[int, ...]]:
        mesh = gingham.init(mode="2.5d", size=8, depth=2)
        layer, seen = nn.SelfAttention(24, 12, dropout=0.3, dim=1), set()
        x = mesh.scatter(torch.randn(2, 16, 24), "x", 1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.add(tuple(t.shape)), t)[1], lambda t: t):
            layer(x, torch.ones(1, 12, 4, 16, dtype=torch.bool))
        return {shape for shape in seen if len(shape) == 4 and shape[-1] == 16}

    for seen in ranks(8)(shapes):
        assert seen and all(shape[1] <= 6 and shape[2] <= 4 for shape in seen), seen


def test_refusals_name_the_valid_head_counts(ranks) -> None:
    def refuse(rank: int) -> list[str]:
        gingham.init(mode="2d", size=4)
        found = []
        for arguments in (dict(heads=3), dict(heads=12, kv_heads=3), dict(heads=12, head_dim=3, rotary=10.0), dict(heads=12, dim=2)):
            with pytest.raises(gingham.ShapeError) as caught:
                nn.SelfAttention(24, **arguments)
            found.append(str(caught.value))
        layer = nn.SelfAttention(24, 12)
        for x, mask in ((torch.ones(2, 12), None), (torch.ones(2, 3, 12), torch.ones(2, 5, 3, 3))):
            with pytest.raises(gingham.ShapeError) as caught:
                layer(x, mask)
            found.append(str(caught.value))
        return found

    heads, kv, odd, dim, dims, mask = ranks(4)(refuse)[0]
    assert "[2, 4, 6, 8, 12, 24]" in heads and "[2, 4, 6, 12]" in kv and "even" in odd
    assert "0 (batch) or 1 (sequence)" in dim and "[batch, time, width]" in dims and "[batch, 12, T, S]" in mask
