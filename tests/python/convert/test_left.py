"""What forward leaves in a converted model and what hooks inside of it get is of this rank's part, and told."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import gingham
from grids import GRIDS, ranks_of

W = 24


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(W, W), nn.Linear(W, W)
        self.kept: Any = None
        self.calls, self.seen = 0, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class KeptNumbers(Two):
    """A number with a gradient in a list."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        self.seen[:] = [h.pow(2).mean()]
        return self.b(h)


class KeptBehindAnUnderscore(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        self._loss = h.pow(2).mean()
        return self.b(h)


class KeptHidden(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden = self.a(x)
        self.kept = {"detached": self.hidden.detach(), "weights": torch.ones(3)}
        self.calls += 1
        self.seen.append(float(self.hidden.detach().mean()))
        return self.b(self.hidden)


def left(rank: int, options: dict[str, Any], rows: int) -> Any:
    mesh = gingham.init(**options)
    hidden, hooked = (gingham.parallelize(kind(), mesh) for kind in (KeptHidden, Two))
    x, told = torch.randn(rows, W, generator=torch.Generator().manual_seed(1)), []
    refused = []
    for kind in (KeptNumbers, KeptBehindAnUnderscore):
        try:
            gingham.parallelize(kind(), mesh)(x)
        except NotImplementedError as error:
            refused.append(str(error))
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hidden(x)
            hooked(x)
        told.append([str(each.message) for each in caught])
        hooked.a.register_forward_hook(lambda module, args, y: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hooked(x)
    told.append([str(each.message) for each in caught])
    return refused, told


@pytest.mark.parametrize("name, rows", [("2d", 8), ("1d", 8), ("2.5d", 4)])
def test_what_forward_leaves_in_a_model_and_what_hooks_get_is_told(ranks, name: str, rows: int) -> None:
    for refused, (first, second, third) in ranks(ranks_of(name))(left, GRIDS[name], rows):
        names = [text.partition(" is a number with a gradient")[0] for text in refused]
        assert name == "1d" or names == ["KeptNumbers: seen.0", "KeptBehindAnUnderscore: _loss"], refused
        parts = [text for text in first if "is of this rank's part of samples" in text]
        assert name == "1d" or len(parts) == 1 and "hidden (" in parts[0] and "kept.detached" in parts[0] and "weights" not in parts[0], (
            first
        )
        numbers = [text for text in first if "differs between ranks" in text]
        assert name == "1d" or len(numbers) == 1 and "seen.0" in numbers[0] and "calls" not in numbers[0], first
        assert not any("forward hook gets" in text for text in first)
        words = "a of Two: a forward hook gets this rank's part"
        told = [text for text in second if text.startswith(words)]
        assert second == told and len(told) == (name != "1d"), second
        assert third == [], third
