"""What a converted model returns that is no tensor: refused where its users would read some of the rows, else told once (A17)."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import gingham
from grids import GRIDS


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return {"policy": torch.distributions.Normal(self.mean(x), 1.0)}


def test_a_distribution_of_some_rows_is_refused(ranks) -> None:
    def said(rank: int) -> str:
        model = gingham.parallelize(Policy(), gingham.init(**GRIDS["2d"]))
        with pytest.raises(NotImplementedError) as caught:
            model(torch.ones(8, 6))
        return str(caught.value)

    assert all(words.startswith("Policy.policy: got a Normal of this rank's rows, expected tensors") for words in ranks(4)(said))


class Scored:
    """What a class of the user's own is, which no border can make again."""

    def __init__(self, scores: torch.Tensor, loss: torch.Tensor) -> None:
        self.scores, self.parts = scores, {"loss": loss}


class Memory:
    """A state, which is given back."""

    sum: Any = 0.0


class Scoring(Policy):
    def forward(self, x: torch.Tensor, memory: Any = None) -> Any:
        y = self.mean(x)
        return y, Scored(y, y.square().mean()), memory


def test_an_object_of_some_rows_is_told_once(ranks) -> None:
    def said(rank: int) -> list[str]:
        model = gingham.parallelize(Scoring(), gingham.init(**GRIDS["2d"]))
        kept = Memory()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                kept.sum = model(torch.ones(8, 6), kept)[0].detach()
        return [str(each.message) for each in caught]

    for told in ranks(4)(said):
        assert len(told) == 1 and told[0].startswith("Scoring.1: the model returns a Scored, which parallelize does not open"), told
        assert "in scores is of this rank's rows" in told[0]
