"""Every fault of the lists names a text that is in the sources once: a list with one that is not ends before it has looked."""

import pytest

from cuda import host_faults, mutations, nvcc

FAULTS = [*host_faults.FAULTS, *mutations.FAULTS]


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault.file}: {fault.name}" for fault in FAULTS])
def test_the_text_is_there_once(fault: mutations.Mutation) -> None:
    assert (nvcc.CSRC / fault.file).read_text().count(fault.old) == 1, fault.old
    assert fault.old != fault.new


def test_names_are_used_once() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
