"""Defects found in other tensor-parallel libraries, one test each; the number is the row of our list of them.

Rows 3 and 4 (ring attention over split sequences, groups of hybrid meshes) come with hybrid parallelism.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from grids import relative, whole
from twins import compare, twins

Q2D2: dict[str, Any] = dict(mode="2.5d", size=8, depth=2)


def mlp_errors(rank: int, grid: dict[str, Any], steps: int) -> tuple[dict[str, float], bool, list[torch.Tensor]]:
    """Errors of y, dx, dW and db against float64; whether gradients lie as their parameters; the blocks after `steps`."""
    import gingham

    mesh = gingham.init(**grid)
    ours, theirs = twins(
        lambda: torch.nn.Sequential(gingham.nn.Linear(24, 40), torch.nn.GELU(), gingham.nn.Linear(40, 24)),
        lambda: torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 24)),
    )
    errors = compare(mesh, ours, theirs, (12, 24))
    alike = all(
        parameter.grad.placements == parameter.placements and parameter.grad.to_local().shape == parameter.to_local().shape
        for parameter in ours.parameters()
    )
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2, fused=True)
    for step in range(steps):
        x = torch.randn(12, 24, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        mesh.gather(ours(mesh.scatter(x))).square().mean().backward()
        optimizer.step()
    blocks = [parameter.to_local().clone() for parameter in ours.parameters()] + [torch.tensor(list(mesh.coordinates.values()))]
    return errors, alike, blocks


@pytest.mark.parametrize("depth", [2, pytest.param(3, marks=pytest.mark.matrix)])
def test_row_1_weight_gradients_are_summed_over_depth(ranks, depth: int) -> None:
    """Colossal-AI 2.5D never sums them, and its replicas start different."""
    answers = ranks(4 * depth)(mlp_errors, dict(mode="2.5d", size=4 * depth, depth=depth), 10)
    assert max(answers[0][0].values()) <= 1e-6, answers[0][0]
    layers: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for _, _, (*blocks, place) in answers:
        first = layers.setdefault(tuple(place[1:].tolist()), blocks)
        assert all(torch.equal(a, b) for a, b in zip(first, blocks, strict=True)), "replicas over depth differ"
    assert len(layers) == 4


def losses(rank: int) -> tuple[float, float, float, float]:
    import gingham

    mesh = gingham.init(**Q2D2)
    logits, target = torch.randn(10, 17, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 17
    got = gingham.cross_entropy(mesh.scatter(logits), mesh.scatter(target), mesh=mesh)
    right = gingham.accuracy(mesh.scatter(logits), mesh.scatter(target), mesh=mesh)
    exact = torch.nn.functional.cross_entropy(logits.double(), target)
    return float(got), float(exact), float(right), float((logits.argmax(-1) == target).float().mean())


def test_row_2_one_loss_and_one_accuracy_on_every_rank(ranks) -> None:
    """Colossal-AI 2.5D reduces over one axis: every depth layer reports its own."""
    answers = ranks(8)(losses)
    assert len({answer[0] for answer in answers}) == len({answer[2] for answer in answers}) == 1
    got, exact, right, expected = answers[0]
    assert got == pytest.approx(exact, rel=1e-6) and right == pytest.approx(expected)


@pytest.mark.parametrize(
    "grid",
    [(1, 2, 2), (2, 1, 2), (2, 2, 1), *(pytest.param(g, marks=pytest.mark.matrix) for g in [(1, 1, 4), (1, 4, 1), (4, 1, 1), (1, 1, 1)])],
)
def test_row_5_grids_with_one_rank_on_any_axis(ranks, grid: tuple[int, int, int]) -> None:
    """Colossal-AI with q = 1 crashes in backward."""
    size = grid[0] * grid[1] * grid[2]
    assert max(ranks(size)(mlp_errors, dict(grid=grid), 1)[0][0].values()) <= 1e-6


def save(rank: int, grid: dict[str, Any] | None, path: str) -> dict[str, torch.Tensor]:
    """The weights of a model with a norm and a vocabulary, saved from a grid."""
    import gingham

    mesh = gingham.init(**(grid or {}))
    torch.manual_seed(4)
    model = torch.nn.ModuleDict(
        {
            "table": gingham.nn.Embedding(13, 24, mesh),
            "norm": gingham.nn.LayerNorm(24, mesh=mesh),
            "head": gingham.nn.Classifier(24, 13, mesh=mesh),
        }
    )
    gingham.save(model, None, path)
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def load(rank: int, grid: dict[str, Any], path: str) -> dict[str, torch.Tensor]:
    import gingham

    mesh = gingham.init(**grid)
    model = torch.nn.ModuleDict(
        {
            "table": gingham.nn.Embedding(13, 24, mesh),
            "norm": gingham.nn.LayerNorm(24, mesh=mesh),
            "head": gingham.nn.Classifier(24, 13, mesh=mesh),
        }
    )
    gingham.load(model, None, path)
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def test_row_6_checkpoints_open_on_other_grids_and_in_one_process(ranks, tmp_path: Path) -> None:
    """Colossal-AI: 2.5D with depth cannot load, 3D's LayerNorm hangs, 2D's vocabulary classifier is saved transposed."""
    import gingham

    saved = ranks(8)(save, Q2D2, str(tmp_path / "home"))[0]
    for grid in (dict(mode="3d", size=8), dict(mode="2d", size=4)):
        got = ranks(grid["size"])(load, grid, str(tmp_path / "home"))[0]
        assert all(torch.equal(got[name], saved[name]) for name in saved)
    serial = torch.nn.ModuleDict(
        {"table": torch.nn.Embedding(13, 24), "norm": torch.nn.LayerNorm(24), "head": torch.nn.Linear(24, 13, bias=False)}
    )
    gingham.load(serial, None, str(tmp_path / "home"))
    assert all(torch.equal(parameter, saved[name]) for name, parameter in serial.named_parameters())


def ranks_of_logits(rank: int) -> list[tuple[float, float]]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    found = []
    for shape in ((6,), (6, 5), (6, 5, 3)):
        logits, target = torch.randn(*shape, 11), torch.arange(torch.Size(shape).numel()).view(shape) % 11
        exact = torch.nn.functional.cross_entropy(logits.flatten(0, -2).double(), target.flatten())
        found.append((float(gingham.cross_entropy(mesh.scatter(logits), mesh.scatter(target), mesh=mesh)), float(exact)))
    return found


def test_row_7_logits_of_any_rank(ranks) -> None:
    """Colossal-AI's vocabulary-parallel loss refuses [batch, sequence, vocabulary]."""
    for got, exact in ranks(4)(lambda rank: (torch.manual_seed(1), ranks_of_logits(rank))[1])[0]:
        assert got == pytest.approx(exact, rel=1e-6)


