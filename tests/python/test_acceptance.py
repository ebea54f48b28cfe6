"""What the products promise beyond their error: exact whole numbers, a large K, equal replicas, runs that repeat, bounded workspace.

Factorisations of up to 12 ranks are in test_factorisations.py, `x + layer(x)` and layouts in nn/test_linear.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gingham
from grids import GRIDS, every_grid, ranks_of, relative
from twins import compare, twins

WAYS = [("window", 1), ("window", 3), ("ring", 1), ("ring", 3)]
every_way = pytest.mark.parametrize(
    ("source", "slices"), [WAYS[1], *(pytest.param(*way, marks=pytest.mark.matrix) for way in (WAYS[0], *WAYS[2:]))]
)


def whole(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=generator).float()


def exact(rank: int, options: dict[str, Any], source: str, slices: int) -> list[str]:
    """Sums of products of small whole numbers have one right answer in fp32: what differs by one bit is wrong."""
    mesh, wrong = gingham.init(**options, source=source, slices=slices), []
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((37, 19, 53), (24, 48, 12), (3, 2, 5)):
        A, B, G = whole(generator, m, k), whole(generator, k, n), whole(generator, m, n)
        a, b = mesh.scatter(A, "a").requires_grad_(), mesh.scatter(B, "b").requires_grad_()
        c = gingham.matmul(a, b, shape=(m, k, n))
        c.backward(mesh.scatter(G, "c"))
        found = {"C": (c, "c", A @ B), "dA": (a.grad, "a", G @ B.T), "dB": (b.grad, "b", A.T @ G)}
        wrong += [
            f"{name} {(m, k, n)}" for name, (got, operand, right) in found.items() if not torch.equal(mesh.gather(got, operand), right)
        ]
        for swapped in (False, True):
            layer, bias = gingham.nn.Linear(k, n, swapped=swapped), whole(generator, n)
            layer.load_state_dict({"weight": like(mesh, B.T.contiguous(), layer.weight), "bias": like(mesh, bias, layer.bias)})
            x = mesh.scatter(A).requires_grad_()
            y = layer(x)
            y.backward(mesh.scatter(G))
            pairs = {"y": (mesh.gather(y), A @ B + bias), "dx": (mesh.gather(x.grad), G @ B.T)}
            pairs |= {"dw": (layer.weight.grad.full_tensor(), G.T @ A), "db": (layer.bias.grad.full_tensor(), G.sum(0))}
            wrong += [f"{name} {(m, k, n)} {swapped}" for name, (got, right) in pairs.items() if not torch.equal(got, right)]
    return wrong


def like(mesh: gingham.Mesh, full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, mesh.device_mesh, parameter.placements, src_data_rank=None)


@every_way
@every_grid
def test_whole_numbers_are_exact(ranks, name: str, source: str, slices: int) -> None:
    assert ranks(ranks_of(name))(exact, GRIDS[name], source, slices) == [[]] * ranks_of(name)


DEPTHS = [dict(mode="2.5d", size=4 * depth, depth=depth) for depth in (1, 2, 3)]


def of_many_terms(rank: int, options: dict[str, Any], rows: int, other: int) -> dict[str, float]:
    errors = {}
    for source, slices in WAYS:
        mesh = gingham.init(**options, source=source, slices=slices)
        for k, n in ((4096, other), (other, 4096)):
            for swapped in (False, True):
                ours, theirs = twins(
                    lambda k=k, n=n, swapped=swapped: gingham.nn.Linear(k, n, swapped=swapped), lambda k=k, n=n: torch.nn.Linear(k, n)
                )
                found = compare(mesh, ours, theirs, (rows, k))
                errors |= {f"{source} {slices} {k} {n} {swapped} {name}": error for name, error in found.items()}
        torch.manual_seed(0)
        A, B = torch.randn(rows, 4096), torch.randn(4096, other)
        c = gingham.matmul(mesh.scatter(A, "a"), mesh.scatter(B, "b"), shape=(rows, 4096, other))
        errors[f"{source} {slices} matmul"] = relative(mesh.gather(c, "c"), A.double() @ B.double())
        gingham.destroy()
    return errors


# a BLAS sums all of K in one chain where C is tiny (19 x 10 here, or a panel of 44 x 13), and slices carry the chain on
tiny = pytest.param(37, 19)


@pytest.mark.matrix
@pytest.mark.parametrize(("rows", "other"), [(131, 300), (131, 150), tiny])
@pytest.mark.parametrize("options", [*DEPTHS, GRIDS["1d"], GRIDS["1d sequence"], GRIDS["3d"], GRIDS["3x2x2"]], ids=str)
def test_a_sum_of_4096_terms(ranks, options: dict[str, Any], rows: int, other: int) -> None:
    errors = ranks(options["size"])(of_many_terms, options, rows, other, timeout=250.0)[0]
    assert max(errors.values()) <= 1e-6, {key: error for key, error in errors.items() if error > 1e-6}


def trained(rank: int, options: dict[str, Any], optimizer: str, steps: int) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Local parameters after the steps, and this rank's coordinates."""
    mesh = gingham.init(**options)
    torch.manual_seed(1)
    model = torch.nn.Sequential(gingham.nn.LayerNorm(24), gingham.nn.MLP(24, 53, dropout=0.1), gingham.nn.Linear(24, 24))
    kind = {"SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)}
    chosen = kind[optimizer](model.parameters())
    for _ in range(steps):
        chosen.zero_grad()
        mesh.gather(model(mesh.scatter(torch.randn(12, 24)))).square().mean().backward()
        gingham.clip_grad_norm_(model.parameters(), 1.0)
        chosen.step()
    return [weight.to_local().clone() for weight in model.parameters()], mesh.coordinates


@pytest.mark.parametrize("optimizer", ["SGD", pytest.param("AdamW", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("depth", [2, pytest.param(3, marks=pytest.mark.matrix)])
def test_depth_replicas_have_equal_bits_after_50_steps(ranks, depth: int, optimizer: str) -> None:
    answers = ranks(4 * depth)(trained, dict(mode="2.5d", size=4 * depth, depth=depth, source="ring", slices=2), optimizer, 50)
    for rank, (weights, place) in enumerate(answers):
        others, origin = answers[rank % 4]
        assert origin == place | {"depth": 0}
        assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True)), rank


@pytest.mark.parametrize(
    "name", ["3x2x2", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("1d", "1d sequence", "2d", "2.5d", "3d"))]
)
def test_a_run_repeats_bit_by_bit(ranks, name: str) -> None:
    steps = 50 if name != "3x2x2" else 10
    first, second = (ranks(ranks_of(name))(trained, GRIDS[name], "AdamW", steps) for _ in range(2))
    assert all(torch.equal(a, b) for (one, _), (other, _) in zip(first, second, strict=True) for a, b in zip(one, other, strict=True))


ROUNDED = 9 / 8  # the heap's blocks come in sizes at most an eighth apart


def peak(mesh: gingham.Mesh, call: Callable[[], Any]) -> int:
    mesh.job.reset_peak()
    call()
    return mesh.job.memory()["workspace_peak"]


def workspaces(rank: int, grid: tuple[int, int, int], source: str, slices: int) -> list[int]:
    """High-water marks of forward and of both gradients of a matmul whose operands lie in the heap."""
    mesh = gingham.init(grid=grid, source=source, slices=slices)
    m, k, n = PRODUCT
    a, b = mesh.scatter(torch.ones(m, k), "a").requires_grad_(), mesh.scatter(torch.ones(k, n), "b").requires_grad_()
    g = mesh.scatter(torch.ones(m, n), "c")
    c = gingham.matmul(a, b)
    forward = peak(mesh, lambda: gingham.matmul(a, b))
    return [forward, peak(mesh, lambda: c.backward(g))]


PRODUCT = (192, 384, 576)
SHAPES = [(2, 2, 1), (1, 4, 1), (4, 1, 1), (3, 2, 1), (2, 2, 2), (1, 1, 4), (1, 2, 2), (3, 2, 2)]


def bounds(grid: tuple[int, int, int], source: str, slices: int) -> tuple[int, int]:
    """docs/theory.md section 3: two slices of each streamed operand on a ring, none in a window; with pk > 1 one gathered block of
    Y, which has no slice dim, and on a ring the parts of its sum: one of each other rank that comes, and forward, where Y is cut by
    columns, one for each that goes."""
    (pm, pn, pk), (m, k, n) = grid, PRODUCT
    x, w, y = m * k // (pm * pk), k * n // (pk * pn), m * n // (pm * pn)
    streamed = 2 * (x * (pn > 1) + w * (pm > 1)) // slices if source == "ring" else 0
    gathered = y * (pk > 1)
    parts = y * (pk - 1) // pk if source == "ring" else 0
    return 4 * max(streamed + gathered, gathered + 2 * parts), 4 * max(2 * streamed + gathered, gathered + parts)


@pytest.mark.parametrize(
    ("source", "slices"), [("window", 1), ("window", 3), ("ring", 3), pytest.param("ring", 1, marks=pytest.mark.matrix)]
)
@pytest.mark.parametrize(
    "grid", [SHAPES[0], SHAPES[4], *(pytest.param(grid, marks=pytest.mark.matrix) for grid in SHAPES[1:4] + SHAPES[5:])], ids=str
)
def test_workspace_is_bounded(ranks, grid: tuple[int, int, int], source: str, slices: int) -> None:
    answers = ranks(grid[0] * grid[1] * grid[2])(workspaces, grid, source, slices)
    most = [max(answer[index] for answer in answers) for index in range(2)]
    print(grid, source, slices, "peaks", most, "bounds", bounds(grid, source, slices))
    for got, bound in zip(most, bounds(grid, source, slices), strict=True):
        assert got <= ROUNDED * bound, (most, bounds(grid, source, slices))


def memory_while_training(rank: int, options: dict[str, Any]) -> list[tuple[int, ...]]:
    mesh = gingham.init(**options)
    torch.manual_seed(1)
    model = torch.nn.Sequential(gingham.nn.LayerNorm(48), gingham.nn.MLP(48, 96, dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x, seen = torch.randn(32, 48), []
    for step in range(60):
        optimizer.zero_grad()
        (model(mesh.scatter(x)).square().sum() / x.numel()).backward()
        optimizer.step()
        if step in (9, 59):
            memory = mesh.memory()
            seen.append((memory["reserved"], memory["tensors"], memory["workspace"], memory["allocations"]))
    return seen


@pytest.mark.parametrize("name", ["2.5d", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("1d sequence", "3x2x2"))])
@pytest.mark.parametrize("source", ["ring", pytest.param("window", marks=pytest.mark.matrix)])
def test_steady_state_takes_no_more_memory(ranks, name: str, source: str) -> None:
    for early, late in ranks(ranks_of(name))(memory_while_training, GRIDS[name] | dict(source=source, slices=2)):
        assert early == late
