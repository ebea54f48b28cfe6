"""Wrappers around a model and around its linears: seen through, or refused with the name of what stands there."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import families
from grids import GRIDS, ranks_of, relative

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
}


class Mixing(families.Around):
    """Looks like it, but mixes features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).softmax(-1)


def with_adapters(family: str, **changed: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(families.build(family), LoraConfig(r=4, target_modules=TARGETS[family], lora_dropout=0.0, **changed))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: no gradient would reach A
            nn.init.normal_(parameter, std=0.1)
    return model


def adapted(rank: int, grid: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, float]:
    import gingham

    mesh = gingham.init(**grid)
    found = {}
    for family in kinds:
        original = with_adapters(family)
        model = gingham.parallelize(copy.deepcopy(original), mesh)
        inputs = families.batch(family)
        outputs = [each(**inputs) for each in (model, original)]
        for output in outputs:
            output.loss.backward()
        found[f"{family} loss"] = relative(outputs[0].loss, outputs[1].loss)
        found[f"{family} logits"] = relative(outputs[0].logits, outputs[1].logits)
        got, expected = families.plain(model), families.plain(original)
        assert got.keys() == expected.keys() and all("lora" in name for name in got), sorted(got)
        found[f"{family} gradients"] = families.joint_error(got, expected)
        found[f"{family} worst gradient"] = max(relative(got[name], truth) for name, truth in expected.items() if "key.lora" not in name)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "2d",
        pytest.param("3d", marks=pytest.mark.matrix),
        pytest.param("1d", marks=pytest.mark.matrix),
        pytest.param("2.5d", marks=pytest.mark.matrix),
    ],
)
def test_a7_lora_before_parallelize_is_serial(ranks, name: str) -> None:
    for what, error in ranks(ranks_of(name))(adapted, GRIDS[name], tuple(TARGETS))[0].items():
        assert error <= (1e-6 if what.endswith(" gradients") else 2e-6), (what, error)


def wrapped(rank: int) -> dict[str, Any]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    found: dict[str, Any] = {}
    inputs = families.batch("gpt2")
    expected = families.build("gpt2")(**inputs)

    def around(place: str, kind: Any) -> Any:
        model = families.build("gpt2")
        for index in range(families.LAYERS):
            owner, _, last = place.format(index).rpartition(".")
            parent = model.get_submodule(owner)
            parent._modules[last] = kind(parent._modules[last])
        return model

    for name, make in {
        "around a linear": lambda: around("transformer.h.{}.attn.c_attn", families.Around),
        "around a block": lambda: around("transformer.h.{}", families.Around),
        "compiled block": lambda: around("transformer.h.{}.mlp", lambda each: torch.compile(each, backend="eager")),
        "around the model": lambda: families.Around(families.build("gpt2")),
        "compiled": lambda: torch.compile(families.build("gpt2"), backend="eager"),
    }.items():
        output = gingham.parallelize(make(), mesh)(**inputs)
        found[name] = max(relative(output.loss, expected.loss), relative(output.logits, expected.logits))
    for name, make in {
        "mixing": lambda: around("transformer.h.{}.attn.c_attn", Mixing),
        "no linear": lambda: around("transformer.h.{}.attn.c_attn", lambda each: nn.Identity()),
        "another linear": lambda: around("transformer.h.{}.mlp", lambda each: nn.Sequential(nn.Linear(32, 32))),
    }.items():
        try:
            found[name] = gingham.parallelize(make(), mesh)
        except NotImplementedError as error:
            found[name] = str(error)
    return found


def test_a7_wrappers_are_seen_through_or_named(ranks) -> None:
    found = ranks(4)(wrapped)[0]
    for name in ("around a linear", "around a block", "compiled block", "around the model", "compiled"):
        assert found[name] <= 2e-6, (name, found[name])
    assert "transformer.h.0.attn.c_attn: Mixing" in found["mixing"]
    assert "'h.*.attn.c_attn'" in found["no linear"] and "Identity" in found["no linear"]
    assert "transformer.h.0.mlp.0" in found["another linear"]


def adapted_later(rank: int, grid: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    import gingham

    mesh = gingham.init(**grid)
    found: dict[str, Any] = {}
    for family in kinds:
        models, optimizers = [], []
        for model in (gingham.parallelize(families.build(family), mesh), families.build(family)):
            config = LoraConfig(r=4, target_modules=TARGETS[family], lora_dropout=0.0)
            torch.manual_seed(3)
            models.append(get_peft_model(model, config))
            for name, parameter in models[-1].named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter, std=0.1)
            optimizers.append(torch.optim.SGD([p for p in models[-1].parameters() if p.requires_grad], lr=0.1))
        outputs = [each(**families.batch(family)) for each in models]
        for output in outputs:
            output.loss.backward()
        found[f"{family} logits"] = relative(outputs[0].logits, outputs[1].logits)
        found[f"{family} gradients"] = families.joint_error(*map(families.plain, models))
        if family != "gpt2":  # whose joined adapter is three parameters now
            for optimizer in optimizers:
                optimizer.step()
            found[f"{family} moved"] = families.joint_error(*(families.plain(each, False) for each in models))
    late = gingham.parallelize(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), mesh)
    late(torch.ones(4, 8))
    late.append(nn.Linear(8, 3))
    try:
        late(torch.ones(4, 8))
    except NotImplementedError as error:
        found["a head"] = str(error)
    return found


@pytest.mark.parametrize("name", ["2d", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("1d", "2.5d", "3d"))])
def test_a7_lora_after_parallelize_is_serial_and_other_late_modules_are_named(ranks, name: str) -> None:
    found = ranks(ranks_of(name))(adapted_later, GRIDS[name], tuple(TARGETS))[0]
    assert "2.weight of Linear" in found.pop("a head")
    for what, error in found.items():
        assert error <= 1e-6, (what, error)
