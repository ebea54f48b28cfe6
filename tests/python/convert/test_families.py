"""GPT-2, Llama, BERT and ViT of transformers, converted: logits, loss and gradients of the original model, on every mesh."""

from typing import Any

import pytest

import families
from families import FAMILIES
from grids import GRIDS, ranks_of

# transformers' attention takes shapes from before its projections, which sequence=True would change
WHOLE_SAMPLES = [name for name in GRIDS if name != "1d sequence"]
every_mesh = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("2.5d", "3d") else [pytest.mark.matrix]) for n in WHOLE_SAMPLES]
)


def compared(rank: int, family: str, grid: dict[str, Any], sizes: dict[str, int]) -> tuple[dict[str, float], list[tuple[str, str]]]:
    import gingham

    mesh = gingham.init(**grid)
    return families.beside(mesh, family, **sizes)


@every_mesh
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(ranks, family: str, name: str) -> None:
    sizes = dict(width=48, heads=12, kv_heads=6) if name == "1x3x2" else {}  # six ranks cut features: heads that six divides
    errors, left = ranks(ranks_of(name))(compared, family, GRIDS[name], sizes)[0]
    assert max(errors.values()) <= 2e-6, max(errors.items(), key=lambda pair: pair[1])
    assert left == [], "a linear, an embedding or a norm stayed serial"


def followed(rank: int, family: str, grid: dict[str, Any], steps: int) -> tuple[list[float], list[float]]:
    import gingham

    mesh = gingham.init(**grid)
    serial = families.curve(families.build(family), family, steps)
    return families.curve(gingham.parallelize(families.build(family), mesh), family, steps), serial


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["2.5d", "3d"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_steps_follow_the_serial_loss(ranks, family: str, name: str) -> None:
    got, expected = ranks(8)(followed, family, GRIDS[name], 100, timeout=280)[0]
    assert got == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]


def test_ten_steps_follow_the_serial_loss(ranks) -> None:
    got, expected = ranks(8)(followed, "llama", GRIDS["2.5d"], 10)[0]
    assert got == pytest.approx(expected, rel=1e-5)


def with_dropout(rank: int, family: str, grid: dict[str, Any], recompute: bool) -> list[float]:
    import torch

    import gingham

    mesh = gingham.init(**grid)
    model = families.build(family, dropout=0.2).train()
    torch.manual_seed(11)
    model = gingham.parallelize(model, mesh)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return families.curve(model, family, 3)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("bert", marks=pytest.mark.matrix), pytest.param("vit", marks=pytest.mark.matrix)])
def test_dropout_is_that_of_one_process_also_under_checkpointing(ranks, family: str) -> None:
    alone = ranks(1)(with_dropout, family, {}, False)[0]
    for grid in (GRIDS["2d"], GRIDS["1d"]):
        assert ranks(4)(with_dropout, family, grid, False)[0] == pytest.approx(alone, rel=1e-5)
    assert ranks(4)(with_dropout, family, GRIDS["2d"], True)[0] == pytest.approx(alone, rel=1e-5)
    assert alone != ranks(1)(lambda rank: families.curve(families.build(family), family, 3))[0], "dropout did nothing"


def generated(rank: int, family: str, grid: dict[str, Any], rows: int) -> tuple[list[Any], list[Any]]:
    import copy

    import gingham

    mesh = gingham.init(**grid)
    original = families.build(family).eval()
    ids = families.batch(family, rows=rows)["input_ids"][:, :5]
    serial = original.generate(ids, max_new_tokens=7, do_sample=False)
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    return model.generate(ids, max_new_tokens=7, do_sample=False).tolist(), serial.tolist()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_is_the_serial_models(ranks, family: str, rows: int) -> None:
    """One row on a mesh with two row ranks: one of them has none."""
    got, expected = ranks(4)(generated, family, GRIDS["2d"], rows)[0]
    assert got == expected and len(got[0]) == 12


