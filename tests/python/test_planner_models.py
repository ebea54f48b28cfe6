"""What "auto" knows of models: which are layers in a row, as gingham.pipeline cuts them, and which may be cut along their sequences."""

from typing import Any

import pytest
import torch

import gingham
from gingham.launch.describe import SEQUENCES, describe
from gingham.plan import choose, hybrids, workload
from gingham.plan.choose import Machine
from pipelines import original

PIPELINED = ("gpt2", "llama", "BertForMaskedLM", "BertForTokenClassification", "BertForSequenceClassification", "vit")
ROWS, TIME = 8, 12


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """x, labels, and the places of a sequence."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, (ROWS, TIME), generator=generator)
    if name == "vit":
        return torch.randn(ROWS, 3, 8, 8, generator=generator).double(), ids[:, 0].contiguous(), 17
    return ids, ids[:, 0].contiguous() if name == "BertForSequenceClassification" else ids, TIME


def cut(rank: int) -> list[Any]:
    from gingham.pipeline.cut import flops, parts_of
    from gingham.pipeline.given import Given

    mesh, found = gingham.init(mode="1d", size=1), []
    for name in PIPELINED:
        model = gingham.parallelize(original(name), mesh)
        found.append([flops(part) for part in parts_of(model, Given(mesh))])
    return found


def test_rows_are_those_that_a_pipeline_cuts(ranks: Any) -> None:
    for name, expected in zip(PIPELINED, ranks(1)(cut)[0], strict=True):
        described = describe(original(name), ROWS, inputs(name)[2])
        got = [
            sum(times * 2.0 * part.k * sum(part.n) for times, part in parts if isinstance(part, workload.Linears))
            for parts in described.row
        ]
        assert got == expected, name


def stepped(rank: int, name: str, parallel: Any, machine: dict[str, float]) -> Any:
    """The loss of one step where "auto" has chosen, the mesh, and traffic."""
    x, labels, time = inputs(name)
    mesh = gingham.init(parallel=parallel, model=original(name), tokens=(ROWS, time), machine=machine)
    model = gingham.pipeline(gingham.parallelize(original(name), mesh), mesh)
    mesh.traffic(reset=True)
    loss = model.step(x, labels).item()
    return loss, mesh.chosen, mesh.pipeline.size, mesh.traffic().get("pipeline", {"bytes_received": 0})["bytes_received"]


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("BertForMaskedLM", dict(pipeline=2, tensor=dict(mode="auto"))),
        *(
            pytest.param(name, parallel, marks=pytest.mark.matrix)
            for name in PIPELINED
            for parallel in (
                "auto",
                dict(pipeline=dict(size="auto", schedule="1f1b", microbatches=2), tensor=dict(mode="auto")),
                dict(pipeline=4),
                dict(pipeline=2, tensor=dict(size=2, mode="sequence")),
            )
        ),
    ],
    ids=str,
)
def test_chosen_hybrids_of_models_give_one_processs_loss(ranks: Any, name: str, parallel: Any) -> None:
    """And what crosses the borders of stages is what was planned."""
    machine = dict(latency=1e-6, bandwidth=1e9, speed=1e9)
    auto = "auto" in str(parallel)
    answers = ranks(4)(stepped, name, parallel, machine)
    x, labels, time = inputs(name)
    expected = original(name)(x, labels=labels).loss.item()
    loss, said, stages, _ = answers[0]
    assert all(answer[:3] == (loss, said, stages) for answer in answers) and loss == pytest.approx(expected, rel=1e-6)
    if auto:
        from gingham.launch.auto import chosen

        best, why = chosen(parallel, 4, describe(original(name), ROWS, time), Machine(**machine))
        assert said == why and best.pipeline == stages
        assert best.received["pipeline"] == sum(answer[3] for answer in answers)


def long(name: str) -> Any:
    """original's, of places enough."""
    model = original(name)
    model.config.max_position_embeddings = 512
    torch.manual_seed(0)
    return type(model)(model.config).double()


