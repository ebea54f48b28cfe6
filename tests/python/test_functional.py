"""matmul and its first and second gradients against float64 on every grid; dropout's masks."""

from typing import Any

import pytest
import torch

import gingham
from grids import GRIDS, every_grid, grids, ranks_of, relative


def products(rank: int, options: dict[str, Any], source: str, slices: int) -> dict[str, float]:
    errors = {}
    mesh = gingham.init(**options, source=source, slices=slices)
    for m, k, n in ((37, 19, 53), (24, 36, 48), (2, 1, 3)):
        torch.manual_seed(m)
        A, B, G = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
        a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
        c = gingham.matmul(mesh.scatter(a, "a"), mesh.scatter(b, "b"), shape=(m, k, n))
        C = mesh.gather(c, "c")
        (C * G).sum().backward()
        A, B, G = A.double(), B.double(), G.double()
        for name, got, expected in (("C", C, A @ B), ("dA", a.grad, G @ B.T), ("dB", b.grad, A.T @ G)):
            errors[f"{name} {m}"] = relative(got, expected)
    return errors


@pytest.mark.parametrize(("source", "slices"), [("window", 1), ("ring", 3)])
@every_grid
def test_products_in_fp32(ranks, name: str, source: str, slices: int) -> None:
    errors = ranks(ranks_of(name))(products, GRIDS[name], source, slices)[0]
    assert max(errors.values()) <= 1e-6, errors


def whole_numbers(rank: int, options: dict[str, Any]) -> bool:
    mesh = gingham.init(**options)
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randint(-8, 9, shape, generator=generator).float() for shape in ((37, 19), (19, 53)))
    c = gingham.matmul(mesh.scatter(A, "a"), mesh.scatter(B, "b"), shape=(37, 19, 53))
    return torch.equal(mesh.gather(c, "c"), A @ B)


@pytest.mark.parametrize("name", ["2.5d", "3x2x2"])
def test_whole_numbers_are_exact(ranks, name: str) -> None:
    assert all(ranks(ranks_of(name))(whole_numbers, GRIDS[name]))


def second_gradients(rank: int, options: dict[str, Any]) -> list[float]:
    mesh = gingham.init(**options)
    m, k, n = 7, 9, 11
    torch.manual_seed(0)
    A, B = torch.randn(m, k, dtype=torch.float64), torch.randn(k, n, dtype=torch.float64)

    def twice(product: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        da, db = torch.autograd.grad(product(a, b).sin().sum(), (a, b), create_graph=True)
        return torch.autograd.grad(da.cos().sum() + db.pow(2).sum(), (a, b))

    def ours(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return mesh.gather(gingham.matmul(mesh.scatter(a, "a"), mesh.scatter(b, "b"), shape=(m, k, n)), "c")

    leaves = [A.clone().requires_grad_(), B.clone().requires_grad_()]
    exact = twice(torch.matmul, A.requires_grad_(), B.requires_grad_())
    return [relative(got, expected) for got, expected in zip(twice(ours, *leaves), exact, strict=True)]


@every_grid
def test_second_gradients(ranks, name: str) -> None:
    assert max(ranks(ranks_of(name))(second_gradients, GRIDS[name])[0]) <= 1e-12


WRONG: dict[str, Any] = {
    "no shape": lambda a, b: (a, b, None),
    "dtype": lambda a, b: (a, b.double(), (4, 5, 4)),
    "integers": lambda a, b: (a.int(), b.int(), (4, 5, 4)),
    "block": lambda a, b: (a, b[:, :1].contiguous(), (4, 5, 4)),
}


def refused(rank: int, kind: str, odd: tuple[int, ...]) -> str:
    mesh = gingham.init(mode="2d", size=4)
    mesh.checks = None  # which would tell first of a block that is cut by hand
    a, b = mesh.scatter(torch.ones(4, 5), "a"), mesh.scatter(torch.ones(5, 4), "b")
    a, b, shape = WRONG[kind](a, b) if rank in odd else (a, b, (4, 5, 4))
    with pytest.raises((gingham.ShapeError, gingham.PeerDied)) as caught:
        gingham.matmul(a, b, shape=shape)
    return str(caught.value)


@pytest.mark.parametrize("odd", [(0, 1, 2, 3), (2,)], ids=["all ranks", "one rank"])
@pytest.mark.parametrize("kind", WRONG)
def test_what_matmul_refuses_on_every_rank(ranks, kind: str, odd: tuple[int, ...]) -> None:
    messages = ranks(4)(refused, kind, odd, timeout=20.0)
    assert len(odd) > 1 or all("rank 2" in message for message in messages), messages


def test_noncontiguous_and_expanded(ranks) -> None:
    def views(rank: int) -> bool:
        mesh = gingham.init(mode="2d", size=4)
        A = torch.randn(8, 8, dtype=torch.float64)
        torch.distributed.broadcast(A, 0)
        a = mesh.scatter(A, "a").t().contiguous().t().requires_grad_()
        b = mesh.scatter(A.T.contiguous(), "b")
        gingham.matmul(a, b).sum().backward()
        expected = mesh.scatter(torch.ones(8, 8, dtype=torch.float64) @ A, "a")
        return relative(a.grad, expected) < 1e-12

    assert all(ranks(4)(views))


def wide(rank: int, options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A float32 result of 16-bit operands: its error and its gradients' against float64, and what is refused."""
    mesh = gingham.init(**options)
    torch.manual_seed(0)
    full = [torch.randn(16, 24).to(dtype), torch.randn(24, 8).to(dtype)]
    a, b = (mesh.scatter(each, name).requires_grad_() for each, name in zip(full, "ab", strict=True))
    c = gingham.matmul(a, b, shape=(16, 24, 8), out_dtype=torch.float32)
    x, y = (each.double().requires_grad_() for each in full)
    expected = x @ y
    gradient = torch.randint(-2, 3, (16, 8)).float()  # as exact in 16 bits
    c.backward(mesh.scatter(gradient, "c"))
    expected.backward(gradient.double())
    refused = []
    for wrong in (torch.float64, torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        with pytest.raises(gingham.ShapeError, match="out_dtype") as caught:
            gingham.matmul(a, b, shape=(16, 24, 8), out_dtype=wrong)
        refused.append(str(caught.value))
    same = gingham.matmul(a, b, shape=(16, 24, 8), out_dtype=dtype)
    return {
        "dtypes": (c.dtype, same.dtype, a.grad.dtype),
        "c": relative(mesh.gather(c.detach(), "c"), expected.detach()),
        "narrow": relative(mesh.gather(same.detach(), "c"), expected.detach()),
        "gradients": max(relative(mesh.gather(p.grad, n), q.grad) for p, q, n in ((a, x, "a"), (b, y, "b"))),
        "refused": len(refused),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@grids("2d", "3d")
def test_c15_float32_results_of_16_bit_operands(ranks, name: str, dtype: torch.dtype) -> None:
    for found in ranks(ranks_of(name))(wide, GRIDS[name], dtype):
        assert found["dtypes"] == (torch.float32, dtype, dtype) and found["refused"] == 2
        assert found["c"] <= 1e-6 < 1e-5 < found["narrow"] and found["gradients"] <= 5e-3, found
