"""The tests of the tests: every fault of kernel_faults.py is found by its rung, and where nothing was changed nothing is found."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from cuda import mutations, nvcc
from cuda.kernel_faults import FAULTS
from cuda.mutation import Mutation, Outcome

pytestmark = [pytest.mark.skipif(nvcc.toolkit() is None, reason="needs nvcc"), pytest.mark.timeout(1200)]

SAMPLE = {
    "wait for one group too few",
    "swapped operands of mma",
    "missing bounds check of lines",
    "products waited for too late",
    "transpose: dropped barrier",
    "ring step loses what arrives",
}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """Of the faults that were asked for, which are put in two at a time: each is mostly one run of a compiler."""
    asked = [item.callspec.params["fault"] for item in request.session.items if getattr(item, "function", None) is test_the_fault_is_found]
    mutations.prepare(asked)
    with ThreadPoolExecutor(2) as pool:
        running = {fault.name: pool.submit(mutations.run, fault) for fault in asked}
        yield running
    kept = [outcome.result() for outcome in running.values() if not outcome.exception()]
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if capture and kept:
        with capture.global_and_fixture_disabled():
            print("\n" + mutations.table(kept))


def test_names_are_apart_and_the_sample_exists() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) and set(names) >= SAMPLE


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, id=fault.name, marks=() if fault.name in SAMPLE else pytest.mark.matrix) for fault in FAULTS]
)
def test_the_fault_is_found(outcomes: dict[str, Future[Outcome]], fault: Mutation) -> None:
    outcome = outcomes[fault.name].result()
    assert outcome.caught, outcome.said or "every check passed"


@pytest.mark.matrix
@pytest.mark.parametrize(
    "fault", {(f.rung, f.unit, f.checks): f for f in FAULTS}.values(), ids=lambda f: f"{f.rung} {f.unit} {f.checks[0]}"
)
def test_nothing_is_found_where_nothing_was_changed(fault: Mutation) -> None:
    outcome = mutations.run(fault, changed=False)
    assert not outcome.caught and not outcome.said.startswith("could not"), outcome.said
