"""Fixtures: `ranks(n)(fn, *args)` runs fn(rank, *args) on n processes that live as long as the test run."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator  # noqa: E402

import pytest  # noqa: E402

import on_gpu  # noqa: E402
from pool import Pool  # noqa: E402

LIMIT = 24  # processes kept at a time: more would crowd out the memory of a small machine


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Pool]]:
    kept: dict[int, Pool] = {}
    yield kept
    for pool in kept.values():
        pool.close()


@pytest.fixture
def ranks(pools: dict[int, Pool]) -> Callable[[int], Pool]:
    def get(size: int) -> Pool:
        if size not in pools:
            pools[size] = Pool(size)
        # the one asked for goes last, so that the longest unused pools are stopped first
        pools[size] = pools.pop(size)
        for other, pool in pools.items():
            if sum(len(pool.pids) for pool in pools.values()) + size - len(pools[size].pids) <= LIMIT:
                break
            if other != size:
                pool.stop()
        return pools[size]

    return get


@pytest.fixture(autouse=True)
def tensors_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not on_gpu.wanted():
        yield
        return
    on_gpu.follow_init(monkeypatch)
    yield
    on_gpu.end()
