"""Every layer on every grid in fp32 and bf16: forward and all gradients against float64, beside serial torch's own error.

Bounds (Frobenius, relative): bf16 1.5 times the error of the serial layer in bf16; fp32 1e-6 for Linear, otherwise 2e-6 or
3 times the serial layer's error in fp32, whichever is larger. A key's bias, whose true gradient is 0, is measured against
the query's.
"""

from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from grids import GRIDS, ranks_of, relative, whole
from layer_cases import ALL, CASES, EVEN, UNEVEN, Case, Size

Errors = dict[tuple[str, str], tuple[float, float]]


def errors_of(module: torch.nn.Module, y: torch.Tensor, x: torch.Tensor, exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of the output, the input's gradient and every parameter's."""
    found = {"y": y.detach(), **{name: whole(each.grad) for name, each in module.named_parameters()}}
    if x.is_floating_point():
        found["dx"] = x.grad
    errors = {}
    for name, got in found.items():
        scale = exact[name.replace("k.bias", "q.bias")]
        got = got.double()
        assert got.shape == exact[name].shape
        errors[name] = float((got - exact[name]).norm() / scale.norm())
    return errors


def measured(mesh: Any, case: Case, size: Size, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Per tensor: our error and that of the serial layer in the same dtype."""
    torch.manual_seed(3)
    ours = case.ours(size, dtype)
    torch.manual_seed(3)
    plain = case.serial(size, dtype)
    for (name, weight), (other, expected) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and torch.equal(whole(weight.data), expected.data), f"initial {name}"
    torch.manual_seed(3)
    exact = case.serial(size, dtype).double()
    torch.manual_seed(9)
    full = case.x(size)
    full = full.to(dtype) if full.is_floating_point() else full
    shape = exact(full.double() if full.is_floating_point() else full).shape
    cotangent = torch.randn(shape).to(dtype)
    results = []
    for module in (exact, plain, ours):
        wide = torch.float64 if module is exact else dtype
        x = full.to(wide).clone().requires_grad_() if full.is_floating_point() else full
        if module is ours:
            y = ours(mesh.scatter(x, case.operands[0], case.dim))
            y = mesh.gather(y, case.operands[1], case.dim) if case.operands[1] else y
        else:
            y = module(x)
        y.backward(cotangent.to(wide))
        results.append((y.detach(), x))
    (y, x), truth = results[0], {name: each.grad for name, each in exact.named_parameters()}
    truth |= {"y": y, "dx": x.grad}
    theirs, mine = errors_of(plain, *results[1], truth), errors_of(ours, *results[2], truth)
    return {name: (error, theirs[name]) for name, error in mine.items()}


def every_layer(rank: int, options: dict[str, Any], dtype: torch.dtype, sizes: tuple[Size, ...]) -> Errors:
    mesh = gingham.init(**options)
    return {
        (case, f"{name} {size[:3]}"): errors
        for case in CASES
        for size in sizes
        for name, errors in measured(mesh, CASES[case], size, dtype).items()
    }


def allowed(case: str, dtype: torch.dtype, serial_error: float) -> float:
    if dtype == torch.bfloat16:
        return 1.5 * serial_error
    return CASES[case].bound if CASES[case].bound == 1e-6 else max(CASES[case].bound, 3 * serial_error)


def check(answers: list[Errors], dtype: torch.dtype) -> None:
    assert all(answer == answers[0] for answer in answers)
    wrong = {key: pair for key, pair in answers[0].items() if not pair[0] <= allowed(key[0], dtype, pair[1])}
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.matrix
def test_every_layer_on_every_grid(ranks, name: str, dtype: str) -> None:
    kind = getattr(torch, dtype)
    check(ranks(ranks_of(name))(every_layer, GRIDS[name], kind, (EVEN, UNEVEN)), kind)


@pytest.mark.parametrize(("name", "dtype"), [("2.5d", "bfloat16"), ("1d sequence", "float32")])
def test_every_layer(ranks, name: str, dtype: str) -> None:
    """The quick part of the matrix."""
    kind = getattr(torch, dtype)
    check(ranks(ranks_of(name))(every_layer, GRIDS[name], kind, (UNEVEN,)), kind)


def offset(rank: int, options: dict[str, Any]) -> dict[str, float]:
    """LayerNorm far from zero."""
    mesh, errors = gingham.init(**options), {}
    for batch, width in ((16, 64), (13, 37)):
        torch.manual_seed(0)
        theirs = torch.nn.LayerNorm(width).double()
        for layout, operand in (("outer", "x"), ("inner", "inner")):
            ours = nn.LayerNorm(width, layout=layout)
            full = torch.randn(batch, width) + 1000
            a, b, cotangent = full.clone().requires_grad_(), full.double().requires_grad_(), torch.randn(batch, width)
            got, expected = mesh.gather(ours(mesh.scatter(a, operand)), operand), theirs(b)
            theirs.zero_grad()
            got.backward(cotangent), expected.backward(cotangent.double())
            pairs = [
                (got, expected),
                (a.grad, b.grad),
                (whole(ours.weight.grad), theirs.weight.grad),
                (whole(ours.bias.grad), theirs.bias.grad),
            ]
            errors[f"{batch} {width} {layout}"] = max(relative(*pair) for pair in pairs)
    return errors


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "3x2x2" else [pytest.mark.matrix]) for name in ALL])
def test_layer_norm_a_thousand_away_from_zero(ranks, name: str) -> None:
    for errors in ranks(ranks_of(name))(offset, GRIDS[name]):
        assert max(errors.values()) <= 1e-5, errors
