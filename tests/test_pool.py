"""The pool itself: results in order, a failure names its rank, a hang ends, and the next call works."""

import os
import signal
import time

import pytest
import torch

import on_gpu
from pool import Pool, RankError


def test_results_in_rank_order_from_the_same_processes(ranks) -> None:
    pool = ranks(2)
    first = pool(lambda rank: (rank, os.getpid(), os.environ["WORLD_SIZE"]))
    second = pool(lambda rank, factor: (rank * factor, os.getpid()), 10)
    assert [answer[0] for answer in first] == [0, 1] and [answer[0] for answer in second] == [0, 10]
    assert [answer[1] for answer in first] == [answer[1] for answer in second]


def test_a_failure_names_its_rank_and_the_next_call_works(ranks) -> None:
    def fail(rank: int) -> None:
        if rank == 1:
            raise KeyError("lost")

    pool: Pool = ranks(2)
    with pytest.raises(RankError, match="rank 1") as caught:
        pool(fail)
    assert isinstance(caught.value.error, KeyError) and "in fail" in str(caught.value)
    assert pool(lambda rank: rank) == [0, 1]


def test_a_hang_and_a_kill_end(ranks) -> None:
    def hang(rank: int) -> str:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return "alive"

    pool: Pool = ranks(2)
    outcomes = pool(hang, outcomes=True)
    assert isinstance(outcomes[0], RankError) and "-9" in str(outcomes[0]) and outcomes[1] == "alive"
    with pytest.raises(RankError, match="no answer within 1 s"):
        pool(lambda rank: time.sleep(60), timeout=1.0)


def test_tensors_of_ranks_with_gpus() -> None:
    """Of on_gpu.py, with the meta device in a GPU's place: what is made is there, what a CPU generator draws has its bits, what is sent
    arrives there."""
    drawn = torch.randn(3, generator=torch.Generator().manual_seed(1))
    generator, another = (torch.Generator().manual_seed(seed) for seed in (1, 1))
    sent = on_gpu.dumps((torch.arange(3), torch.nn.Parameter(torch.ones(2)), "text"))
    with torch.device("meta"), on_gpu.DrawnOnCpu(torch.device("meta")):
        assert torch.ones(2).is_meta and torch.randn(3).is_meta and torch.randn(3, generator=generator).is_meta
        assert torch.equal(torch.randn(3, device="cpu", generator=another), drawn)
        numbers, parameter, text = on_gpu.loads(sent)
        assert numbers.is_meta and parameter.is_meta and isinstance(parameter, torch.nn.Parameter) and text == "text"
    rest = torch.Generator().manual_seed(1)
    torch.randn(3, generator=rest)
    assert torch.equal(generator.get_state(), rest.get_state())
    assert torch.equal(on_gpu.loads(sent)[0], torch.arange(3))
