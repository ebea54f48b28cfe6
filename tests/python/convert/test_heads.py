"""Heads and bodies of many families of transformers beside the originals: logits, the class's own loss, gradients."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import heads
from families import errors, joint_error, plain
from grids import GRIDS, ranks_of, relative


def side_by_side(rank: int, grid: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    import gingham

    mesh = gingham.init(**grid)
    return {kind: heads.compared(mesh, kind) for kind in kinds}


TYPICAL = {  # on 1d there are fewer key and value heads than ranks
    "1d": ["Qwen2ForTokenClassification", "GemmaForCausalLM", "Phi3ForCausalLM", "Olmo2ForCausalLM"],
    "2d": [
        *("XLNetLMHeadModel", "MarianForCausalLM", "BartForConditionalGeneration", "AlbertForPreTraining", "GemmaForCausalLM"),
        *("LlamaForQuestionAnswering", "MistralForTokenClassification", "GPT2ForTokenClassification", "BertForMultipleChoice"),
    ],
}


@pytest.mark.parametrize("name", TYPICAL)
def test_a20_a22_c6_c13_heads_and_losses_are_the_classes_own(ranks, name: str) -> None:
    for kind, found in ranks(4)(side_by_side, GRIDS[name], TYPICAL[name])[0].items():
        assert not isinstance(found, str), (kind, found)
        assert max(found.values()) <= 3e-6, (kind, found)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["1d", "2d", "2.5d", "3d"])
@pytest.mark.parametrize("family", heads.FAMILIES)
def test_every_family_with_every_head(ranks, family: str, name: str) -> None:
    kinds = heads.cases(family)
    assert kinds
    for kind, found in ranks(ranks_of(name))(side_by_side, GRIDS[name], kinds)[0].items():
        assert not isinstance(found, str), (kind, found)
        assert max(found.values()) <= 3e-6, (kind, found)


def unvouched(rank: int, grid: dict[str, Any]) -> dict[str, Any]:
    """A model of a user's own with a tp_plan, whose body norms without a weight and takes a softmax over its width."""
    import transformers as hf

    import gingham

    mesh = gingham.init(**grid)

    class Config(hf.PretrainedConfig):
        model_type = "of_its_own"
        base_model_tp_plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
        hidden_size, num_attention_heads, num_hidden_layers = 16, 4, 2

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
            y = nn.functional.layer_norm(y, y.shape[-1:]) + y.softmax(-1)
            return x + self.down(self.up(y).relu())

    class Body(hf.PreTrainedModel):
        config_class, base_model_prefix = Config, "model"

        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.embed, self.layers = nn.Embedding(31, 16), nn.ModuleList([Layer(), Layer()])
            self.post_init()

        def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(x)
            return hf.modeling_outputs.BaseModelOutput(last_hidden_state=x)

    torch.manual_seed(1)
    original = Body(Config())
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    ids = torch.arange(24).view(4, 6)
    got, expected = (each(input_ids=ids).last_hidden_state for each in (model, original))
    for y in (got, expected):
        y.pow(3).sum().backward()
    return {
        "hidden": relative(got, expected),
        "gradients": joint_error(plain(model), plain(original)),
        "layouts": (model.layers[0].up.layout, model.layers[0].down.layout),
        "words": [line.reason for line in model.gingham_plan if "whole features" in line.reason],
    }


@pytest.mark.parametrize("name", ["2d", "3d"])
def test_a19_a_body_that_only_its_plan_vouches_for_keeps_whole_features(ranks, name: str) -> None:
    found = ranks(ranks_of(name))(unvouched, GRIDS[name])[0]
    assert max(found["hidden"], found["gradients"]) <= 3e-6, found
    assert found["layouts"] == ("rows->inner", "inner->rows")
    assert len(found["words"]) == 1 and "Layer" in found["words"][0]


def odd_labels(rank: int) -> dict[str, Any]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    found: dict[str, Any] = {}
    for kind in ("BertForMaskedLM", "LlamaForCausalLM", "GPT2LMHeadModel", "BertForSequenceClassification", "RobertaForMaskedLM"):
        original, given = heads.build(kind), heads.batch(kind)
        model = gingham.parallelize(copy.deepcopy(original), mesh)
        got, expected = (each(**given, num_items_in_batch=torch.tensor(11)).loss for each in (model, original))
        found[f"{kind} items"] = relative(got, expected)
    original, given = heads.build("BertForPreTraining"), heads.batch("BertForPreTraining")
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    given.pop("next_sentence_label")
    found["labels alone"] = [each(**given).loss for each in (model, original)]
    original, given = heads.build("BertForQuestionAnswering"), heads.batch("BertForQuestionAnswering")
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    given.pop("end_positions")
    found["a start alone"] = [each(**given).loss for each in (model, original)]
    return found


def test_a18_c14_labels_and_their_number_count_as_in_the_class(ranks) -> None:
    found = ranks(4)(odd_labels)[0]
    assert found.pop("labels alone") == [None, None] and found.pop("a start alone") == [None, None]
    for name, error in found.items():
        assert error <= 2e-6, (name, error)


class Reader(nn.Module):
    """Its code reads the weights of its layers instead of calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.other = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.fc.weight.T + self.fc.bias + self.table.weight[: x.shape[1]]
        return self.other(y) @ self.table.weight.T


def readers(rank: int) -> dict[str, Any]:
    import transformers as hf

    import gingham

    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    original, x = Reader(), torch.randn(4, 5, 8)
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    got, expected = model(x), original(x)
    for y in (got, expected):
        y.square().sum().backward()
    found: dict[str, Any] = {"reader": max(relative(got, expected), *errors(plain(model), plain(original)).values())}
    sizes = dict(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
    sizes |= dict(encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10, max_target_positions=20)
    ends = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, suppress_tokens=None, begin_suppress_tokens=None)
    torch.manual_seed(0)
    speech = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **ends, dropout=0.0))
    model = gingham.parallelize(copy.deepcopy(speech), mesh)
    given = dict(input_features=torch.randn(4, 8, 20), labels=torch.arange(24).view(4, 6) + 3)
    outputs = [each(**given) for each in (model, speech)]
    for output in outputs:
        output.loss.backward()
    found["whisper"] = max(relative(outputs[0].logits, outputs[1].logits), joint_error(plain(model), plain(speech)))
    return found


def test_c5_layers_whose_weights_other_code_reads_stay_whole(ranks) -> None:
    for name, error in ranks(4)(readers)[0].items():
        assert error <= 3e-6, (name, error)


def messages(rank: int) -> dict[str, str]:
    import transformers as hf

    import gingham

    mesh = gingham.init(mode="1d", size=4)
    found = {}
    for name, call in {
        "heads": lambda: hf.LlamaModel(
            hf.LlamaConfig(**heads.SIZES | dict(num_attention_heads=6, num_key_value_heads=6, hidden_size=48, head_dim=8))
        ),
        "experts": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**heads.SIZES)),
    }.items():
        try:
            found[name] = str(gingham.parallelize(call(), mesh))
        except (NotImplementedError, gingham.ShapeError) as error:
            found[name] = str(error)
    return found


def test_c6_refusals_name_grids_that_would_do(ranks) -> None:
    found = ranks(4)(messages)[0]
    assert "6 heads on 4 ranks" in found["heads"] and "(2, 2, 1)" in found["heads"]
    assert "plan of MixtralForCausalLM" in found["experts"]
