"""Wrong targets and ids: refused at once on the CPU; on a GPU told once the device has got there, without waiting for it."""

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import gingham
import on_gpu
from gingham import ShapeError
from gingham.autograd import indices
from gingham.mesh.findings import LATE, Finding, Findings
from gingham.nn import embedding


class Reached:
    """A CUDA event, as far as the findings ask it."""

    def __init__(self, reached: bool) -> None:
        self.reached = reached

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self.reached = True


class Broken(Reached):
    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")


@pytest.fixture
def mesh() -> Iterator[Any]:
    yield gingham.init()
    gingham.destroy()


def found(seen: list[int], words: str, event: Reached | None = None, named: Any = None) -> Finding:
    return Finding(event or Reached(True), torch.tensor(seen), partial(indices._told, 4, None, words, named, LATE))


def test_at_once_on_the_cpu(mesh: Any) -> None:
    """And on a GPU by what waits for it."""
    refuse = indices.refuse_indices if on_gpu.wanted() else indices.check_indices
    refuse(mesh, torch.tensor([0, 3, -100]), 4, -100, "loss: rank 2: a target")
    refuse(mesh, torch.empty(0, 2, dtype=torch.int32), 4, None, "an id")
    with pytest.raises(ShapeError, match=r"^loss: rank 2: a target lies outside 0..3 and is not ignore_index=-100: got 4..9$"):
        refuse(mesh, torch.tensor([9, 4, 0, -100]), 4, -100, "loss: rank 2: a target")
    with pytest.raises(ShapeError, match=r"^an id lies outside 0..3: got -1$"):
        refuse(mesh, torch.tensor([[-1, 0]], dtype=torch.int16).t(), 4, None, "an id")
    largest = torch.iinfo(torch.int64).max
    with pytest.raises(ShapeError, match=rf"got -{largest + 1}..{largest}$"):
        refuse(mesh, torch.tensor([largest, -largest - 1]), 4, None, "an id")


def test_later_on_a_gpu() -> None:
    told, first = Findings(), Reached(False)
    told.waiting += [found([5, 7, 2], "loss: rank 1: a target", first), found([0, 0, 0], "an id"), found([-1, -1, 1], "an id")]
    told.raise_late()  # the device has not got there
    assert len(told.waiting) == 3
    first.reached = True
    with pytest.raises(ShapeError, match=r"^loss: rank 1: a target lies outside 0..3: got 5..7, 2 of them; found by the GPU after"):
        told.raise_late()
    with pytest.raises(ShapeError, match=r"^an id lies outside 0..3: got -1, 1 of them"):
        told.raise_late()
    told.raise_late()  # each once


def test_right_indices_say_nothing() -> None:
    told = Findings()
    told.waiting += [found([0, 0, 0], "an id")] * 2
    told.raise_late()
    assert not told.waiting


def test_an_error_is_named_by_the_call_that_it_belongs_to(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever layer's call raises it."""
    first, second = gingham.nn.Embedding(4, 2), gingham.nn.Embedding(5, 3)
    model = torch.nn.ModuleDict({"words": first, "places": second})
    of_first = partial(embedding._named, weakref.ref(first), first.label())
    mesh.findings.waiting += [found([4, 4, 1], "cross_entropy: rank 0: a target"), found([7, 7, 1], "rank 0: an id", named=of_first)]
    monkeypatch.setattr(embedding, "check_indices", lambda mesh, *_: mesh.findings.raise_late())  # as on a GPU
    with pytest.raises(ShapeError, match=r"^cross_entropy: rank 0: a target lies outside 0..3: got 4, 1 of them"):
        second(torch.tensor([0]))
    with pytest.raises(ShapeError, match=r"^words \(Embedding\(4, 2\)\): rank 0: an id lies outside 0..3: got 7, 1 of them"):
        model["places"](torch.tensor([0]))
    second(torch.tensor([0]))


def test_what_no_call_has_told_is_a_warning_of_destroy() -> None:
    mesh = gingham.init()
    layer = gingham.nn.Embedding(4, 2)
    named = partial(embedding._named, weakref.ref(layer), layer.label())
    late = Reached(False)
    mesh.findings.waiting += [found([0, 0, 0], "an id"), found([6, 6, 1], "rank 0: an id", late, named), found([9, 9, 1], "a target")]
    with pytest.warns(UserWarning) as told:
        gingham.destroy()
    assert late.reached and len(told) == 1
    said = str(told[0].message)
    assert "Embedding(4, 2): rank 0: an id lies outside 0..3: got 6, 1 of them" in said and "(and 1 later calls)" in said
    assert not mesh.findings.waiting
    gingham.init()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="gingham.destroy")
        gingham.nn.Embedding(4, 2)(torch.tensor([0]))
        gingham.destroy()


def test_wrong_ids_of_a_last_call() -> None:
    """Refused at once on the CPU; a GPU has gone on, and destroy tells."""
    gingham.init()
    layer, ids = gingham.nn.Embedding(4, 2), torch.tensor([3, 4])
    said = r"Embedding\(4, 2\): rank 0: an id lies outside 0..3: got 4"
    if on_gpu.wanted():
        assert layer(ids).isnan().any(-1).tolist() == [False, True]
    else:
        with pytest.raises(ShapeError, match=said):
            layer(ids)
    with pytest.warns(UserWarning, match=said) if on_gpu.wanted() else contextlib.nullcontext():
        gingham.destroy()


def test_a_device_that_failed_is_named_at_the_end() -> None:
    told = Findings()
    told.waiting += [found([0, 0, 0], "an id", Broken(False))] * 2
    with pytest.warns(UserWarning, match="whether indices were right is not known: CUDA error: an illegal") as said:
        told.end()
    assert len(said) == 1 and not told.waiting


def test_the_rows_of_wrong_ids_are_nan(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's call goes on with, made on the CPU: forward, and no sum of theirs backward."""
    monkeypatch.setattr(embedding, "check_indices", lambda *_: None)
    layer = gingham.nn.Embedding(5, 3)
    table = layer.weight.full_tensor().detach()
    ids = torch.tensor([[0, 7], [4, -2]])
    rows = layer(ids)
    assert torch.equal(rows.isnan().any(-1), torch.tensor([[False, True], [False, True]]))
    assert torch.equal(rows[0, 0], table[0]) and torch.equal(rows[1, 0], table[4])
    rows.sum().backward()
    assert torch.equal(layer.weight.grad.full_tensor(), torch.tensor([1.0, 0, 0, 0, 1]).unsqueeze(1).expand(5, 3))


def test_the_loss_of_a_wrong_target_is_nan(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gingham.autograd import loss

    monkeypatch.setattr(loss, "check_indices", lambda *_: None)
    target = torch.tensor([0, 5, 2, -100, -1])
    for smoothing in (0.0, 0.1):
        logits = torch.randn(5, 5, requires_grad=True)
        losses = gingham.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        assert losses.isnan().tolist() == [False, True, False, False, True]
        losses.nansum().backward()
        assert logits.grad is not None and logits.grad[[0, 2, 3]].isfinite().all()
