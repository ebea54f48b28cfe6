"""Wrong targets and ids: refused at once on the CPU; on a GPU told once the device has got there, without waiting for it."""

import pytest
import torch

from gingham import ShapeError
from gingham.autograd import indices


class Reached:
    """A CUDA event, as far as indices.py asks it."""

    def __init__(self, reached: bool) -> None:
        self.reached = reached

    def query(self) -> bool:
        return self.reached


@pytest.fixture(autouse=True)
def none_pending():
    indices._pending.clear()
    yield
    indices._pending.clear()


def test_at_once_on_the_cpu() -> None:
    assert indices.wrong_indices(torch.tensor([0, 3, -100]), 4, -100, "loss: rank 2: a target") is None
    with pytest.raises(ShapeError, match=r"loss: rank 2: a target lies outside 0..3 and is not ignore_index=-100: got 4..9"):
        indices.wrong_indices(torch.tensor([9, 4, 0, -100]), 4, -100, "loss: rank 2: a target")
    with pytest.raises(ShapeError, match=r"an id lies outside 0..3: got -1"):
        indices.wrong_indices(torch.tensor([-1, 0]), 4, None, "an id")


def test_later_on_a_gpu() -> None:
    first, second = Reached(False), Reached(True)
    indices._pending.append((first, torch.tensor([0, 7, 2]), "loss: rank 1: a target lies outside 0..3"))
    indices._pending.append((second, torch.tensor([0, 0, 0]), "an id lies outside 0..3"))
    indices.raise_late()  # the device has not got there
    assert len(indices._pending) == 2
    first.reached = True
    with pytest.raises(ShapeError, match=r"loss: rank 1: a target lies outside 0..3: got 7, 2 of them"):
        indices.raise_late()
    indices.raise_late()  # once


def test_right_indices_say_nothing() -> None:
    indices._pending.append((Reached(True), torch.tensor([0, 0, 0]), "an id"))
    indices.raise_late()
    assert not indices._pending
