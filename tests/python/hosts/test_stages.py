"""Pipelines some of whose borders lie between hosts and some on one: the bits of one host, and what goes wrong is named on all."""

import os
import signal
import time
from typing import Any

import pytest
import torch

import gingham
from gingham.commands.gpt import GPT, Shape, parallel_kit
from gingham.plan.pipeline import SCHEDULES
from pipelines import SHAPE, sample, tied
from pool import RankError
from virtual import ENGINES, on_host

PLACED = (0, 0, 1, 1)  # stages 0 | 1, and 2 | 3: each way of passing tensors, and the way round from the last to the first


def gpt(mesh: Any, dtype: torch.dtype) -> Any:
    """Of as many blocks as eight stages need."""
    torch.manual_seed(3)
    return GPT(parallel_kit(mesh), Shape(**SHAPE | dict(layers=6))).to(dtype)


def trained(rank: int, hosts: tuple[int, ...], schedule: str, make: Any, dtype: torch.dtype) -> Any:
    with on_host(rank, hosts):
        mesh = gingham.init(parallel=dict(pipeline=4), timeout=30.0)
    model = gingham.pipeline(make(mesh, dtype), mesh, 8, schedule)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(2):
        ids, targets = sample(9, step)
        losses.append(model.step(ids % 64, torch.where(targets < 0, targets, targets % 64)).item())
        optimizer.step()
        optimizer.zero_grad()
    ids, targets = sample(9)
    return losses, model(ids % 64), mesh.traffic()["pipeline"]


CASES = [*((schedule, gpt) for schedule in SCHEDULES), *((schedule, tied) for schedule in ("gpipe", "1f1b"))]
QUICK = {("interleaved", gpt), ("1f1b", tied)}


@pytest.mark.parametrize(
    ("schedule", "make"),
    [pytest.param(schedule, make, marks=[] if (schedule, make) in QUICK else [pytest.mark.matrix]) for schedule, make in CASES],
)
def test_borders_on_hosts_and_between_them_give_the_bits_of_one_host(ranks, schedule: str, make: Any) -> None:
    here = ranks(4)(trained, (), schedule, make, torch.float64)
    there = ranks(4)(trained, PLACED, schedule, make, torch.float64)
    crossed = [answer[2].pop("bytes_crossed") for answer in there]
    for (losses, outputs, count), (far_losses, far_outputs, far_count) in zip(here, there, strict=True):
        assert losses == far_losses and torch.equal(outputs, far_outputs) and count == far_count
    assert 0 < sum(crossed) < sum(answer[2]["bytes_received"] for answer in there)


def befall(kind: str, timeout: float) -> None:
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(timeout + 2.5)


def faulty(rank: int, engine: str, kind: str, victim: int, timeout: float) -> Any:
    with on_host(rank, PLACED, engine):
        mesh = gingham.init(parallel=dict(pipeline=4), timeout=timeout)
    model = gingham.pipeline(gpt(mesh, torch.float32), mesh, 4, "interleaved" if kind == "killed" else "1f1b")
    for number in range(1000):
        if rank == victim and number == 2:
            mine = [block for at, block in enumerate(model.blocks) if model._pipeline.holds(f"blocks.{at}")]
            mine[-1].register_forward_hook(lambda *_: befall(kind, timeout))
        try:
            model.step(*sample(8))
        except (gingham.PeerDied, gingham.PeerStalled) as error:
            return type(error).__name__, error.rank, str(error), time.monotonic()
    return None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("victim", [3, pytest.param(1, marks=pytest.mark.matrix), pytest.param(2, marks=pytest.mark.matrix)])
def test_a_death_inside_a_step_is_named_on_both_hosts_within_a_second(ranks, engine: str, victim: int) -> None:
    answers = ranks(4)(faulty, engine, "killed", victim, 20.0, outcomes=True)
    others = [answer for rank, answer in enumerate(answers) if rank != victim]
    assert isinstance(answers[victim], RankError) and [answer[:2] for answer in others] == [("PeerDied", victim)] * 3, others
    assert max(at for *_, at in others) - min(at for *_, at in others) < 1.0


@pytest.mark.parametrize("victim", [0, 1, pytest.param(2, marks=pytest.mark.matrix), pytest.param(3, marks=pytest.mark.matrix)])
def test_the_stage_for_which_all_wait_is_named_on_both_hosts(ranks, victim: int) -> None:
    """Of a chain of waits that goes over borders of both kinds, its end is."""
    answers = ranks(4)(faulty, "ucx", "slow", victim, 1.5, outcomes=True)
    others = [answer for rank, answer in enumerate(answers) if rank != victim]
    assert [answer[:2] for answer in others] == [("PeerStalled", victim)] * 3, others


def doubled(rank: int, hosts: tuple[int, ...]) -> Any:
    with on_host(rank, hosts):
        mesh = gingham.init(parallel=dict(pipeline=4), timeout=30.0)
    torch.manual_seed(2)
    layers = (gingham.nn.Embedding(64, 8), *(gingham.nn.Linear(8, 8) for _ in range(3)), gingham.nn.Linear(8, 64))
    model = gingham.pipeline(torch.nn.Sequential(*layers), mesh, 4)
    ids, targets = (each.clamp(0, 63) for each in sample(8))
    found = [model.step(ids, targets).item()]
    model.zero_grad()
    found.append(model.double().step(ids, targets).item())
    layers[2].register_forward_hook(lambda _, __, y: y.float())  # on the border between the hosts
    try:
        model.step(ids, targets)
    except (gingham.MeshError, gingham.PeerDied, gingham.ShapeError) as error:
        found.append(str(error))
    return found


def test_what_changes_the_dtype_of_borders_is_followed_or_told(ranks) -> None:
    """Between hosts the receiver makes room for what it was told of: the parameters' dtypes are; another change is refused by name."""
    here, there = ranks(4)(doubled, ()), ranks(4)(doubled, PLACED)
    assert [each[:2] for each in here] == [each[:2] for each in there]
    for told in there:
        assert "float32 to rank 2, on another host" in told[2] and "torch.float64 before" in told[2], told
