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


def test_the_rows_of_wrong_ids_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's call goes on with, made on the CPU: eager, its gradient, and in a compiled graph, which must see no tensor more."""
    import gingham
    from gingham.nn import embedding

    gingham.init()
    try:
        monkeypatch.setattr(embedding, "wrong_indices", lambda ids, count, *_: (ids < 0) | (ids >= count))
        layer = gingham.nn.Embedding(5, 3)
        table = layer.weight.full_tensor().detach()
        ids = torch.tensor([[0, 7], [4, -2]])
        rows = layer(ids)
        assert torch.equal(rows.isnan().any(-1), torch.tensor([[False, True], [False, True]]))
        assert torch.equal(rows[0, 0], table[0]) and torch.equal(rows[1, 0], table[4])
        right = torch.tensor([[0, 1], [4, 2]])
        eager = layer(right)
        eager.square().sum().backward()
        gradient = layer.weight.grad.full_tensor().clone()
        layer.zero_grad()
        compiled = torch.compile(layer, fullgraph=True)(right)
        compiled.square().sum().backward()
        assert torch.equal(compiled, eager) and torch.equal(layer.weight.grad.full_tensor(), gradient)
    finally:
        gingham.destroy()


def test_right_indices_say_nothing() -> None:
    indices._pending.append((Reached(True), torch.tensor([0, 0, 0]), "an id"))
    indices.raise_late()
    assert not indices._pending
