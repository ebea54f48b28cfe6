"""Linear and matmul in fp32 on every factorisation of up to 12 ranks and at every depth, window and ring; a large K."""

from typing import Any

import pytest
import torch

import gingham
from grids import relative
from twins import compare, twins

pytestmark = pytest.mark.matrix


def factorisations(ranks: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        dict(grid=(pm, pn, ranks // pm // pn)) for pm in range(1, ranks + 1) for pn in range(1, ranks + 1) if ranks % (pm * pn) == 0
    ]
    depths = [dict(mode="2.5d", size=ranks, depth=d) for d in (1, 2, 3) if ranks in (d, 4 * d, 9 * d)]
    return found + depths + [dict(mode="1d", size=ranks, sequence=sequence) for sequence in (False, True)]


def on_every(rank: int, ranks: int, source: str) -> dict[str, float]:
    errors: dict[str, float] = {}
    for index, options in enumerate(factorisations(ranks)):
        slices = (1, 4, 2)[index % 3]
        mesh = gingham.init(**options, source=source, slices=slices)
        for m, k, n in ((37, 19, 53), (24, 48, 36)):
            for layout, swapped in (("outer->outer", False), ("outer->outer", True)):
                ours, theirs = twins(
                    lambda k=k, n=n, layout=layout, swapped=swapped: gingham.nn.Linear(k, n, layout=layout, swapped=swapped),
                    lambda k=k, n=n: torch.nn.Linear(k, n),
                )
                found = compare(mesh, ours, theirs, (m, k))
                errors |= {f"{options} {source} {slices} {(m, k, n)} {swapped} {name}": error for name, error in found.items()}
            torch.manual_seed(0)
            A, B = torch.randn(m, k), torch.randn(k, n)
            c = gingham.matmul(mesh.scatter(A, "a"), mesh.scatter(B, "b"), shape=(m, k, n))
            errors[f"{options} {source} {slices} {(m, k, n)} matmul"] = relative(mesh.gather(c, "c"), A.double() @ B.double())
        gingham.destroy()
    return errors


@pytest.mark.parametrize("source", ["window", "ring"])
@pytest.mark.parametrize("count", range(1, 13))
def test_every_factorisation(ranks, count: int, source: str) -> None:
    for errors in ranks(count)(on_every, count, source, timeout=250.0):
        assert max(errors.values()) <= 1e-6, {key: error for key, error in errors.items() if error > 1e-6}


def test_a_large_k(ranks) -> None:
    def large(rank: int) -> dict[str, float]:
        mesh = gingham.init("2.5d", size=8, depth=2)
        ours, theirs = twins(lambda: gingham.nn.Linear(4096, 256), lambda: torch.nn.Linear(4096, 256))
        return compare(mesh, ours, theirs, (64, 4096))

    assert max(ranks(8)(large)[0].values()) <= 1e-6
