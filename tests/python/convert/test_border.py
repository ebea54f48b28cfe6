"""The border of a converted model: ways in besides calling it, arguments that are no batch, outputs that a plan leaves cut."""

import contextlib
import copy
import warnings
from typing import Any

import torch
from torch import nn

import families
from families import errors, plain
from grids import relative


class Encoder(nn.Module):
    """Has ways in besides forward: one that runs layers, one that calls the model, one that does both."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.encode(x))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self._inner(x).relu()

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc1(x)

    def score(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (self(x) - target).square().mean()

    def both(self, x: torch.Tensor) -> torch.Tensor:
        return self(x) + self.fc2(self.fc1(x))


def ways_in(rank: int) -> dict[str, Any]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    original, x = Encoder(), torch.randn(4, 8)
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    seen: list[tuple[int, ...]] = []
    model.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    found: dict[str, Any] = {
        "forward": relative(model.forward(x), original(x)),
        "encode": relative(model.encode(x), original.encode(x)),
        "score": relative(model.score(x, 2 * x), original.score(x, 2 * x)),
        "copy": relative(twin.forward(x), original(x)),
        "compiled": relative(compiled(x), original(x)),
    }
    model.score(x, 2 * x).backward()
    original.score(x, 2 * x).backward()
    found["gradients"] = max(errors(plain(model), plain(original)).values())
    try:
        model.both(x)
    except NotImplementedError as error:
        found["refused"] = str(error)
    found["hooks"] = set(seen)  # before a method that calls the model from within
    gingham.register_forward_method(model, "both")
    found["registered"] = relative(model.both(x), original.both(x))
    language = families.build("llama").eval()
    ids = families.batch("llama")["input_ids"]
    mine = gingham.parallelize(copy.deepcopy(language), mesh)
    found["language model"] = relative(mine.forward(ids).logits, language(ids).logits)
    found["its base"] = relative(mine.model(ids).last_hidden_state, language.model(ids).last_hidden_state)
    return found


def two_towers(rank: int) -> dict[str, Any]:
    import transformers as hf

    import gingham

    mesh = gingham.init(mode="2d", size=4)
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    text = dict(vocab_size=61, max_position_embeddings=16, eos_token_id=60, **tower)
    torch.manual_seed(0)
    original = hf.CLIPModel(
        hf.CLIPConfig(text_config=text, vision_config=dict(image_size=8, patch_size=4, **tower), projection_dim=8)
    ).eval()
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    ids, images = torch.arange(24).view(4, 6), torch.randn(4, 3, 8, 8)
    found: dict[str, Any] = {}
    for name, given in {"get_text_features": ids, "get_image_features": images}.items():
        got, expected = (getattr(each, name)(given) for each in (model, original))
        pooled = [y if isinstance(y, torch.Tensor) else y.pooler_output for y in (got, expected)]
        found[name] = relative(*pooled)
    try:
        found["contrast"] = str(model(input_ids=ids, pixel_values=images))
    except NotImplementedError as error:
        found["contrast"] = str(error)
    return found


def test_a10_a8_documented_methods_of_transformers_and_a_contrast_over_the_batch(ranks) -> None:
    found = ranks(4)(two_towers)[0]
    assert max(found["get_text_features"], found["get_image_features"]) <= 2e-6, found
    assert "mixes samples" in found["contrast"]


def test_a10_every_way_in_crosses_the_border_once(ranks) -> None:
    found = ranks(4)(ways_in)[0]
    assert found.pop("hooks") == {(4, 8)}
    assert "register_forward_method" in found.pop("refused")
    for name, error in found.items():
        assert error <= 2e-6, (name, error)


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        y = self.fc(x * positions[None, :, None])
        return y if factors is None else y * factors


def not_batched(rank: int) -> dict[str, Any]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    x, positions, factors = torch.randn(2, 2, 8), torch.randn(2).requires_grad_(), torch.randn(2, 8).requires_grad_()
    found: dict[str, Any] = {}
    original = Rotated()
    expected = original(x, positions, factors)
    expected.square().sum().backward()
    truth = [each.grad.clone() for each in (positions, factors)]
    positions.grad = factors.grad = None
    model = gingham.parallelize(copy.deepcopy(original), mesh, whole=("positions", "factors"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = model(x, positions, factors)
    y.square().sum().backward()
    found["said"] = relative(y, expected), max(relative(each.grad, right) for each, right in zip((positions, factors), truth, strict=True))
    found["quiet"] = [str(each.message) for each in caught]
    unsaid = gingham.parallelize(copy.deepcopy(original), mesh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with contextlib.suppress(RuntimeError):  # a part of the positions does not fit the time
                unsaid(x, positions)
    found["warned"] = [str(each.message) for each in caught if "whole=" in str(each.message)]
    try:
        gingham.parallelize(copy.deepcopy(original), mesh, whole=("position",))
    except ValueError as error:
        found["unknown"] = str(error)
    return found


def test_a17_an_argument_as_long_as_the_batch_is_said_whole_or_warned_of_once(ranks) -> None:
    found = ranks(4)(not_batched)[0]
    assert max(found["said"]) <= 2e-6 and found["quiet"] == []
    assert len(found["warned"]) == 1 and "'positions'" in found["warned"][0]
    assert "no argument 'position'" in found["unknown"]


class Two(nn.Module):
    def __init__(self, out: int = 6) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 10), nn.Linear(10, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).relu())


class Summed(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sum(-1)


class Attention(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.wqkv = nn.Linear(8, out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.wqkv(x).chunk(3, -1)
        return (q * k + v).sum(-1, keepdim=True) * torch.ones(8)


def plans(rank: int) -> dict[str, Any]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    found: dict[str, Any] = {}
    for word in ("colwise", "head", "colwise_gather_output", "keep"):
        for out in (6, 7):
            original = Two(out)
            model = gingham.parallelize(copy.deepcopy(original), mesh, plan={"fc2": word})
            got, expected = model(x), original(x)
            for y in (got, expected):
                y.square().sum().backward()
            found[f"{word} {out}"] = max(relative(got, expected), *errors(plain(model), plain(original)).values())
    for name, (original, plan) in {
        "summed": (Summed(), {"fc2": "colwise"}),
        "not three": (Attention(25), {"wqkv": "qkv"}),
        "three": (Attention(24), {"wqkv": "qkv"}),
    }.items():
        try:
            found[name] = gingham.parallelize(original, mesh, plan=plan)(x)
        except gingham.ShapeError as error:
            found[name] = str(error)
    joined = nn.Linear(8, 24, bias=False)
    fused = gingham.parallelize(nn.ModuleDict(dict(wqkv=copy.deepcopy(joined))), mesh, plan={"wqkv": "qkv"}).wqkv
    parts = [fused.get_parameter(name).full_tensor() for name in fused.joins["weight"][0]]
    found["split"] = float((torch.cat(parts, fused.joins["weight"][1]) - joined.weight).abs().max())
    return found


def test_a21_c14_a_plan_that_ends_in_cut_features_gives_full_outputs_or_names_the_layer(ranks) -> None:
    for found in ranks(4)(plans):
        for name, error in found.items():
            if name.startswith(("colwise", "head", "keep")):
                assert error <= 2e-6, (name, error)
        assert "fc2" in found["summed"] and "rowwise" in found["summed"]
        assert "wqkv" in found["not three"] and "25 outputs" in found["not three"]
        assert "wqkv" in str(found["three"]) and found["split"] == 0.0


class Mixer(nn.Module):
    def __init__(self, mix: Any, p: float = 0.0) -> None:
        super().__init__()
        self.fc, self.drop, self.mix, self.calls = nn.Linear(8, 8), nn.Dropout(p), mix, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.mix(self.drop(self.fc(x)))


MIXES = {
    "centred": lambda y: y - y.mean(0),
    "softmax": lambda y: y.softmax(0),
    "deviation": lambda y: y / y.std(0),
    "cumsum": lambda y: y.cumsum(0),
    "sort": lambda y: y.sort(0).values,
    "roll": lambda y: y.roll(1, 0),
    "product": lambda y: y @ y.T,
}
KEEPS = {
    "softmax of features": lambda y: y.softmax(-1),
    "two samples' worth": lambda y: y.repeat_interleave(2, 0),
    "square": lambda y: y @ y.mT,
}


def mixers(rank: int) -> dict[str, Any]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    found: dict[str, Any] = {}
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    for name, mix in MIXES.items():
        torch.manual_seed(0)
        model = gingham.parallelize(Mixer(mix), mesh)
        try:
            found[name] = model(x)
        except NotImplementedError as error:
            found[name] = str(error)
    for name, mix in KEEPS.items():
        torch.manual_seed(0)
        original = Mixer(mix)
        model, given = gingham.parallelize(copy.deepcopy(original), mesh), x[:, None] if name == "square" else x
        found[name] = relative(model(given), original(given)), float(model.count)
    torch.manual_seed(0)
    model = gingham.parallelize(Mixer(torch.relu, 0.5).train(), mesh)
    first = model(x)
    found["dropout"] = relative(first, model(x)) > 0.1, model.drop.calls
    return found


def test_a8_code_that_mixes_samples_is_refused_at_the_first_call(ranks) -> None:
    for found in ranks(4)(mixers):
        for name in MIXES:
            assert "mixes samples" in str(found[name]), (name, found[name])
        for name in KEEPS:
            error, count = found[name]
            assert error <= 2e-6 and count == 1, (name, found[name])
        assert found["dropout"] == (True, 2)
