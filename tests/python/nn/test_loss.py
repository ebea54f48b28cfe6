"""cross_entropy with the vocabulary on several ranks, against torch in float64."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gingham
from grids import GRIDS, every_grid, ranks_of, relative


def losses(rank: int, options: dict[str, Any]) -> dict[str, float]:
    mesh = gingham.init(**options)
    errors = {}
    for batch, vocabulary in ((7, 19), (8, 24), (2, 3)):
        torch.manual_seed(batch)
        full = 3 * torch.randn(batch, 5, vocabulary)
        target = torch.randint(vocabulary, (batch, 5))
        target[0, 0] = target[-1, -1] = -100
        weights = torch.rand(batch, 5)
        for layout in ("outer", "inner"):
            for smoothing in (0.0, 0.1):
                for reduction in ("mean", "sum", "none"):
                    x, exact = full.clone().requires_grad_(), full.double().requires_grad_()
                    expected = F.cross_entropy(exact.flatten(0, 1), target.flatten(), label_smoothing=smoothing, reduction=reduction)
                    logits = mesh.scatter(x, "x" if layout == "outer" else "inner")
                    got = gingham.cross_entropy(logits, mesh.scatter(target), layout=layout, label_smoothing=smoothing, reduction=reduction)
                    if reduction == "none":
                        got = (mesh.gather(got, "rows") * weights).sum()
                        expected = (expected.view(batch, 5) * weights).sum()
                    got.backward()
                    expected.backward()
                    key = f"{layout} {smoothing} {reduction} {batch}"
                    errors[key], errors[f"{key} gradient"] = relative(got.detach(), expected), relative(x.grad, exact.grad)
    return errors


@every_grid
def test_against_float64(ranks, name: str) -> None:
    for errors in ranks(ranks_of(name))(losses, GRIDS[name]):
        assert max(errors.values()) <= 2e-6, {key: error for key, error in errors.items() if error > 2e-6}


def test_what_it_refuses() -> None:
    mesh = gingham.init()
    try:
        logits = mesh.scatter(torch.randn(4, 5))
        with pytest.raises(gingham.ShapeError, match="expected"):
            gingham.cross_entropy(logits, torch.zeros(3, dtype=torch.long))
        with pytest.raises(gingham.ShapeError, match="0..4"):
            gingham.cross_entropy(logits, torch.full((4,), 5))
        with pytest.raises(TypeError, match="integer"):
            gingham.cross_entropy(logits, torch.zeros(4))
        with pytest.raises(ValueError, match="reduction"):
            gingham.cross_entropy(logits, torch.zeros(4, dtype=torch.long), reduction="max")
    finally:
        gingham.destroy()