def headed(rank: int, grid: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    import copy

    import torch
    import transformers as hf

    import gingham
    from grids import relative

    mesh = gingham.init(**grid)
    ids = families.batch("bert")["input_ids"]
    rows = len(ids)
    answers = torch.arange(rows)
    labels = dict(labels=torch.tensor([0, 0, 2, 0, 0, 1]))  # not balanced: gradients would nearly cancel
    tests: dict[str, tuple[str, dict[str, Any], str]] = {
        "BertForSequenceClassification": ("bert", labels, "logits"),
        "BertForTokenClassification": ("bert", dict(labels=ids % 3), "logits"),
        "BertForNextSentencePrediction": ("bert", dict(labels=labels["labels"].clamp(max=1)), "logits"),
        "BertForPreTraining": ("bert", dict(labels=ids, next_sentence_label=1 - labels["labels"].clamp(max=1)), "prediction_logits"),
        "BertForQuestionAnswering": ("bert", dict(start_positions=answers, end_positions=answers), "start_logits"),
        "GPT2ForSequenceClassification": ("gpt2", labels, "logits"),
        "LlamaForSequenceClassification": ("llama", labels, "logits"),
        "LlamaForTokenClassification": ("llama", dict(labels=ids % 3), "logits"),
        "BertModel": ("bert", {}, "pooler_output"),
        "LlamaModel": ("llama", {}, "last_hidden_state"),
    }
    found = {}
    for kind, (family, given, field) in tests.items():
        config = families.build(family).config
        config.num_labels, config.pad_token_id = 2 if "Question" in kind else 3, 1
        config.classifier_dropout = 0.0
        torch.manual_seed(2)
        original = getattr(hf, kind)(config)
        model = gingham.parallelize(copy.deepcopy(original), mesh)
        errors = []
        outputs = [each(input_ids=ids, **given) for each in (model, original)]
        for output in outputs:
            (output.loss if given else output[field].square().mean()).backward()
        errors.append(relative(outputs[0][field], outputs[1][field]))
        errors.append(relative(outputs[0].loss, outputs[1].loss) if given else 0.0)
        found[kind] = (*errors, families.joint_error(families.plain(model), families.plain(original)))
    return found


@pytest.mark.parametrize("name", ["2d", pytest.param("3d", marks=pytest.mark.matrix)])
def test_every_head_with_labels(ranks, name: str) -> None:
    for kind, errors in ranks(ranks_of(name))(headed, GRIDS[name], timeout=200)[0].items():
        assert max(errors) <= 2e-6, (kind, errors)


def local_blocks(rank: int) -> tuple[bool, float, float]:
    import copy

    import torch

    import gingham

    mesh = gingham.init(mode="2d", size=4)
    original = families.build("gpt2")
    inputs = families.batch("gpt2")
    expected = original(**inputs)
    model = gingham.parallelize(copy.deepcopy(original), mesh, io="local")
    got = model(**{name: mesh.scatter(tensor) for name, tensor in inputs.items()})
    rows = got.logits.shape == (3, families.TIME, 31 - mesh.coordinates["col"])
    difference = mesh.gather(got.logits, "inner") - expected.logits
    return rows, float(got.loss - expected.loss), float(torch.linalg.vector_norm(difference))


def test_local_blocks_in_and_out(ranks) -> None:
    for shape, loss, logits in ranks(4)(local_blocks):
        assert shape and abs(loss) < 1e-5 and logits < 1e-4


def planned(rank: int) -> dict[str, Any]:
    import warnings

    import torch
    import transformers as hf

    import gingham

    mesh = gingham.init(mode="2d", size=4)
    found: dict[str, Any] = {}
    for kind in ("Qwen3", "Mistral"):
        config = getattr(hf, f"{kind}Config")(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        torch.manual_seed(1)
        original = getattr(hf, f"{kind}ForCausalLM")(config)
        inputs = families.batch("llama")
        expected = original(**inputs).loss
        expected.backward()
        truth = families.plain(original)
        model = gingham.parallelize(original, mesh)
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        found[kind] = (float(loss - expected), max(families.errors(families.plain(model), truth).values()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gingham.parallelize(families.build("llama"), mesh, plan={"layers.*.mlp.gate": "colwise"})
    found["unused"] = [str(each.message) for each in caught if "fits no linear" in str(each.message)]
    for name, plan in (("experts", {"mlp": "moe_tp_experts"}), ("heads", None)):
        try:
            gingham.parallelize(
                families.build("llama", **({} if plan else dict(hidden_size=36, num_attention_heads=3, num_key_value_heads=3))),
                mesh,
                plan=plan,
            )
        except (NotImplementedError, gingham.ShapeError) as error:
            found[name] = str(error)
    return found


def test_tp_plans_of_transformers_and_their_errors(ranks) -> None:
    found = ranks(4)(planned)[0]
    for kind in ("Qwen3", "Mistral"):
        loss, worst = found[kind]
        assert abs(loss) < 1e-5 and worst < 2e-6, (kind, found[kind])
    assert len(found["unused"]) == 1 and "layers.*.mlp.gate" in found["unused"][0]
    assert "moe_tp_experts" in found["experts"]
    assert "3 heads on 2 ranks" in found["heads"] and "[2, 4]" in found["heads"]


def refused(rank: int) -> dict[str, Any]:
    import torch
    import transformers as hf

    import gingham
    from grids import relative

    mesh = gingham.init(mode="2d", size=4)
    found: dict[str, Any] = {}
    model = gingham.parallelize(families.build("llama").eval(), mesh)
    ids = families.batch("llama")["input_ids"]
    for name, call in {
        "beams": lambda: model.generate(ids[:2, :4], num_beams=2, max_new_tokens=3),
        "other inputs": lambda: model(ids + (rank == 2)),
        "twice": lambda: gingham.parallelize(model, mesh),
        "custom loss": lambda: setattr(model, "loss_function", len) or model(ids, labels=ids),
    }.items():
        try:
            found[name] = call()
        except (NotImplementedError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, max_position_embeddings=40
    )
    original = hf.RobertaForMaskedLM(hf.RobertaConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    expected = original(ids, labels=ids)
    expected.loss.backward()
    truth = families.plain(original)
    original.zero_grad()
    output = gingham.parallelize(original, mesh)(ids, labels=ids)
    output.loss.backward()
    found["no rule"] = (relative(output.logits, expected.logits), families.joint_error(families.plain(original), truth))
    return found


def test_refusals_and_a_model_of_transformers_that_no_rule_knows(ranks) -> None:
    for found in ranks(4)(refused):
        assert "reorders rows" in found["beams"]
        assert found["other inputs"].startswith("MeshError") and "rank 2 got other inputs" in found["other inputs"]
        assert "already" in found["twice"] and "compute the loss from" in found["custom loss"]
        assert max(found["no rule"]) <= 2e-6, found["no rule"]


def counted(rank: int, family: str, grid: dict[str, Any]) -> tuple[int, int]:
    """Bytes of a step that the plan's rows add up to, for this rank, and those counted."""
    import gingham
    from gingham.convert.layers import Conversion
    from gingham.convert.rules import rules_of
    from gingham.convert.table import rows

    mesh = gingham.init(**grid)
    model = gingham.parallelize(families.build(family), mesh)
    inputs = families.batch(family)
    inputs.pop("labels")
    lines = rows(Conversion(model, mesh, rules_of(model, None)[0], None, lines=model.gingham_plan), inputs["input_ids"].numel())
    mesh.traffic(reset=True)
    model(**inputs).logits.sum().backward()
    return sum(int(line[6].replace(",", "") or 0) for line in lines), sum(axis["bytes_received"] for axis in mesh.traffic().values())


@pytest.mark.parametrize("name", ["2d", "3d", pytest.param("2.5d", marks=pytest.mark.matrix), pytest.param("1d", marks=pytest.mark.matrix)])
@pytest.mark.parametrize(
    "family", ["gpt2", pytest.param("llama", marks=pytest.mark.matrix), pytest.param("bert", marks=pytest.mark.matrix)]
)
def test_the_plan_predicts_the_bytes(ranks, family: str, name: str) -> None:
    answers = ranks(ranks_of(name))(counted, family, GRIDS[name])
    assert sum(predicted for predicted, _ in answers) == pytest.approx(sum(got for _, got in answers), abs=len(answers) * 40)


def sequence_refused(rank: int) -> str:
    import gingham

    mesh = gingham.init(**GRIDS["1d sequence"])
    try:
        gingham.parallelize(families.build("llama"), mesh)
    except NotImplementedError as error:
        return str(error)
    return ""


def test_rows_cut_between_layers_are_refused(ranks) -> None:
    assert "sequence=True is not built for transformers models" in ranks(4)(sequence_refused)[0]