def norm_far_away(rank: int) -> float:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(2)) + 1000
    got = mesh.gather(gingham.nn.LayerNorm(64)(mesh.scatter(x)))
    return relative(got, torch.nn.functional.layer_norm(x.double(), (64,)))


def test_row_8_layer_norm_far_from_zero(ranks) -> None:
    """Colossal-AI takes E[x^2] - E[x]^2: 1e-3 off at an offset of 100."""
    assert ranks(4)(norm_far_away)[0] <= 1e-5


def long_and_uneven(rank: int) -> dict[str, float]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    attention = gingham.nn.SelfAttention(12, 2, dim=1)
    torch.manual_seed(0)
    q, k, v, o = (torch.nn.Linear(12, 12).double() for _ in range(4))
    full = torch.randn(1, 37, 12, requires_grad=True)
    x = full.detach().double().requires_grad_()
    parts = [part(x).unflatten(-1, (2, 6)).transpose(1, 2) for part in (q, k, v)]
    expected = o(torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))
    expected.sum().backward()
    got = mesh.gather(attention(mesh.scatter(full, "x", dim=1)), "x", dim=1)
    got.sum().backward()
    return {"y": relative(got, expected), "dx": relative(full.grad, x.grad), "dq": relative(whole(attention.q.weight.grad), q.weight.grad)}


