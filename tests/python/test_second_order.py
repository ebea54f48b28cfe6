"""Gradients of gradients: penalties on the input's gradient and Hessian-vector products, every layer beside float64 torch.nn.

A2 of the defects found by use: a gradient made with create_graph=True was taken for a constant.
"""

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

import gingham
from families import batch, build
from grids import GRIDS, ranks_of, whole
from layer_cases import ALL, CASES, UNEVEN, Case

BOUND = 1e-6
# batch, time, width, heads, kv heads, hidden, vocabulary
SMALL = (5, 3, 24, 12, 12, 31, 29)


def directions(module: torch.nn.Module) -> list[torch.Tensor]:
    """One for each parameter, the same full values on every grid."""
    found = []
    for index, parameter in enumerate(module.parameters()):
        full = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        found.append(full)
    return found


def second_gradients(module: torch.nn.Module, x: torch.Tensor, mesh: Any, case: Case) -> dict[str, torch.Tensor]:
    """Of |dL/dx|^2 + <dL/dw, v> + L: of x and of every parameter. mesh None: a serial module."""

    def run() -> torch.Tensor:
        if mesh is None:
            return module(x)
        y = module(mesh.scatter(x, case.operands[0], case.dim))
        return mesh.gather(y, case.operands[1], case.dim) if case.operands[1] else y

    from torch.nn.attention import SDPBackend, sdpa_kernel  # here: this function travels to the ranks by value

    parameters = list(module.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = run().sin().sum()
        inputs = [x] if x.is_floating_point() else []
        first = torch.autograd.grad(loss, [*inputs, *parameters], create_graph=True)
        if inputs:
            loss = loss + first[0].pow(2).sum() + first[0].sin().sum()
        seconds = list(first[len(inputs) :])
        outputs, cotangents = [loss, *seconds], [torch.ones_like(loss), *directions(module)]
        kept = [(y, dy) for y, dy in zip(outputs, cotangents, strict=True) if y.requires_grad]
        wanted = [*inputs, *parameters]
        found = torch.autograd.grad([y for y, _ in kept], wanted, [dy for _, dy in kept], allow_unused=True)
    names = ["x"] * len(inputs) + [name for name, _ in module.named_parameters()]
    return {
        name: torch.zeros(each.shape) if got is None else whole(got).detach() for name, got, each in zip(names, found, wanted, strict=True)
    }


def errors_of(mesh: Any, case: Case, size: Any) -> dict[str, tuple[float, float]]:
    """Ours, and those of the serial layer in float32."""
    makers = [case.ours, case.serial, case.serial]
    results = []
    for maker, dtype in zip(makers, [torch.float32, torch.float32, torch.float64], strict=True):
        torch.manual_seed(3)
        module = maker(size, torch.float32).to(dtype) if dtype == torch.float64 else maker(size, torch.float32)
        torch.manual_seed(9)
        x = case.x(size)
        x = x.to(dtype).requires_grad_() if x.is_floating_point() else x
        results.append(second_gradients(module, x, mesh if maker is case.ours else None, case))
    got, plain, exact = results
    assert got.keys() == exact.keys()
    scale = {name: exact[name.replace("k.bias", "q.bias")].norm().clamp_min(1e-3) for name in exact}
    return {name: tuple(float((each[name].double() - exact[name]).norm() / scale[name]) for each in (got, plain)) for name in exact}


def every_layer(rank: int, options: dict[str, Any], size: Any, names: list[str]) -> dict[str, dict[str, tuple[float, float]]]:
    mesh = gingham.init(**options)
    return {name: errors_of(mesh, CASES[name], size) for name in names}


def check(answers: list[dict[str, dict[str, tuple[float, float]]]]) -> None:
    """Within the bound, or twice what float32 costs the serial layer where that is more."""
    assert all(answer == answers[0] for answer in answers), "ranks differ"
    errors = {(layer, name): pair for layer, found in answers[0].items() for name, pair in found.items()}
    wrong = {key: pair for key, pair in errors.items() if not pair[0] <= max(BOUND, 2 * pair[1])}
    assert not wrong, wrong


def some(*quick: str) -> list[Any]:
    """Every mesh; all but those named in `make test-all` only."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.matrix]) for name in ALL]


@pytest.mark.parametrize("name", some("1d", "2.5d", "3x2x2"))
def test_a2_second_gradients_of_every_layer(ranks, name: str) -> None:
    check(ranks(ranks_of(name))(every_layer, GRIDS[name], SMALL, list(CASES)))


@pytest.mark.matrix
@pytest.mark.parametrize("name", ALL)
def test_a2_second_gradients_of_every_layer_at_other_sizes(ranks, name: str) -> None:
    check(ranks(ranks_of(name))(every_layer, GRIDS[name], UNEVEN, list(CASES)))


def converted(rank: int, options: dict[str, Any], family: str) -> dict[str, float]:
    """A converted model with transformers' own attention in plain operations: penalty on the gradient of the embedded inputs."""
    mesh = gingham.init(**options)
    results = []
    for ours in (True, False):
        model = build(family, attn_implementation="eager")
        model = gingham.parallelize(model, mesh) if ours else model.double()
        ids, labels = (batch(family)[name] for name in ("input_ids", "labels"))
        parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        loss = model(input_ids=ids, labels=labels).loss
        first = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        v = directions(model)
        second = torch.autograd.grad(first, list(parameters.values()), v, allow_unused=True)
        results.append({name: whole(each).detach() for name, each in zip(parameters, second, strict=True)})
    got, exact = results
    total = torch.stack([each.norm() for each in exact.values()]).norm()
    return {name: float((got[name].double() - exact[name]).norm() / max(exact[name].norm(), 1e-3 * total)) for name in exact}


@pytest.mark.parametrize("name", [each for each in some("2d") if each.values != ("1d sequence",)])
def test_a2_second_gradients_of_a_converted_llama(ranks, name: str) -> None:
    for errors in ranks(ranks_of(name))(converted, GRIDS[name], "llama"):
        assert max(errors.values()) <= BOUND, errors


def transforms(rank: int) -> dict[str, str]:
    """What torch.func and batched gradients say of a layer."""
    mesh = gingham.init(mode="2d", size=4)
    layer, full = gingham.nn.Linear(8, 8), torch.randn(4, 8)

    def run(x: torch.Tensor) -> torch.Tensor:
        return mesh.gather(layer(mesh.scatter(x)))

    def batched() -> Any:
        x = full.clone().requires_grad_()
        y = run(x)
        return torch.autograd.grad(y, x, torch.stack([y, y]), is_grads_batched=True)

    def dual() -> Any:
        with torch.autograd.forward_ad.dual_level():
            return run(torch.autograd.forward_ad.make_dual(full, full))

    calls = {
        "grad": lambda: torch.func.grad(lambda x: run(x).sum())(full),
        "vmap": lambda: torch.vmap(run)(torch.stack([full, full])),
        "jvp": lambda: torch.func.jvp(run, (full,), (full,)),
        "batched": batched,
        "vectorized": lambda: torch.autograd.functional.jacobian(lambda x: run(x).sum(0), full, vectorize=True),
        "dual": dual,
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = ""
        except NotImplementedError as error:
            found[name] = str(error)
    return found


def test_a2_what_torch_func_makes_of_layers_is_refused_by_name(ranks) -> None:
    for found in ranks(4)(transforms):
        assert all(text.startswith("gingham: ") and "create_graph=True" in text for text in found.values()), found
