"""Pipelines in which something goes wrong: all ranks are told who died, is slow or raised, by number; and what is refused."""

import os
import signal
import time
from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from pipelines import gpt, sample, sequential
from pool import RankError


def refused(rank: int) -> Any:
    mesh = gingham.init(parallel=dict(pipeline=2, tensor=dict(size=2, mode="1d")), timeout=30.0)
    narrow = torch.nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    done = gingham.pipeline(sequential(nn.Linear), mesh, 4)
    found = []
    for call, kind in (
        (lambda: gingham.pipeline(done, mesh), gingham.MeshError),
        (lambda: gingham.pipeline(narrow, mesh, 4, "interleaved", stages=3), gingham.MeshError),
        (lambda: gingham.pipeline(narrow, mesh, 4, "1F1B"), gingham.MeshError),
        (lambda: gingham.pipeline(narrow, mesh, 4, "1f1b", stages=2), gingham.MeshError),
        (lambda: gingham.pipeline(narrow, mesh, 0.5), gingham.MeshError),  # type: ignore[arg-type]
        (lambda: gingham.pipeline(nn.MLP(8, 8), mesh, 4), NotImplementedError),
        (lambda: gingham.pipeline(gingham.parallelize(torch.nn.Sequential(torch.nn.Linear(4, 4)), mesh), mesh), NotImplementedError),
        (lambda: gingham.pipeline(narrow, mesh, 5, "zero_bubble"), gingham.MeshError),
        (lambda: gingham.init(default=False, parallel=dict(pipeline=2, tensor=dict(size=2, mode="1d"))), gingham.MeshError),
    ):
        with pytest.raises(kind) as error:
            call()
        found.append(str(error.value))
    return found


def test_what_cannot_be_is_refused_by_name(ranks) -> None:
    words = (
        "step already",
        "4 layers in a row",
        "'1F1B'",
        "expected 1",
        "microbatches=0.5",
        "in_a_row",
        "parallelize has converted",
        "microbatches=5",
        "default one",
    )
    for told in ranks(4)(refused):
        assert all(word in text for word, text in zip(words, told, strict=True)), told


def faulty(rank: int, config: Any, kind: str, victim: int, timeout: float) -> Any:
    mesh = gingham.init(parallel=config, timeout=timeout)
    model = gingham.pipeline(gpt(mesh, torch.float32), mesh, 4)
    model.step(*sample(8))
    if kind == "raises" and rank == victim:
        model.blocks[-1].register_forward_hook(_raise)
    for number in range(1000):
        if rank == victim and number == 2:
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "slow":
                time.sleep(timeout + 2.5)
        try:
            model.step(*sample(8, int(kind == "other batch" and rank == victim)))
        except (gingham.PeerDied, gingham.PeerStalled) as error:
            return type(error).__name__, error.rank, str(error), time.monotonic()
    return None


def _raise(*arguments: Any) -> None:
    raise ValueError("a layer of my own")


EIGHT = dict(pipeline=2, data=2, tensor=dict(size=2, mode="1d"))


@pytest.mark.parametrize("victim", [5, *(pytest.param(each, marks=pytest.mark.matrix) for each in (0, 1, 2, 3, 4, 6, 7))])
def test_a_death_is_named_by_its_rank_on_all_within_a_second(ranks, victim: int) -> None:
    answers = ranks(8)(faulty, EIGHT, "killed", victim, 20.0, outcomes=True)
    others = [answer for rank, answer in enumerate(answers) if rank != victim]
    assert isinstance(answers[victim], RankError) and [answer[:2] for answer in others] == [("PeerDied", victim)] * 7
    assert max(at for *_, at in others) - min(at for *_, at in others) < 1.0


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.matrix)])
def test_a_slow_loader_is_a_stall_that_names_its_rank(ranks, victim: int) -> None:
    answers = ranks(3)(faulty, dict(pipeline=3), "slow", victim, 1.5, outcomes=True)
    others = [answer for rank, answer in enumerate(answers) if rank != victim]
    assert [answer[:2] for answer in others] == [("PeerStalled", victim)] * 2, others


def test_an_exception_in_one_stage_is_told_to_all(ranks) -> None:
    answers = ranks(4)(faulty, dict(pipeline=4), "raises", 3, 20.0, outcomes=True)
    assert isinstance(answers[3], RankError) and "a layer of my own" in str(answers[3])
    for kind, rank, text, _ in answers[:3]:
        assert (kind, rank) == ("PeerDied", 3) and "ValueError in stage 3 of a pipeline: a layer of my own" in text


def test_stages_that_got_other_batches_are_told(ranks) -> None:
    answers = ranks(4)(faulty, dict(pipeline=2, tensor=dict(size=2, mode="1d")), "other batch", 3, 20.0, outcomes=True)
    odd = [answers[rank] for rank in (1, 3)]
    raised = [str(answer) for answer in odd if isinstance(answer, RankError)]  # on GPUs the later of the two hears of the first
    assert len(raised) == 2 or raised and os.environ.get("GINGHAM_DEVICE") == "cuda", odd
    assert all("ranks [1, 3], the stages of one batch, got different ones" in said for said in raised), odd
    for answer in [answers[0], answers[2], *(each for each in odd if not isinstance(each, RankError))]:
        assert not isinstance(answer, RankError), str(answer)
        assert answer[0] == "PeerDied" and "got different ones" in answer[2]


def test_ranks_that_cut_a_model_otherwise_are_told(ranks) -> None:
    def differ(rank: int) -> str:
        mesh = gingham.init(parallel=dict(pipeline=2), timeout=30.0)
        with pytest.raises(gingham.MeshError) as error:
            gingham.pipeline(sequential(nn.Linear), mesh, 4 + rank)
        return str(error.value)

    for told in ranks(2)(differ):
        assert "microbatches=4" in told and "microbatches=5" in told, told


class Shifted(torch.nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (ids + 1) % 64


def test_ids_cross_a_border_and_no_gradient_comes_back(ranks) -> None:
    """A first stage that gives ids has nothing to differentiate."""

    def step(rank: int, parallel: Any) -> float:
        mesh = gingham.init(parallel=parallel, timeout=10.0)
        torch.manual_seed(0)
        model = torch.nn.Sequential(Shifted(), nn.Embedding(64, 16, dtype=torch.float64), nn.Linear(16, 64, dtype=torch.float64))
        if "pipeline" in parallel:
            model = Two(model)
        model = gingham.pipeline(model, mesh, 2)
        ids = torch.arange(12).view(4, 3)
        return float(model.step(ids, ids))

    class Two(torch.nn.Module):
        """Two parts, with ids between them."""

        def __init__(self, row: Any) -> None:
            super().__init__()
            self.row = row

        def in_a_row(self) -> Any:
            return [(self.row[0], [self.row[0]]), (lambda x: self.row[2](self.row[1](x)), [self.row[1], self.row[2]])]

    alone = ranks(1)(step, {})[0]
    assert ranks(2)(step, dict(pipeline=2)) == [pytest.approx(alone, rel=1e-12)] * 2
