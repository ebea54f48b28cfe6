"""A layer on a mesh beside its torch.nn twin in float64: same seed, same input, outputs and every gradient compared."""

from collections.abc import Callable
from typing import Any

import torch

from grids import relative, whole


def twins(make: Callable[[], torch.nn.Module], reference: Callable[[], torch.nn.Module]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Both after the same seed: initial weights must have the same bits. The reference is then taken to float64."""
    torch.manual_seed(3)
    ours = make()
    torch.manual_seed(3)
    theirs = reference()
    for (name, weight), (other, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and torch.equal(whole(weight.data), expected.data), f"initial {name}"
    return ours, theirs.double()


def compare(
    mesh: Any,
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    shape: tuple[int, ...],
    operands: tuple[str, str] = ("x", "x"),
    dtype: torch.dtype = torch.float32,
    residual: bool = False,
) -> dict[str, float]:
    """Relative errors of the output, the input's gradient and every parameter's."""
    generator = torch.Generator().manual_seed(sum(shape))
    full = torch.randn(shape, generator=generator, dtype=dtype)
    x, exact = full.clone().requires_grad_(), full.double().requires_grad_()
    expected = theirs(exact) + (exact if residual else 0)
    cotangent = torch.randn(expected.shape, generator=generator, dtype=dtype)
    (expected * cotangent).sum().backward()
    block = mesh.scatter(x, operands[0])
    got = mesh.gather(ours(block) + (block if residual else 0), operands[1])
    (got * cotangent).sum().backward()
    errors = {"y": relative(got, expected), "dx": relative(x.grad, exact.grad)}
    for (name, weight), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        gradient, truth = whole(weight.grad), other.grad
        if name.endswith("k.bias"):
            # the true gradient is 0: measured against the query's
            truth = dict(theirs.named_parameters())[name.replace("k.bias", "q.bias")].grad
            errors[name] = float(gradient.norm() / truth.norm())
        else:
            errors[name] = relative(gradient, truth)
    return errors
