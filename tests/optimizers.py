"""All of torch's optimizers and transformers' Adafactor, plain, foreach and fused: their steps on a mesh beside serial ones."""

import inspect
from typing import Any

import torch

import gingham
from grids import whole

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [dict(lr=0.1), dict(lr=0.1, momentum=0.9, weight_decay=0.1), dict(lr=0.1, momentum=0.9, nesterov=True)],
    "Adam": [dict(lr=1e-2), dict(lr=1e-2, amsgrad=True, weight_decay=0.1)],
    "LBFGS": [dict(lr=0.1), dict(lr=1.0, line_search_fn="strong_wolfe")],
    "RMSprop": [dict(lr=1e-3, momentum=0.9, centered=True)],
    "Muon": [dict(lr=1e-2), dict(lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")],
}


QUICK = ("Rprop", "LBFGS", "Muon", "Adafactor", "hf Adafactor", "SparseAdam")


def cases() -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for name, kind in sorted(vars(torch.optim).items()):
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            known = inspect.signature(kind).parameters
            for options in OPTIONS.get(name, [dict()]):
                found.append((name, options | ({"foreach": False} if "foreach" in known else {})))
                found += [(name, options | {form: True}) for form in ("foreach", "fused") if form in known]
    found += [("hf Adafactor", dict(lr=1e-2, scale_parameter=False, relative_step=False)), ("hf Adafactor", dict())]
    found += [("hf Adafactor", dict(lr=1e-2, scale_parameter=True, relative_step=False, beta1=0.9))]
    return found


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.LayerNorm(20), torch.nn.Linear(20, 10))
    return model.double() if name == "LBFGS" else model


def stepped(model: torch.nn.Module, name: str, options: dict[str, Any], steps: int = 5) -> list[torch.Tensor]:
    """The full parameters after some steps."""
    if name == "hf Adafactor":
        from transformers.optimization import Adafactor as kind
    else:
        kind = getattr(torch.optim, name)
    parameters = [p for p in model.parameters() if p.dim() == 2 or name != "Muon"]
    optimizer = kind(parameters, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 12, generator=generator).to(parameters[0].dtype)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        if name == "LBFGS":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return [whole(p.detach()).clone() for p in model.parameters()]


def outcomes(rank: int, grid: dict[str, Any], quick: bool) -> dict[str, Any]:
    """By case: the error of the update relative to the largest weight's, or the words of what was raised. LBFGS in float64: hundreds
    of evaluations make any rounding large. quick: one case of each optimizer and form that torch's DTensor does not serve."""
    mesh = gingham.init(**grid)
    found: dict[str, Any] = {}
    chosen = cases()
    if quick:
        wanted = [case for case in chosen if case[0] in QUICK or case[0] in ("SGD", "Adagrad") and case[1].get("fused")]
        chosen = list({(name, options.get("foreach"), len(options) > 1): (name, options) for name, options in wanted}.values())
    for name, options in chosen:
        key = f"{name} {options}"
        try:
            expected: Any = stepped(model_of(name), name, options)
        except Exception as error:
            expected = error
        try:
            got = stepped(gingham.parallelize(model_of(name), mesh), name, options)
        except Exception as error:
            found[key] = f"{type(error).__name__}: {error}"
            continue
        found[key] = (
            f"serial raises {expected}"
            if isinstance(expected, Exception)
            else max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))
        )
    return found
