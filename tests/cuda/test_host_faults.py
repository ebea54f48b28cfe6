"""The tests of the tests: a fault on the host side of the CUDA backend must be found by rung 5."""

import pytest

from cuda import host_faults, nvcc

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif(nvcc.toolkit() is None, reason="no nvcc: the fake runtime needs the toolkit's headers"),
    pytest.mark.timeout(900),
]


@pytest.mark.parametrize("fault", host_faults.FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_found(fault: host_faults.Mutation) -> None:
    outcome = host_faults.run(fault)
    assert outcome.caught, f"nothing failed with {fault.name}"
    print(f"{fault.name}: {outcome.said} ({outcome.seconds:.1f} s)")


def test_nothing_is_found_without_a_fault() -> None:
    caught, said = host_faults.unchanged()
    assert not caught, said
