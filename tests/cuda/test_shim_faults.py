"""The tests of the tests: a fault in a kernel must be found by rung 3."""

from pathlib import Path

import pytest

from cuda import nvcc, shim_faults

pytestmark = [pytest.mark.matrix, pytest.mark.skipif(nvcc.toolkit() is None, reason="no nvcc"), pytest.mark.timeout(900)]


@pytest.mark.parametrize("mutation", shim_faults.MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_fault_is_found(mutation: shim_faults.Mutation, tmp_path: Path) -> None:
    said = shim_faults.found(mutation, tmp_path)
    assert said, f"nothing failed with {mutation.name}"
    print(f"{mutation.name}: {said}")
