"""What the first calls of a converted model see of code that nothing vouches for: it goes by the samples of a rank (A8), or leaves
something of them behind (A12)."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import gingham
from grids import GRIDS, ranks_of, relative, whole

W, ROWS = 24, 8


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(W, W), nn.Linear(W, W)
        self.register_buffer("mean", torch.zeros(W))
        self.kept: Any = None
        self.calls, self.seen = 0, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class Size(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) / x.shape[0]


class SizeBesideDropout(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(nn.functional.dropout(self.a(x), 0.5, self.training)) / len(x)


class Place(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) * torch.arange(len(x)).unsqueeze(1)


class Counted(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.b(self.a(row)) * index for index, row in enumerate(x)])


class Running(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.b(h)


class Replaced(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.b(h)


class Left(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        self.kept = h.pow(2).mean()
        return self.b(h)


class InTrainingOnly(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.b(h - h.mean(0) if self.training else h)


class One(nn.Module):
    """A model with one child, as a wrapper has that only hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W))


class Centred(One):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x - x.mean(0))


class Divided(One):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) / len(x)


class Halves(One):
    """Whose last sample is in the second half, whatever their number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.net(x).chunk(2)
        return torch.cat([first, second * 2])


class Handing(One):
    """Changes what it was given before it hands it on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.softmax(0)
        return self.net(x)


class Slopes(Two):
    """Forces of an energy: gradients of its own in forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.b(self.a(x).tanh()).sum(), x, create_graph=torch.is_grad_enabled())[0]


class Forces(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.b(self.a(x).tanh()).sum(), x, create_graph=True)[0]


class KeptRows(Two):
    """What it keeps has the rows of the call before, of training too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        self.kept = h.detach() if self.kept is None or len(self.kept) != len(h) else 0.5 * self.kept + h.detach()
        return self.b(h + self.kept)


