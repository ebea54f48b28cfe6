"""Padding, positions and types of tokens in pipelines of converted models: what the original gives on the whole batch."""

from typing import Any

import pytest
import torch

import gingham
from families import errors, plain
from gingham.plan.pipeline import SCHEDULES
from pipelines import original

ROWS, TIME = 16, 10
NAMES = ("gpt2", "llama", "BertForMaskedLM", "BertForTokenClassification", "BertForSequenceClassification")


def batch(name: str, kind: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """ids, labels, and what is given beside them. Sequences are of 2 to 10 tokens, so that micro-batches have unequal numbers of labels."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(64, (ROWS, TIME), generator=generator)
    lengths = torch.tensor([10, 3, 2, 9, 10, 4, 7, 2, 2, 3, 8, 10, 5, 2, 6, 10])
    places = torch.arange(TIME)
    left = kind in ("left", "four dims")
    mask = (places >= TIME - lengths[:, None]) if left else (places < lengths[:, None])
    given = {"attention_mask": mask.long() if kind != "bool" else mask}
    if left:
        given["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    if kind == "four dims":  # of each query: what is no padding, and, of a decoder, what came before
        seen = mask[:, None, None, :].expand(ROWS, 1, TIME, TIME)
        causal = torch.ones(TIME, TIME, dtype=torch.bool).tril()
        given["attention_mask"] = (seen & causal if not name.startswith("Bert") else seen) | torch.eye(TIME, dtype=torch.bool)
    if kind in ("packed", "anew"):  # two texts in each row, which do not see each other where the model makes no cache
        given = {"position_ids": torch.cat([torch.arange(6), torch.arange(4)]).expand(ROWS, TIME).contiguous()}
        mask = torch.ones_like(ids, dtype=torch.bool)
    if kind == "one row":
        given = {"position_ids": (torch.arange(TIME) + 3).unsqueeze(0)}
        mask = torch.ones_like(ids, dtype=torch.bool)
    if name != "llama" and kind not in ("packed", "anew"):
        given["token_type_ids"] = torch.randint(2, (ROWS, TIME), generator=generator)
    if name == "BertForSequenceClassification":
        return ids, torch.randint(5, (ROWS,), generator=generator), given
    labels = ids % 5 if name == "BertForTokenClassification" else ids.clone()
    return ids, labels.masked_fill(~mask, -100), given


def run(rank: int, name: str, kind: str, config: Any, schedule: str, own: bool) -> Any:
    mesh = gingham.init(parallel=config, timeout=60.0)
    model = gingham.pipeline(gingham.parallelize(made(name, kind), mesh), mesh, 4, schedule)
    ids, labels, given = batch(name, kind)
    full = (ids, labels, given)
    if own:  # data ranks with unequal rows
        place = slice(0, 9) if mesh.data.rank == 0 else slice(9, ROWS)
        ids, labels, given = ids[place], labels[place], {key: x[place] if len(x) == ROWS else x for key, x in given.items()}
    loss = model.step(ids, labels, own=own, **given).item()
    gradients = plain(model)
    model.eval()
    ids, labels, given = full
    evaluated = model.eval_step(ids, labels, **given).item()
    return loss, {key: each.clone() for key, each in gradients.items()}, evaluated, model(ids, **given)


def made(name: str, kind: str) -> Any:
    model = original(name)
    model.config.use_cache = kind != "packed"
    return model


def compare(answers: Any, name: str, kind: str) -> None:
    model = made(name, kind)
    ids, labels, given = batch(name, kind)
    output = model(ids, labels=labels, **given)
    output.loss.backward()
    truth, seen = plain(model), set[str]()
    for loss, gradients, evaluated, logits in answers:
        assert loss == pytest.approx(output.loss.item(), rel=1e-5) and evaluated == pytest.approx(loss, rel=1e-5)
        assert float((logits - output.logits.detach()).abs().max() / output.logits.detach().abs().max()) <= 2e-6
        assert max(errors(gradients, {key: truth[key] for key in gradients}).values()) <= 2e-6
        seen |= gradients.keys()
    assert seen == truth.keys()


KINDS = ("right", "left", "bool", "four dims", "packed", "anew", "one row")
MESHES = [
    (dict(pipeline=2, tensor=dict(size=2, mode="1d")), False),
    (dict(pipeline=2, data=2), True),
    (dict(pipeline=2, data=2), False),
    (dict(pipeline=2, tensor=dict(size=4, mode="2d")), False),
    (dict(pipeline=2, tensor=dict(size=4, mode="2.5d", depth=4)), False),
    (dict(pipeline=2, data=dict(size=2, shard="all"), tensor=dict(size=2, mode="1d")), True),
    (dict(pipeline=2, tensor=dict(size=3, mode="sequence")), False),
    (dict(pipeline=2, data=2, tensor=dict(size=2, mode="sequence", attention="heads")), True),
    (dict(tensor=dict(size=2, mode="1d")), False),
]
QUICK = [
    ("gpt2", "left", *MESHES[0], "zero_bubble"),
    ("BertForMaskedLM", "right", *MESHES[1], "1f1b"),
    ("llama", "four dims", *MESHES[6], "1f1b"),
]
MATRIX = [
    (name, kind, config, own, SCHEDULES[(at + 2 * number) % len(SCHEDULES)])
    for number, name in enumerate(NAMES)
    for at, kind in enumerate(KINDS)
    for config, own in MESHES[(at + number) % 3 :: 3]  # each mesh with each kind, and with each model
    # packed texts are read off positions, which attention over cut sequences refuses, and BERT does not do
    if not (kind == "packed" and (name.startswith("Bert") or config.get("tensor", {}).get("mode") == "sequence"))
]  # fmt: skip


def ranks_of(config: Any) -> int:
    data = config.get("data", 1)
    return int(config.get("pipeline", 1) * config.get("tensor", dict(size=1))["size"] * (data["size"] if isinstance(data, dict) else data))


@pytest.mark.parametrize(
    ("name", "kind", "config", "own", "schedule"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.matrix) for each in MATRIX if each not in QUICK)],
    ids=str,
)
def test_as_the_original_with_padding(ranks, name: str, kind: str, config: Any, own: bool, schedule: str) -> None:
    compare(ranks(ranks_of(config))(run, name, kind, config, schedule, own), name, kind)


def refused(rank: int) -> Any:
    mesh = gingham.init(parallel=dict(pipeline=2), timeout=30.0)
    model = gingham.pipeline(gingham.parallelize(original("llama"), mesh), mesh, 3)
    own = gingham.pipeline(torch.nn.Sequential(gingham.nn.Linear(4, 4), gingham.nn.Linear(4, 4)), mesh, 2)
    ids, labels, given = batch("llama", "right")
    mask, found = given["attention_mask"], []
    for call, kind in (
        (lambda: model.step(ids, labels, attention_mask=mask[:5]), gingham.ShapeError),
        (lambda: model.step(ids, labels, attention_mask=mask[:, None, None, :]), gingham.ShapeError),
        (lambda: model.step(ids, labels, attention_mask=mask.tolist()), gingham.ShapeError),
        (lambda: model.step(ids, labels, token_type_ids=mask), TypeError),
        (lambda: model.eval_step(ids, labels, inputs_embeds=mask), TypeError),
        (lambda: own(torch.ones(4, 4), attention_mask=mask), TypeError),
    ):
        with pytest.raises(kind) as error:
            call()
        found.append(str(error.value))
    return found


def test_what_a_pipeline_does_not_take_is_told(ranks) -> None:
    words = (
        "(5, 10) beside x (16, 10)",
        "or (16, 1, 10, 10)",
        "got attention_mask list",
        "token_type_ids=",
        "inputs_embeds=",
        "x and labels alone",
    )
    for told in ranks(2)(refused):
        assert all(word in text for word, text in zip(words, told, strict=True)), told


def other(rank: int) -> str:
    mesh = gingham.init(parallel=dict(pipeline=2), timeout=30.0)
    model = gingham.pipeline(gingham.parallelize(original("gpt2"), mesh), mesh, 3)
    ids, labels, given = batch("gpt2", "right")
    if rank:
        given["attention_mask"][0, 0] = 0
    # on GPUs the later of the two stages hears of the first
    kinds = (gingham.MeshError, gingham.PeerDied) if mesh.job.has_gpu else gingham.MeshError
    with pytest.raises(kinds) as error:
        model.step(ids, labels, **given)
    return str(error.value)


def test_stages_that_were_given_other_masks_are_told(ranks) -> None:
    assert all("the stages of one batch, got different ones" in text for text in ranks(2)(other))
