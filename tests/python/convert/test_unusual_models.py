"""Models and calls that a conversion could get wrong in silence: they are right, or refused with the reason."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import families
from families import errors, joint_error, plain
from grids import relative


class Scaled(nn.Linear):
    """Does more than its class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


class Mixed(nn.Module):
    """A linear in two places, one weight in two linears, a layer called twice, a subclass with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.scaled = nn.Linear(8, 8), nn.Linear(8, 8), Scaled(8, 8)
        self.again, self.two.weight = self.one, self.one.weight
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.scaled(self.two(self.again(self.one(x))).tanh()))


def modules(rank: int) -> dict[str, Any]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    cases = {
        "mixed": (Mixed(), 6),
        "one row": (nn.TransformerEncoderLayer(8, 4, 16, 0.0), 1),
        "nested": (nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)), nn.Linear(8, 5)), 3),
    }
    for name, (original, rows) in cases.items():
        model = gingham.parallelize(copy.deepcopy(original), mesh)
        x = torch.randn(5, rows, 8) if name == "one row" else torch.randn(rows, 8)
        got, expected = model(x), original(x)
        cotangent = torch.randn(expected.shape)
        for y in (got, expected):
            (y * cotangent).sum().backward()
        found[name] = (relative(got, expected), max(errors(plain(model), plain(original)).values()))
        if name == "mixed":
            found["ties"] = (
                model.again is model.one,
                model.two.weight is model.one.weight,
                [p.requires_grad for p in model.frozen.parameters()],
            )
    hooked = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    seen: list[tuple[int, ...]] = []
    hooked[0].register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = gingham.parallelize(hooked, mesh)
    model(torch.randn(6, 8))
    found["hook"] = (seen, [str(each.message) for each in caught if "hooks on 0" in str(each.message)])
    return found


def test_shared_frozen_hooked_and_derived_modules(ranks) -> None:
    found = ranks(4)(modules)[0]
    for name in ("mixed", "one row", "nested"):
        assert max(found[name]) <= 2e-6, (name, found[name])
    assert found["ties"] == (True, True, [False, False])
    assert found["hook"][0] == [(3, 4)] and len(found["hook"][1]) == 1


def refusals(rank: int) -> dict[str, str]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8))
    softmax = nn.TransformerEncoderLayer(8, 4, 16, activation=lambda x: x.softmax(-1))
    loss = nn.Sequential(nn.Linear(8, 8))
    calls: dict[str, Callable[[], Any]] = {
        "weight norm": lambda: gingham.parallelize(normed, mesh),
        "softmax between": lambda: gingham.parallelize(softmax, mesh),
        "pickled after": lambda: pickle.dumps(gingham.parallelize(loss, mesh)),
        "nothing on one rank": lambda: gingham.parallelize(nn.Sequential(nn.Linear(8, 8)), mesh)(torch.ones(6, 8) if rank < 3 else None),
        "no samples": lambda: gingham.parallelize(nn.TransformerEncoderLayer(8, 4, 16), mesh)(torch.randn(5, 8)),
    }
    found = {}
    for name, call in calls.items():
        try:
            found[name] = f"nothing was raised: {call()}"
        except (NotImplementedError, TypeError, gingham.MeshError, gingham.ShapeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weight norm", "weight_norm"),
        ("softmax between", "may mix features"),
        ("pickled after", "cannot be pickled"),
        ("nothing on one rank", "rank 3 got other inputs"),
        ("no samples", "expected at least 3 dims"),
    ],
)
def test_what_would_be_wrong_is_refused(ranks, name: str, words: str) -> None:
    assert words in ranks(4)(refusals)[0][name]


def calls(rank: int) -> dict[str, float]:
    """A Llama, called in unusual ways, beside the original."""
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    original = families.build("llama", tie_word_embeddings=True)
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    ids = families.batch("llama", rows=3)["input_ids"]
    embedded = original.get_input_embeddings()(ids).detach()
    positions = torch.arange(ids.shape[1]).flip(0)[None]
    found = {}
    for name, call in {
        "positional": lambda each: each(ids).logits,
        "hidden states": lambda each: torch.stack(each(ids, output_hidden_states=True).hidden_states),
        "tuple": lambda each: each(ids, labels=ids, return_dict=False)[1],
        "embeddings": lambda each: each(inputs_embeds=embedded).logits,
        "positions": lambda each: each(ids, position_ids=positions).logits,
        "positions of rows": lambda each: each(ids, position_ids=positions.expand(3, -1)).logits,
        "last token": lambda each: each(ids, logits_to_keep=1).logits,
    }.items():
        found[name] = relative(call(model), call(original))
    with torch.inference_mode():
        found["inference"] = relative(model(ids).logits, original(ids).logits)
    for each in (model, original):
        for part in ids.split((2, 1)):
            each(part, labels=part).loss.backward()
    found["accumulated"] = joint_error(plain(model), plain(original))
    left = torch.ones_like(ids)
    left[0, :4] = 0
    written = [each.eval().generate(ids, attention_mask=left, max_new_tokens=4, do_sample=False) for each in (model, original)]
    found["left padding"] = float((written[0] != written[1]).sum())
    drawn = []
    for each in (model, original):
        torch.manual_seed(8)
        drawn.append(each.generate(ids, attention_mask=left, max_new_tokens=4, do_sample=True))
    found["sampled"] = float((drawn[0] != drawn[1]).sum())
    return found


def test_unusual_calls(ranks) -> None:
    for name, error in ranks(4)(calls)[0].items():
        assert error <= 2e-6, (name, error)
