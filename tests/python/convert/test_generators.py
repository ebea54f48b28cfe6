"""Random numbers that a converted model's own code draws: others for each block, the same for replicas, whatever the ranks' seeds (A13)."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gingham
from grids import GRIDS, ranks_of


class Noisy(torch.nn.Module):
    """Dropout as a function, and noise, between linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 64), torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.dropout(torch.ones_like(self.first(x)), 0.5, self.training)
        return h + torch.rand_like(h) * self.training + 0 * self.second(h)


def drawn(rank: int, options: dict[str, Any], seeds: str) -> tuple[torch.Tensor, torch.Tensor, bool, float]:
    mesh = gingham.init(**options)
    torch.manual_seed(0)
    model = gingham.parallelize(Noisy(), mesh)
    torch.manual_seed(5 + rank if seeds == "each its own" else 5)
    x = torch.zeros(8, 16)
    seed = torch.initial_seed()
    one, two = model(x).detach(), model(x).detach()
    same = torch.initial_seed() == seed
    following = float(torch.rand(()))
    model.eval()
    assert torch.equal(model(x), torch.ones(8, 64))
    return one, two, same, following


@pytest.mark.parametrize("seeds", ["alike", "each its own"])
@pytest.mark.parametrize("name", ["1d", "2.5d", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("2d", "3d"))])
@pytest.mark.filterwarnings("ignore")
def test_a13_every_block_draws_its_own(ranks, name: str, seeds: str) -> None:
    answers = ranks(ranks_of(name))(drawn, GRIDS[name], seeds)
    one, two = answers[0][:2]
    for other, again, same_seed, following in answers:
        assert torch.equal(one, other) and torch.equal(two, again) and same_seed
        assert seeds != "alike" or following == answers[0][3]
    masks = (one >= 1).float()
    assert 0.4 < float(masks.mean()) < 0.6 and not torch.equal(one, two)
    rows = {tuple(row.tolist()) for row in masks}
    assert len(rows) == 8, "rows of several ranks have one mask"