class Mask(Two):
    """As long as this rank's rows, and not one of them."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = self.a(x.unsqueeze(1) + torch.arange(4.0).unsqueeze(1))
        return self.b(((q @ q.transpose(1, 2) + mask).softmax(-1) @ q).sum(1))


class Keeps(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        self.kept = h.detach() if self.kept is None else 0.5 * self.kept + h.detach()
        self.calls += 1
        self.seen.append(self.calls)
        self.map = h.softmax(-1)
        return self.b(h + self.kept + self.map) * self.calls * len(self.seen)


WRONG = {Size: "number of samples", SizeBesideDropout: "number of samples", Place: "number of samples", Counted: "number of samples"}
WRONG |= {Centred: "mixes samples", Divided: "number of samples", Halves: "a sample's place", Handing: "mixes samples"}
WRONG |= {Running: "buffers (mean)", Replaced: "buffers (mean)", Left: "kept is a number", InTrainingOnly: "mixes samples"}


def outcomes(rank: int, options: dict[str, Any]) -> dict[str, str]:
    mesh, found = gingham.init(**options), {}
    warnings.simplefilter("ignore")
    for kind in WRONG:
        torch.manual_seed(0)
        model = gingham.parallelize(kind(), mesh)
        x = torch.randn(ROWS, W, generator=torch.Generator().manual_seed(1))
        try:
            if kind is InTrainingOnly:  # seen also where the first call was none
                model.eval()
                with torch.no_grad():
                    model(x)
                model.train()
            model(x)
            found[kind.__name__] = ""
        except NotImplementedError as error:
            found[kind.__name__] = str(error)
    return found


@pytest.mark.parametrize("name", ["2d", pytest.param("3d", marks=pytest.mark.matrix), pytest.param("2.5d", marks=pytest.mark.matrix)])
def test_a8_a12_code_that_goes_by_this_ranks_samples_is_refused(ranks, name: str) -> None:
    for found in ranks(ranks_of(name))(outcomes, GRIDS[name]):
        assert not {kind.__name__: found[kind.__name__] for kind, words in WRONG.items() if words not in found[kind.__name__]}


class SoftmaxOfBatch(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).softmax(0))


LONE = {Size: "one sample", Centred: "one sample", Handing: "one sample", SoftmaxOfBatch: "one sample", Running: "buffers (mean)"}


def lone(rank: int, options: dict[str, Any], rows: int, kind_of_input: str) -> dict[str, str]:
    """A batch with at most one sample for each rank, also one that is the same throughout; what is right stays so."""
    mesh, found = gingham.init(**options), {}
    warnings.simplefilter("ignore")
    for kind in (*LONE, Two, Slopes, One):
        torch.manual_seed(0)
        original = kind() if kind is not One else One().net
        model = gingham.parallelize(copy.deepcopy(original), mesh)
        x = torch.ones(rows, W) if kind_of_input == "ones" else torch.randn(rows, W, generator=torch.Generator().manual_seed(1))
        for grad in (True, False):
            try:
                with torch.set_grad_enabled(grad):
                    error = relative(model(x), original(x))
                text = "" if error < 1e-5 else f"{error} off"
            except NotImplementedError as said:
                text = str(said)
            found[f"{kind.__name__} {grad}"] = text
    return found


@pytest.mark.parametrize("kind_of_input", ["random", "ones"])
@pytest.mark.parametrize(
    "name, rows",
    [("2d", 2), pytest.param("2.5d", 4, marks=pytest.mark.matrix), ("2.5d", 3), pytest.param("3d", 2, marks=pytest.mark.matrix)],
)
def test_code_that_mixes_samples_is_refused_with_one_sample_a_rank_too(ranks, name: str, rows: int, kind_of_input: str) -> None:
    for found in ranks(ranks_of(name))(lone, GRIDS[name], rows, kind_of_input):
        for kind, words in LONE.items():
            if kind is not Running or kind_of_input == "random":  # the mean of what is the same throughout is right
                assert words in found[f"{kind.__name__} True"], found
        assert not any(found[f"{kind.__name__} {grad}"] for kind in (Two, Slopes, One) for grad in (True, False)), found


class Scaled(Two):
    """A tensor of its own, as long as the rows of one rank and not of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = torch.tensor([1.0, 2.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) * self.scales.sum()


def uneven(rank: int, rows: int) -> float:
    mesh = gingham.init(**GRIDS["2d"])
    torch.manual_seed(0)
    original, x = Scaled(), torch.randn(rows, W)
    return relative(gingham.parallelize(copy.deepcopy(original), mesh)(x), original(x))


@pytest.mark.parametrize("rows", [3, 4, 5])
def test_an_attribute_as_long_as_one_ranks_rows(ranks, rows: int) -> None:
    assert all(error < 1e-5 for error in ranks(4)(uneven, rows))


def compared(rank: int, options: dict[str, Any]) -> dict[str, float]:
    """Models that keep something between calls, and an argument as long as a rank's rows: as in one process, call by call."""
    mesh, found = gingham.init(**options), {}
    for kind in (Mask, Keeps, KeptRows, Slopes, Forces):
        torch.manual_seed(0)
        original = kind()
        model = gingham.parallelize(copy.deepcopy(original), mesh)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            x = torch.randn(ROWS, W, generator=generator)
            more = [torch.ones(4, 4).triu(1) * -1e9] if kind is Mask else []
            found[kind.__name__] = max(found.get(kind.__name__, 0.0), relative(model(x, *more), original(x, *more)))
        if kind is KeptRows:
            found["in eval"] = relative(model.eval()(x), original.eval()(x))
    return found


def test_what_a_right_model_keeps_is_as_it_would_be(ranks) -> None:
    for found in ranks(4)(compared, GRIDS["2d"]):
        assert all(error < 1e-5 for error in found.values()), found


def heard(rank: int) -> tuple[list[str], list[str], float]:
    """Hooks of one rank only, as of a logger."""
    mesh, told = gingham.init(**GRIDS["2d"]), []
    for kind in (Two, Centred):
        torch.manual_seed(0)
        original, x = kind(), torch.randn(ROWS, W)
        model, seen = gingham.parallelize(copy.deepcopy(original), mesh), []
        if rank == 1:
            model.register_forward_hook(lambda module, args, y, seen=seen: seen.append(len(y)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outputs = [model(x), model(x)]
        told.append([str(each.message) for each in caught if "hooks listen" in str(each.message)])
        assert seen == ([ROWS] * 2 if rank == 1 else [])
        if kind is Two:
            error = max(relative(output, original(x)) for output in outputs)
    return told[0], told[1], error


def test_hooks_hear_no_other_calls_and_it_is_told(ranks) -> None:
    for right, mixing, error in ranks(4)(heard):
        for kind, told in (("Two", right), ("Centred", mixing)):
            assert len(told) == 1 and told[0].startswith(f"{kind}: forward hooks listen on rank 1"), told
        assert error <= 2e-6


class Room(Two):
    """Has room for so many samples, as caches of keys and values have."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.room = torch.zeros(most, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        room = self.room.clone()
        room[: len(x)] = self.a(x)
        return self.b(room[: len(x)].view(x.shape))


def checkpointed(rank: int, options: dict[str, Any], rows: int) -> list[float]:
    """Activation checkpointing around a first call, and a model with no room for a sample more."""
    mesh, found = gingham.init(**options), []
    x = torch.randn(rows, W, generator=torch.Generator().manual_seed(1))
    part = x if mesh.data.size == 1 else x.chunk(mesh.data.size)[mesh.data.rank]
    for reentrant in (True, False):
        torch.manual_seed(0)
        original = Two()
        model = gingham.parallelize(copy.deepcopy(original), mesh)
        for each, given in ((original, x), (model, part)):
            torch.utils.checkpoint.checkpoint(each, given.clone().requires_grad_(), use_reentrant=reentrant).square().mean().backward()
        found.append(relative(model.a.weight.grad.full_tensor(), original.a.weight.grad))
    torch.manual_seed(0)
    original = Room(len(part))
    return [*found, relative(gingham.parallelize(copy.deepcopy(original), mesh)(part), original(part))]


@pytest.mark.parametrize(
    "options, rows",
    [(GRIDS["2d"], 8), (dict(parallel=dict(data=2, tensor=dict(size=2, mode="1d"))), 8)],
)
def test_a_first_call_under_checkpointing_and_with_no_room_for_more(ranks, options: dict[str, Any], rows: int) -> None:
    for found in ranks(4)(checkpointed, options, rows):
        assert len(found) == 3 and all(error < 1e-5 for error in found), found


def labelled(rank: int) -> tuple[str, float]:
    """T5's own labels, and the decoder's ids that it would make of them."""
    import transformers

    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    sizes = dict(d_model=48, d_kv=4, d_ff=96, num_layers=1, num_heads=12, vocab_size=96, dropout_rate=0, decoder_start_token_id=0)
    original = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    ids = torch.randint(3, 96, (ROWS, 6), generator=torch.Generator().manual_seed(1))
    try:
        model(input_ids=ids, labels=ids)
        text = ""
    except NotImplementedError as error:
        text = str(error)
    decoder = model.prepare_decoder_input_ids_from_labels(ids)
    got, expected = (each(input_ids=ids, decoder_input_ids=decoder).logits for each in (model, original))
    return text, relative(got, expected)


def test_a20_labels_of_an_unknown_loss_are_refused_before_the_call(ranks) -> None:
    for text, error in ranks(4)(labelled):
        assert "prepare_decoder_input_ids_from_labels" in text and error < 1e-5


def normed(rank: int) -> float:
    """The largest error of outputs and buffers of two calls with spectral_norm, whose buffers are DTensors beside converted layers."""
    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    serial = Two()
    model = gingham.parallelize(copy.deepcopy(serial), mesh)
    x = torch.randn(ROWS, W)
    for each in (serial, model):
        torch.manual_seed(1)
        nn.utils.parametrizations.spectral_norm(each.b)
    errors = [relative(model(x), serial(x)) for _ in range(2)]
    theirs = dict(serial.named_buffers())
    return max(*errors, *(relative(whole(buffer), theirs[name]) for name, buffer in model.named_buffers() if name != "mean"))


def test_buffers_that_a_parametrization_makes_of_dtensors_are_compared(ranks) -> None:
    assert all(error < 1e-4 for error in ranks(4)(normed))
