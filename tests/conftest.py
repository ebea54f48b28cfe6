"""Fixtures: `ranks(n)(fn, *args)` runs fn(rank, *args) on n processes that live as long as the test run."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator  # noqa: E402

import pytest  # noqa: E402

import on_gpu  # noqa: E402
from pool import Pool  # noqa: E402

LIMIT = 24  # processes kept at a time: more would crowd out the memory of a small machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On GPUs each test that is not for them is skipped, and says why."""
    for item in items if os.environ.get("GINGHAM_DEVICE") == "cuda" else ():
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        why = on_gpu.left_out(getattr(item, "originalname", item.name), parameters)
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=why))


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
