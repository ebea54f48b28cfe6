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

HOSTS = (0, 0, 1, 1)  # stages 0 | 1, and 2 | 3: each way of passing tensors, and the way round from the last to the first


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
    there = ranks(4)(trained, HOSTS, schedule, make, torch.float64)
    crossed = [answer[2].pop("bytes_crossed") for answer in there]
    for (losses, outputs, count), (far_losses, far_outputs, far_count) in zip(here, there, strict=True):
        assert losses == far_losses and torch.equal(outputs, far_outputs) and count == far_count
    assert 0 < sum(crossed) < sum(answer[2]["bytes_received"] for answer in there)


def befall(kind: str, timeout: float) -> None:
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(timeout + 2.5)


def faulty(rank: int, engine: str, kind: str, victim: int, timeout: float) -> Any:
    with on_host(rank, HOSTS, engine):
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
