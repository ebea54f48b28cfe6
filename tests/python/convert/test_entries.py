"""Lists, tuples and NumPy arrays with an entry for each sample beside a batch of tensors: cut like it, or told of (A17)."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gingham
from families import errors, plain
from grids import GRIDS, ranks_of, relative

NAMES = ["a", "ccc", "bb", "a", "bb"]
LENGTHS = [5, 3, 4, 2, 1]


class Sums(nn.Module):
    """Of the first words of each sample, times what its name says."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)
        self.sizes = {"a": 1.0, "bb": 2.0, "ccc": 3.0}

    def forward(self, batch: dict[str, Any], lengths: Any, scales: Any = None, size: Any = (2, 2)) -> torch.Tensor:
        y = torch.stack(
            [each[: int(n)].sum(0) * self.sizes[name] for each, n, name in zip(self.a(batch["x"]), lengths, batch["names"], strict=True)]
        )
        if scales is not None:
            y = y * torch.as_tensor(np.asarray(scales), dtype=torch.float32).reshape(len(y), -1)[:, :1]
        return self.b(y) * (size[0] * size[1])


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 4, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: Any) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class Alone(nn.Module):
    """With one child and no tensor beside the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, lengths: Any) -> torch.Tensor:
        return torch.stack([each[:n].sum(0) for each, n in zip(self.a(x), lengths, strict=False)])


KINDS: dict[str, Any] = {
    "lists": (LENGTHS, [0.5, 1.0, 2.0, 4.0, 8.0]),
    "an array": (np.array(LENGTHS), np.arange(10.0).reshape(5, 2) + 1),
    "arrays in a list": ([np.int64(n) for n in LENGTHS], [np.full(2, 1.0 + n) for n in LENGTHS]),
    "pairs": (LENGTHS, [(1.0 + n, 0.0) for n in LENGTHS]),
    "pairs in a tuple": (LENGTHS, tuple((1.0 + n, 0.0) for n in LENGTHS)),
}


def beside(rank: int, options: dict[str, Any], rows: int) -> tuple[dict[str, float], dict[str, list[str]]]:
    mesh, found, told = gingham.init(**options), {}, {}
    for name, (lengths, scales) in KINDS.items():
        torch.manual_seed(0)
        original = Sums()
        model = gingham.parallelize(copy.deepcopy(original), mesh)
        x = torch.randn(rows, 5, 6)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                outputs = [each({"x": x, "names": NAMES[:rows]}, lengths[:rows], scales=scales[:rows]) for each in (model, original)]
        for output in outputs:
            output.square().sum().backward()
        found[name] = max(relative(*outputs), *errors(plain(model), plain(original)).values())
        told[name] = sorted(str(each.message).split("'")[1] for each in caught if "like the batch" in str(each.message))
    return found, told


@pytest.mark.parametrize("rows", [5, pytest.param(3, marks=pytest.mark.matrix), pytest.param(1, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("name", ["2d", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("1d", "2.5d", "3d"))])
def test_a17_entries_go_with_their_samples(ranks, name: str, rows: int) -> None:
    for found, told in ranks(ranks_of(name))(beside, GRIDS[name], rows):
        assert max(found.values()) <= 2e-6, found
        if rows > 1 and name != "1d":
            expected = ["batch.names", "lengths", "scales"]
            assert told == {each: ["batch.names"] if each == "an array" else expected for each in KINDS} | {
                "an array": ["batch.names", "lengths"]
            }


def recurrent(rank: int) -> dict[str, float]:
    mesh, found = gingham.init(**GRIDS["2d"]), {}
    for name, lengths in {"a list": LENGTHS, "an array": np.array(LENGTHS)}.items():
        torch.manual_seed(0)
        original = Packed()
        model, x = gingham.parallelize(copy.deepcopy(original), mesh), torch.randn(5, 5, 6)
        found[name] = relative(model(x, lengths), original(x, lengths))
    return found


def test_a17_lengths_of_a_recurrent_layer(ranks) -> None:
    for found in ranks(4)(recurrent):
        assert max(found.values()) <= 2e-6, found


def own_batches(rank: int) -> float:
    """Each data rank's own list, of another length."""
    mesh = gingham.init(parallel=dict(data=2, tensor=dict(size=4, mode="2d")))
    torch.manual_seed(0)
    original = Alone()
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    rows = 3 + mesh.data.rank
    x = torch.randn(rows, 5, 6)
    return relative(model(x, LENGTHS[:rows]), original(x, LENGTHS[:rows]))


def test_a17_each_data_rank_gives_its_own_list(ranks) -> None:
    assert all(error <= 2e-6 for error in ranks(8)(own_batches))


def said_of_a_tuple(rank: int) -> tuple[str, list[str], float, list[str]]:
    mesh = gingham.init(**GRIDS["2d"])
    torch.manual_seed(0)
    original = Sums()
    x, pair = torch.randn(4, 5, 6), {"x": torch.randn(2, 5, 6), "names": NAMES[:2]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = ""
        try:
            gingham.parallelize(Alone(), mesh)(x, (5, 3, 4, 2))
        except NotImplementedError as error:
            text = str(error)
        model = gingham.parallelize(copy.deepcopy(original), mesh, whole=("batch.names",))
    with warnings.catch_warnings(record=True) as silent:
        warnings.simplefilter("always")
        model = gingham.parallelize(copy.deepcopy(original), mesh, whole=("size",))
        error = relative(model(pair, [5, 3], size=(3, 2)), original(pair, [5, 3], size=(3, 2)))
    return text, [str(each.message) for each in caught], error, [str(each.message) for each in silent]


def test_a17_a_tuple_of_numbers_is_whole_and_told(ranks) -> None:
    """It may be a size; code that takes it for lengths is refused by what it makes of other samples."""
    for text, told, error, silent in ranks(4)(said_of_a_tuple):
        assert "a sample's place" in text, text
        assert told[0].startswith("argument 'lengths', a tuple of 4 entries, is whole on every rank: give a list or a tensor"), told
        assert error <= 2e-6 and not any("'size'" in each for each in silent), silent


class Scaled(Alone):
    def forward(self, x: torch.Tensor, lengths: Any) -> torch.Tensor:
        y = self.a(x)
        return y * y.new_tensor(lengths)[:, None, None]


def compiled(rank: int) -> tuple[float, int]:
    mesh = gingham.init(**GRIDS["2d"])
    torch.manual_seed(0)
    original = Scaled()
    model, x = gingham.parallelize(copy.deepcopy(original), mesh), torch.randn(4, 5, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = torch.compile(model, backend="aot_eager", fullgraph=True)
        error = max(relative(program(x, LENGTHS[at : at + 4]), original(x, LENGTHS[at : at + 4])) for at in (0, 1, 0))
    return error, sum("like the batch" in str(each.message) for each in caught)


def test_a17_a_compiled_model_takes_lists(ranks) -> None:
    for error, told in ranks(4)(compiled):
        assert error <= 2e-6 and told >= 1