def uneven_linear(rank: int) -> dict[str, float]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    ours, theirs = twins(lambda: gingham.nn.Linear(37, 53), lambda: torch.nn.Linear(37, 53))
    return compare(mesh, ours, theirs, (7, 37))


def test_row_10_batch_one_with_a_long_sequence_and_sizes_that_do_not_divide(ranks) -> None:
    """Colossal-AI cuts the batch only, and only what divides."""
    for errors in (ranks(4)(long_and_uneven)[0], ranks(4)(uneven_linear)[0]):
        assert max(errors.values()) <= 2e-6, errors


def initial(rank: int, grid: dict[str, Any]) -> list[torch.Tensor]:
    import gingham

    gingham.init(**grid)
    torch.manual_seed(12)
    return [
        whole(parameter.detach()).clone()
        for layer in (gingham.nn.Linear(9, 7), gingham.nn.Embedding(5, 9))
        for parameter in layer.parameters()
    ]


def test_row_11_initial_weights_do_not_depend_on_the_grid(ranks) -> None:
    torch.manual_seed(12)
    serial = [parameter.detach() for layer in (torch.nn.Linear(9, 7), torch.nn.Embedding(5, 9)) for parameter in layer.parameters()]
    for grid in (Q2D2, dict(mode="1d", size=4), dict(mode="3d", size=8)):
        assert all(torch.equal(a, b) for a, b in zip(ranks(grid["size"])(initial, grid)[0], serial, strict=True)), grid


def orders(rank: int) -> list[torch.Tensor]:
    """A pair of linears on a 3d mesh, made in one order, then in the other with a third layer between."""
    import gingham

    mesh = gingham.init(mode="3d", size=8)
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    found = []
    for backwards in (False, True):
        made = {}
        for name, (layout, seed) in sorted({"a": ("outer->inner", 1), "b": ("inner->outer", 2)}.items(), reverse=backwards):
            torch.manual_seed(seed)
            made[name] = gingham.nn.Linear(8, 8, layout=layout)
            gingham.nn.Linear(8, 8)
        found.append(mesh.gather(made["b"](made["a"](mesh.scatter(x)))))
    return found


def test_row_12_layouts_belong_to_layers_not_to_the_order_of_construction(ranks) -> None:
    """Colossal-AI 3D swaps axes by a global that every construction flips."""
    first, second = ranks(8)(orders)[0]
    assert torch.equal(first, second)


def plan_of_what_does_not_divide(rank: int) -> tuple[list[str], list[tuple[str, str]], str]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    model = gingham.parallelize(torch.nn.ModuleDict({"odd": torch.nn.Linear(7, 5), "gru": torch.nn.GRU(4, 4)}), mesh)
    return (
        [line.path for line in model.gingham_plan],
        [(line.path, line.reason) for line in model.gingham_plan if line.reason],
        type(model["odd"]).__module__,
    )


def test_row_13_the_plan_names_every_layer_and_uneven_ones_are_cut(ranks) -> None:
    """AxoNN leaves layers that do not divide serial, in silence, and runs on CUDA only; this runs on CPUs."""
    named, left, module = ranks(4)(plan_of_what_does_not_divide)[0]
    assert named == ["odd", "gru"] and module.startswith("gingham.")
    assert [path for path, _ in left] == ["gru"] and "no layer of ours for GRU" in left[0][1]


