"""cross_entropy with the vocabulary on several ranks, against torch in float64."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gingham
from gingham.nn import accuracy
from grids import GRIDS, every_grid, grids, ranks_of, relative
from on_gpu import told_in_time


def losses(rank: int, options: dict[str, Any]) -> dict[str, float]:
    mesh = gingham.init(**options)
    errors = {}
    for batch, vocabulary in ((7, 19), (8, 24), (2, 3)):
        torch.manual_seed(batch)
        full = 3 * torch.randn(batch, 5, vocabulary)
        target = torch.randint(vocabulary, (batch, 5))
        target[0, 0] = target[-1, -1] = -100
        weights = torch.rand(batch, 5)
        for layout in ("outer", "inner"):
            for smoothing in (0.0, 0.1):
                for reduction in ("mean", "sum", "none"):
                    x, exact = full.clone().requires_grad_(), full.double().requires_grad_()
                    expected = F.cross_entropy(exact.flatten(0, 1), target.flatten(), label_smoothing=smoothing, reduction=reduction)
                    logits = mesh.scatter(x, "x" if layout == "outer" else "inner")
                    got = gingham.cross_entropy(logits, mesh.scatter(target), layout=layout, label_smoothing=smoothing, reduction=reduction)
                    if reduction == "none":
                        got = (mesh.gather(got, "rows") * weights).sum()
                        expected = (expected.view(batch, 5) * weights).sum()
                    got.backward()
                    expected.backward()
                    key = f"{layout} {smoothing} {reduction} {batch}"
                    errors[key], errors[f"{key} gradient"] = relative(got.detach(), expected), relative(x.grad, exact.grad)
    return errors


@every_grid
def test_against_float64(ranks, name: str) -> None:
    for errors in ranks(ranks_of(name))(losses, GRIDS[name]):
        assert max(errors.values()) <= 2e-6, {key: error for key, error in errors.items() if error > 2e-6}


def padded(rank: int, options: dict[str, Any]) -> dict[str, float]:
    """A vocabulary filled up with masked classes, so that some ranks have nothing else."""
    mesh, errors = gingham.init(**options), {}
    torch.manual_seed(3)
    full = 3 * torch.randn(8, 5, 24)
    full[..., 11:] = -torch.inf
    target = torch.randint(11, (8, 5))
    for layout, operand in (("outer", "x"), ("inner", "inner")):
        x, exact = full.clone().requires_grad_(), full.double().requires_grad_()
        expected = F.cross_entropy(exact.flatten(0, 1), target.flatten())
        got = gingham.cross_entropy(mesh.scatter(x, operand), mesh.scatter(target), layout=layout)
        got.backward()
        expected.backward()
        errors[layout], errors[f"{layout} gradient"] = relative(got.detach(), expected), relative(x.grad, exact.grad)
    return errors


@grids("1d", "2.5d")
def test_masked_classes_alone_on_a_rank(ranks, name: str) -> None:
    for errors in ranks(ranks_of(name))(padded, GRIDS[name]):
        assert all(error <= 2e-6 for error in errors.values()), errors


def counted(rank: int, options: dict[str, Any]) -> list[str]:
    """accuracy of bf16 logits full of ties, for several k and vocabularies smaller than the ranks; losses of any rank."""
    mesh, wrong = gingham.init(**options), []
    for shape, vocabulary in (((7, 5), 19), ((8,), 24), ((5, 2, 3), 3), ((2, 4), 2)):
        torch.manual_seed(len(shape))
        full = torch.randint(-2, 3, (*shape, vocabulary)).to(torch.bfloat16)
        target = torch.randint(vocabulary, shape)
        target.view(-1)[::4] = -100
        kept = target != -100
        for layout, operand in (("outer", "x"), ("inner", "inner")):
            logits = mesh.scatter(full, operand)
            for top_k in (1, 2):
                order = full.double().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
                expected = ((order == target.unsqueeze(-1)).any(-1) & kept).sum() / kept.sum()
                got = accuracy(logits, mesh.scatter(target), layout=layout, top_k=top_k)
                if abs(float(got) - float(expected)) > 1e-7:
                    wrong.append(f"accuracy {shape} {vocabulary} {layout} {top_k}: {float(got)}, expected {float(expected)}")
            loss = gingham.cross_entropy(logits.float(), mesh.scatter(target), layout=layout)
            expected = F.cross_entropy(full.double().flatten(0, -2), target.flatten())
            if abs(float(loss) - float(expected)) > 1e-6:
                wrong.append(f"loss {shape} {vocabulary} {layout}")
            nothing = mesh.scatter(torch.full_like(target, 9))
            if not gingham.cross_entropy(logits.float(), nothing, layout=layout, ignore_index=9).isnan():
                wrong.append("mean over no target")
            if not accuracy(logits, nothing, layout=layout, ignore_index=9).isnan():
                wrong.append("accuracy of no target")
    return wrong


@grids("1d sequence", "2.5d")
def test_accuracy_and_logits_of_any_rank(ranks, name: str) -> None:
    assert ranks(ranks_of(name))(counted, GRIDS[name]) == [[]] * ranks_of(name)


def test_accuracy_breaks_ties_as_argmax(ranks) -> None:
    def ties(rank: int) -> list[float]:
        mesh = gingham.init(mode="2d", size=4)
        full = torch.zeros(4, 6)
        full[1, 5] = torch.nan
        full[2, 4] = torch.inf
        first = full.argmax(-1)
        found = [first, torch.full((4,), 5)]
        return [float(accuracy(mesh.scatter(full), mesh.scatter(target))) for target in found]

    assert ranks(4)(ties) == [[1.0, 0.25]] * 4


def test_what_it_refuses() -> None:
    mesh = gingham.init()
    try:
        logits = mesh.scatter(torch.randn(4, 5))
        with pytest.raises(gingham.ShapeError, match="expected"):
            gingham.cross_entropy(logits, torch.zeros(3, dtype=torch.long))
        with pytest.raises(gingham.ShapeError, match=r"^cross_entropy: rank 0: a target lies outside 0..4 .*: got 5"):
            told_in_time(lambda: gingham.cross_entropy(logits, torch.full((4,), 5)))
        with pytest.raises(TypeError, match="integer"):
            gingham.cross_entropy(logits, torch.zeros(4))
        with pytest.raises(gingham.ShapeError, match="weight"):
            gingham.cross_entropy(logits, torch.zeros(4, dtype=torch.long), weight=torch.ones(4))
        with pytest.raises(gingham.ShapeError, match="0..4"):
            accuracy(logits, torch.full((4,), -1))
        with pytest.raises(ValueError, match="reduction"):
            gingham.cross_entropy(logits, torch.zeros(4, dtype=torch.long), reduction="max")
    finally:
        gingham.destroy()


def few_rows(rank: int) -> list[float]:
    """Fewer rows than ranks, logits of all rows and targets cut (B10)."""
    mesh, errors = gingham.init(**GRIDS["1d sequence"]), []
    for rows in (1, 2, 3, 5):
        generator = torch.Generator().manual_seed(rows)
        logits, target = torch.randn(rows, 12, generator=generator), torch.randint(12, (rows,), generator=generator)
        exact = logits.double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(exact, target)
        expected.backward()
        for given in (mesh.scatter(target), target):
            x = logits.clone().requires_grad_()
            loss = gingham.cross_entropy(mesh.scatter(x, "inner"), given, layout="inner")
            loss.backward()
            errors += [relative(loss, expected), relative(x.grad, exact.grad)]
    return errors


def test_b10_fewer_rows_than_ranks(ranks) -> None:
    for errors in ranks(4)(few_rows):
        assert max(errors) <= 2e-6, errors


def weighted(rank: int, options: dict[str, Any]) -> dict[str, float]:
    """Class weights beside torch's, every reduction and smoothing (C15)."""
    mesh, errors = gingham.init(**options), {}
    torch.manual_seed(3)
    logits, target, weight = 2 * torch.randn(11, 3, 19), torch.randint(19, (11, 3)), torch.rand(19)
    target[0, 0] = target[5, 1] = -100
    for layout, operand in (("outer", "x"), ("inner", "inner")):
        for reduction in ("mean", "sum", "none"):
            for smoothing in (0.0, 0.2):
                exact = logits.double().requires_grad_()
                keys = dict(reduction=reduction, label_smoothing=smoothing)
                expected = F.cross_entropy(exact.flatten(0, 1), target.flatten(), weight.double(), **keys)
                x = logits.clone().requires_grad_()
                got = gingham.cross_entropy(mesh.scatter(x, operand), mesh.scatter(target), layout=layout, weight=weight, **keys)
                if reduction == "none":
                    got, expected = mesh.gather(got, "rows"), expected.view(11, 3)
                cotangent = torch.rand(expected.shape)
                got.backward(cotangent), expected.backward(cotangent.double())
                errors[f"{layout} {reduction} {smoothing}"] = max(relative(got, expected), relative(x.grad, exact.grad))
    return errors


@grids("2d", "1d sequence")
def test_c15_class_weights(ranks, name: str) -> None:
    for errors in ranks(ranks_of(name))(weighted, GRIDS[name]):
        assert max(errors.values()) <= 2e-6, errors
