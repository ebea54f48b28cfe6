"""Parameters changed in place between forward and backward: refused wherever torch.nn refuses, eager and compiled (A1).

And what a layer returns may be changed in place as what torch.nn's returns (C12), since it is no view (C11).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gingham
from grids import GRIDS, ranks_of
from layer_cases import ALL, CASES, Case

SMALL = (5, 3, 24, 12, 12, 31, 29)
EVEN = (8, 3, 24, 12, 12, 32, 32)  # compiled graphs need rows that the ranks cut evenly
Change = Callable[[torch.nn.Module, str], None]


def add(module: torch.nn.Module, name: str) -> None:
    with torch.no_grad():
        module.get_parameter(name).add_(1)


def fill(module: torch.nn.Module, name: str) -> None:
    torch.nn.init.constant_(module.get_parameter(name), 0.5)


def load(module: torch.nn.Module, name: str) -> None:
    module.load_state_dict({key: value.clone() for key, value in module.state_dict().items()})


def foreach(module: torch.nn.Module, name: str) -> None:
    with torch.no_grad():
        torch._foreach_lerp_([module.get_parameter(name)], [torch.ones_like(module.get_parameter(name))], 0.5)


def step(kind: type, **options: Any) -> Change:
    def change(module: torch.nn.Module, name: str) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        kind(module.parameters(), lr=0.1, **options).step()

    return change


CHANGES: dict[str, Change] = {
    "add_": add,
    "init": fill,
    "load_state_dict": load,
    "_foreach_lerp_": foreach,
    "SGD": step(torch.optim.SGD, foreach=False),
    "AdamW fused": step(torch.optim.AdamW, fused=True),
    "AdamW foreach": step(torch.optim.AdamW, foreach=True),
}


def refuses(run: Callable[[], torch.Tensor], module: torch.nn.Module, name: str, change: Change) -> bool:
    """Whether backward refuses after the change; leaves the module as it was."""
    before = {key: value.clone() for key, value in module.state_dict().items()}
    y = run()
    change(module, name)
    try:
        y.float().pow(2).sum().backward()
        return False
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error), error
        return True
    finally:
        module.load_state_dict(before)
        module.zero_grad()


def disagreements(mesh: Any, case: Case, compiled: bool) -> list[str]:
    """Changes that one of ours and torch.nn refuses and the other does not."""
    found = []
    torch.manual_seed(3)
    sizes = EVEN if compiled else SMALL
    ours, theirs = case.ours(sizes, torch.float32), case.serial(sizes, torch.float32)
    full = case.x(sizes)
    call = torch.compile(ours, backend="aot_eager") if compiled else ours
    for wants in (True, False) if full.is_floating_point() else (False,):

        def runs(wants: bool = wants) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
            x = full.clone().requires_grad_(wants and full.is_floating_point())
            return lambda: call(mesh.scatter(x, case.operands[0], case.dim)), lambda: theirs(x)

        for name, _ in ours.named_parameters():
            for kind, change in CHANGES.items():
                mine, plain = runs()
                expected = refuses(plain, theirs, name, change)
                # torch's fused steps do not count up versions, so that torch.nn gives the gradient of the changed weight; ours refuses
                expected = expected or kind == "AdamW fused" and refuses(plain, theirs, name, CHANGES["SGD"])
                if refuses(mine, ours, name, change) != expected:
                    found.append(f"{name} by {kind}, x {'with' if wants else 'without'} gradient: torch.nn {expected}")
    return found


def every_layer(rank: int, options: dict[str, Any], compiled: bool, names: list[str]) -> dict[str, list[str]]:
    mesh = gingham.init(**options)
    if compiled:
        torch._dynamo.reset()
    return {name: found for name in names if (found := disagreements(mesh, CASES[name], compiled))}


LAYERS = [name for name in CASES if not name.startswith(("cross_entropy", "MLP gelu_tanh", "MLP relu"))]
EVERY = [pytest.param(name, marks=[] if name == "2d" else [pytest.mark.matrix]) for name in ALL]


@pytest.mark.parametrize("name", EVERY)
def test_a1_what_torch_refuses_is_refused(ranks, name: str) -> None:
    assert ranks(ranks_of(name))(every_layer, GRIDS[name], False, LAYERS) == [{}] * ranks_of(name)


COMPILED = ["Linear", "LayerNorm", "RMSNorm", "Classifier tied", "MLP silu"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "2d" else [pytest.mark.matrix]) for name in ALL])
def test_a1_what_torch_refuses_is_refused_in_compiled_graphs(ranks, name: str) -> None:
    got = ranks(ranks_of(name))(every_layer, GRIDS[name], True, COMPILED)
    assert got == [{}] * ranks_of(name)


def changed_outputs(rank: int, options: dict[str, Any], names: list[str]) -> dict[str, str]:
    """Layers whose output cannot be changed in place, or whose gradients then differ from those of the same operations out of place."""
    mesh, wrong = gingham.init(**options), {}
    for name in names:
        case = CASES[name]
        torch.manual_seed(3)
        module, full, found = case.ours(SMALL, torch.float32), case.x(SMALL), []
        for in_place in (True, False):
            x = full.clone().requires_grad_(full.is_floating_point())
            module.zero_grad()
            y = module(mesh.scatter(x, case.operands[0], case.dim))
            if (y._is_view() and "dim=1" not in name) or y is x:
                wrong[name] = "a view"
            if in_place:
                y /= 4
                y = torch.nn.ReLU(inplace=True)(y)
            else:
                y = torch.nn.ReLU()(y / 4)
            full_y = mesh.gather(y, case.operands[1], case.dim) if case.operands[1] else y + 0
            full_y.mul_(2) if in_place else None
            (full_y if in_place else full_y * 2).sum().backward()
            gradients = [each.grad.to_local().clone() for each in module.parameters() if each.grad is not None]
            found.append([y.detach().clone(), *gradients, *([x.grad] if x.requires_grad else [])])
        if not all(torch.equal(one, other) for one, other in zip(*found, strict=True)):
            wrong[name] = "other gradients"
    return wrong


@pytest.mark.parametrize("name", EVERY)
def test_c11_c12_outputs_are_no_views_and_may_be_changed_in_place(ranks, name: str) -> None:
    assert ranks(ranks_of(name))(changed_outputs, GRIDS[name], list(CASES)) == [{}] * ranks_of(name)