def along(rank: int, model: Any, tokens: tuple[int, int]) -> Any:
    """The loss of gingham's GPT, or of a model of transformers, on the mesh that mode="auto" takes for few long sequences."""
    from gingham.commands.gpt import GPT, Shape, parallel_kit, serial_kit

    shape = Shape(2, 32, 4, tokens[1], 0.0)
    with torch.device("meta"):
        described: Any = GPT(serial_kit(), shape) if model is None else long(model)
    mesh = gingham.init(mode="auto", model=described, tokens=tokens, machine=dict(latency=1e-8, bandwidth=1e9, speed=1e11))
    torch.manual_seed(0)
    ids = torch.randint(64, tokens)
    if model is not None:
        return mesh.chosen, gingham.parallelize(long(model), mesh)(ids, labels=ids).loss.item()
    made: Any = GPT(parallel_kit(mesh), shape)
    return mesh.chosen, made.loss(made(mesh.scatter(ids)), mesh.scatter(ids)).item()


@pytest.mark.parametrize("model", [None, *(pytest.param(each, marks=pytest.mark.matrix) for each in ("gpt2", "llama", "BertForMaskedLM"))])
def test_auto_cuts_long_sequences_where_that_is_best(ranks: Any, model: Any) -> None:
    tokens = (1, 512)
    answers = ranks(4)(along, model, tokens)
    assert all(answer == answers[0] for answer in answers) and answers[0][0].startswith("sequence (4, 1, 1)")
    torch.manual_seed(0)
    ids = torch.randint(64, tokens)
    if model is None:
        from gingham.commands.gpt import GPT, Shape, serial_kit

        made = GPT(serial_kit(), Shape(2, 32, 4, tokens[1], 0.0))  # drawn after the ids, as by the ranks
        expected = made.loss(made(ids), ids).item()
    else:
        expected = long(model)(ids, labels=ids).loss.item()
    assert answers[0][1] == pytest.approx(expected, rel=1e-5)


def test_sequences_are_cut_where_a_model_may_and_where_it_pays() -> None:
    machine = Machine(latency=1e-8, bandwidth=1e9, speed=1e11)
    one, many = (workload.gpt(2, 64, 8, batch, 2048) for batch in (1, 64))
    assert choose.choose(one, 8, machine).name == "sequence" and choose.choose(many, 8, machine).name != "sequence"
    assert hybrids.choose_hybrid(one, 8, machine, hybrids.Wish(pipeline=1))[0].tensor["mode"] == "sequence"
    closed = workload.Workload(one.parts, 1, 2048, row=one.row)
    assert all(each.name != "sequence" for each in choose.plans(closed, 8)) and all(
        each.tensor["mode"] != "sequence" for each in hybrids.hybrids(closed, 8)
    )
    whole = workload.Workload(one.parts, 1, 2048, row=one.row, samples=True)
    assert not any(each.arguments.get("sequence") for each in choose.plans(whole, 8))
    short = workload.gpt(2, 64, 8, 1, 3)
    assert next(each.reason for each in choose.plans(short, 8) if each.name == "sequence") == (
        "3 places of a sequence on 8 ranks that cut it: some would have none"
    )


def taken(rank: int) -> list[str]:
    """What parallelize converts in mode "sequence" though "auto" would not, or the other way."""
    import transformers

    mesh, wrong = gingham.init("sequence", size=2), []
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    other = (
        "GPT2ForSequenceClassification",
        "LlamaForSequenceClassification",
        "BertLMHeadModel",
        "BertForMultipleChoice",
        "ViTForMaskedImageModeling",
        "MistralForCausalLM",
    )
    for name in (*SEQUENCES, *other):
        kind = getattr(transformers, name)
        more = dict(is_decoder=True) if name == "BertLMHeadModel" else dict(image_size=8, patch_size=2, intermediate_size=32)
        try:
            with torch.device("meta"):
                model = kind(kind.config_class(**sizes, **more))
            says = describe(model, 4, 8).sequences
            model = None
            torch.manual_seed(0)
            gingham.parallelize(kind(kind.config_class(**sizes, **more)), mesh)
            found = True
        except NotImplementedError:
            found = False
        if says != found:
            wrong.append(f"{name}: {says} for {found}")
    return wrong


def test_auto_agrees_with_parallelize_about_sequences(ranks: Any) -> None:
    assert ranks(2)(taken) == [[], []]