def masks(rank: int, grid: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    import gingham

    mesh = gingham.init(**grid)
    torch.manual_seed(6)
    block = gingham.nn.Dropout(0.5)(mesh.scatter(torch.ones(8, 16)))
    return block.clone(), mesh.gather(block)


def test_row_14_dropout_differs_between_ranks_and_equals_serial_and_gradients_lie_as_parameters(ranks) -> None:
    """DTensor on a CPU mesh draws one mask for all ranks and returns gradients in other layouts than the parameters'."""
    torch.manual_seed(6)
    import gingham

    serial = gingham.nn.Dropout(0.5)(torch.ones(8, 16))
    answers = ranks(8)(masks, Q2D2)
    assert torch.equal(answers[0][1], serial)
    assert len({tuple(block.flatten().tolist()) for block, _ in answers}) > 1
    assert all(alike for _, alike, _ in ranks(8)(mlp_errors, Q2D2, 0))


def workspace(rank: int) -> tuple[int, int]:
    import gingham

    mesh = gingham.init(mode="2d", size=4, source="ring", slices=8)
    layer, x = gingham.nn.Linear(256, 256), mesh.scatter(torch.randn(256, 256))
    mesh.job.reset_peak()
    layer(x)
    slice_of_both = 2 * 4 * 256 * 256 // 4 * 2 // 8
    return mesh.memory()["workspace_peak"], 2 * slice_of_both


def test_row_14_workspace_is_two_slices(ranks) -> None:
    """DTensor gathers whole panels."""
    for peak, two_slices in ranks(4)(workspace):
        assert 0 < peak <= two_slices * 9 // 8, (peak, two_slices)


def mismatched(rank: int, kind: str) -> None:
    import os
    import signal

    import gingham

    mesh = gingham.init(mode="1d", size=4, timeout=20)
    layer = gingham.nn.Linear(8, 8, layout="outer->inner")
    if kind == "killed" and rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "dtype" and rank == 2:
        layer = layer.double()
    shape = (5, 8) if kind == "shape" and rank == 2 else (4, 8)
    x = torch.randn(shape, dtype=torch.float64 if kind == "dtype" and rank == 2 else torch.float32, requires_grad=True)
    layer(x).sum().backward()
    mesh.gather(torch.zeros(1), "rows")


@pytest.mark.parametrize("kind", ["dtype", "shape", "killed"])
def test_row_15_a_rank_that_differs_or_dies_is_named_on_every_rank(ranks, kind: str) -> None:
    """Gloo: another dtype is silent garbage, another shape aborts one rank and succeeds on the others, a killed rank has no name."""
    outcomes = ranks(4)(mismatched, kind, outcomes=True, timeout=60.0)
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, Exception), f"rank {rank} reported success"
        if not (kind == "killed" and rank == 2):
            assert "rank 2" in str(outcome) or "rank(s) 2" in str(outcome), str(outcome)[-400:]


def under_autocast(rank: int, grid: dict[str, Any], dtype: torch.dtype) -> tuple[list[torch.dtype], list[tuple[float, float]]]:
    """Dtypes of y and of our gradients; errors of y, dx and dW against float64, ours and serial torch's."""
    import gingham

    mesh = gingham.init(**grid)
    torch.manual_seed(9)
    ours, full = gingham.nn.Linear(2048, 16), torch.randn(16, 2048)
    torch.manual_seed(9)
    theirs = torch.nn.Linear(2048, 16)
    found = []
    for layer, there, back in ((ours, mesh.scatter, mesh.gather), (theirs, torch.clone, torch.clone)):
        x = full.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            y = layer(there(x))
        dtypes = [y.dtype, layer.weight.dtype]
        back(y).float().pow(2).sum().backward()
        found.append((dtypes, [back(y), x.grad, whole(layer.weight.grad)]))
    weight, x = theirs.weight.detach().double().requires_grad_(), full.double().requires_grad_()
    y = torch.nn.functional.linear(x, weight, theirs.bias.detach().double())
    y.pow(2).sum().backward()
    exact = [y, x.grad, weight.grad]
    errors = [(relative(a, e), relative(b, e)) for a, b, e in zip(found[0][1], found[1][1], exact, strict=True)]
    return [*found[0][0], found[0][1][2].dtype], errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_row_9_autocast_chooses_the_dtype_and_sums_are_in_float32(ranks, dtype: torch.dtype) -> None:
    """Colossal-AI has float16 hard-wired. A sum over 2048 in 16 bits would be far off serial torch's error."""
    for grid in (Q2D2, dict(mode="3d", size=8)):
        for dtypes, errors in ranks(8)(under_autocast, grid, dtype):
            assert dtypes == [dtype, torch.float32, torch.float32]
            assert all(ours <= 1.5 * serial for ours, serial in errors), errors
