"""An option of a hybrid that one rank is given otherwise: all ranks are told at once whose and which, and nobody computes on."""

import time
from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from pipelines import gpt, sample

STAGES = dict(pipeline=2, data=2)
TENSOR = dict(data=2, tensor=dict(size=2, mode="1d"))
INIT: list[tuple[Any, Any]] = [
    (dict(data=dict(size=2, shard="all"), tensor=dict(size=2, mode="1d")), dict(data=dict(size=2), tensor=dict(size=2, mode="1d"))),
    (dict(data=dict(size=2, shard="all")), dict(data=dict(size=2, shard="state"))),
    (dict(pipeline=2, data=2), dict(pipeline=1, data=4)),
    (dict(pipeline=4), dict(data=4)),
    (dict(pipeline=2, tensor=dict(size=2, mode="1d")), dict(pipeline=2, tensor=dict(size=2, mode="1d", sequence=True))),
    (dict(pipeline=2, tensor=dict(size=2, mode="1d")), dict(pipeline=2, tensor=dict(size=2, mode="sequence"))),
    (dict(tensor=dict(size=4, mode="sequence")), dict(tensor=dict(size=4, mode="sequence", attention="heads"))),
]
PIPELINE: list[tuple[str, Any, Any]] = [
    ("schedule", dict(schedule="1f1b"), dict(schedule="gpipe")),
    ("schedule", dict(schedule="zbv"), dict(schedule="dual")),
    ("schedule", dict(schedule="1f1b"), dict(schedule="pipedream")),
    ("microbatches", dict(microbatches=4), dict(microbatches=3)),
    ("microbatches", dict(microbatches=4), dict(microbatches=0)),
    ("stages", dict(schedule="interleaved", stages=2), dict(schedule="interleaved", stages=3)),
    ("layout", dict(), dict(layout="outer")),
    ("loss", dict(), dict(loss=lambda y, target: y.square().mean())),
]
STEP: list[tuple[Any, Any, Any]] = [
    *((dict(), other, config) for config in (STAGES, TENSOR) for other in (dict(own=True), dict(scaler=True), dict(evaluate=True))),
    (dict(), dict(labels=1), STAGES),  # without stages what is scattered is compared under GINGHAM_CHECK
]
LAYERS: list[tuple[str, Any, Any]] = [
    ("ring", dict(ring=True), dict(ring=False)),
    ("ring", dict(ring=True), dict(ring="heads")),
    ("order", dict(ring=True), dict(ring=True, order="zigzag")),
    ("causal", dict(ring=True), dict(ring=True, causal=False)),
    ("dropout", dict(ring=True, dropout=0.1), dict(ring=True, dropout=0.2)),
    ("dropout", dict(dropout=0.1), dict()),
    ("rotary", dict(rotary=1e4), dict(rotary=5e5)),
]


def told(rank: int, work: Any) -> tuple[str, str, float]:
    """The kind and words of the error, and seconds."""
    begun = time.monotonic()
    try:
        work()
    except (gingham.MeshError, gingham.ShapeError, gingham.LayoutError, gingham.PeerDied, gingham.PeerStalled) as error:
        return type(error).__name__, str(error), time.monotonic() - begun
    return "nothing", "", time.monotonic() - begun


def odd_init(rank: int, usual: Any, other: Any) -> Any:
    return told(rank, lambda: gingham.init(parallel=other if rank == 1 else usual, timeout=20.0))


@pytest.mark.matrix
@pytest.mark.parametrize(("usual", "other"), INIT, ids=str)
def test_configurations(ranks, usual: Any, other: Any) -> None:
    check(ranks(4)(odd_init, usual, other), [])


def odd_pipeline(rank: int, usual: Any, other: Any, config: Any) -> Any:
    mesh = gingham.init(parallel=config, timeout=20.0)
    model = gpt(mesh, torch.float32)
    return told(rank, lambda: gingham.pipeline(model, mesh, **{"microbatches": 4, **(other if rank == 1 else usual)}).step(*sample(8)))


@pytest.mark.parametrize("config", [STAGES, pytest.param(TENSOR, marks=pytest.mark.matrix)], ids=str)
@pytest.mark.parametrize(
    ("option", "usual", "other"),
    [pytest.param(*each, marks=[] if each[0] == "layout" else [pytest.mark.matrix]) for each in PIPELINE],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pipelines(ranks, option: str, usual: Any, other: Any, config: Any) -> None:
    check(ranks(4)(odd_pipeline, usual, other, config), [option])


def odd_step(rank: int, usual: Any, other: Any, config: Any) -> Any:
    mesh = gingham.init(parallel=config, timeout=20.0)
    model = gingham.pipeline(gpt(mesh, torch.float32), mesh, 4)
    given = dict(other if rank == 1 else usual)
    ids, labels = sample(8)
    if given.pop("labels", 0):
        labels = labels.roll(1, 0)
    if given.pop("evaluate", False):
        return told(rank, lambda: model.eval_step(ids, labels))
    if "scaler" in given:
        given["scaler"] = gingham.GradScaler("cpu")
    return told(rank, lambda: model.step(ids, labels, **given))


@pytest.mark.matrix
@pytest.mark.parametrize(("usual", "other", "config"), STEP, ids=str)
def test_steps(ranks, usual: Any, other: Any, config: Any) -> None:
    check(ranks(4)(odd_step, usual, other, config), [])


def odd_layer(rank: int, usual: Any, other: Any) -> Any:
    mesh = gingham.init(grid=(2, 1, 1), timeout=20.0)
    torch.manual_seed(0)
    layer = nn.SelfAttention(16, 4, dim=1, **(other if rank == 1 else usual))
    x = torch.zeros(2, 4, 16)
    return told(rank, lambda: layer(x).sum().backward() if mesh.size else None)


@pytest.mark.matrix
@pytest.mark.parametrize(("option", "usual", "other"), LAYERS, ids=str)
def test_attention(ranks, option: str, usual: Any, other: Any) -> None:
    check(ranks(2)(odd_layer, usual, other), [])


def odd_dropout(rank: int, p: float) -> Any:
    mesh = gingham.init("1d", size=2, timeout=20.0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.Dropout(p if rank == 1 else 0.1), nn.Linear(8, 8, layout="outer->inner"))
    return told(rank, lambda: model(mesh.scatter(torch.ones(4, 8))).sum().backward())


@pytest.mark.matrix
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_dropout(ranks, p: float) -> None:
    check(ranks(2)(odd_dropout, p), [])


def check(answers: Any, words: list[str]) -> None:
    for rank, (kind, text, seconds) in enumerate(answers):
        assert kind not in ("nothing", "PeerStalled") and seconds < 10, (rank, kind, text, seconds)
        assert "rank" in text and all(word in text for word in words), (rank, text)
