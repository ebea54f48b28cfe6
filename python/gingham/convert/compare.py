"""Two questions to ask of a model: does it compute what its original does, and do the ranks that hold copies hold the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from ..checkpoint.tensors import plain_keys
from ..errors import MeshError
from ..mesh import Mesh, current, cuts_of, mesh_among
from ..mesh.carried import numbers_of_all
from ..mesh.checksums import digest_of
from ..mesh.layout import block, coordinates_of, odd_ranks


class Difference(MeshError):
    """A converted model that computes other values than its original. where: the first module, output or gradient that differs;
    error: relative, in the Frobenius norm."""

    def __init__(self, message: str, where: str = "", error: float = math.nan) -> None:
        super().__init__(message)
        self.where, self.error = where, error


def check(model: Any, *inputs: Any, original: torch.nn.Module | None = None, rtol: float = 1e-4, **options: Any) -> dict[str, float]:
    """Compares a converted model with its original on one batch: every output, the loss and the gradients of all parameters.

        report = gingham.check(model, input_ids=ids, labels=ids)      # {"logits": 2e-7, "loss": 0.0, "gradients": 4e-7}

    model: what gingham.parallelize returned (io="full"). inputs, options: full tensors, the same on every rank, as the model is
    called with. original: the model as it was, a copy.deepcopy made before parallelize; a transformers model needs none, it is built
    from its class and configuration and given the model's weights. Both run in eval mode, so that dropout draws nothing, and
    their gradients are left as they were. rtol: the relative error, in the Frobenius norm, that is let pass. Every rank
    calls it; each holds the whole original while it runs.
    Returns the errors by name of output. Raises gingham.compare.Difference (a MeshError) that names the first module, in the order of the
    calls, whose output differs, and the outputs and gradients that do; ValueError where the original cannot be built.
    """
    mesh = current(mesh_among("check", model.parameters()))
    twin = _twin(model, original)
    modes = {module: module.training for each in (model, twin) for module in each.modules()}
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    seen: list[tuple[str, float]] = []
    try:
        for each in (model, twin):
            each.eval()
            each.zero_grad(set_to_none=True)
        expected, outputs = _watched(mesh, model, twin, inputs, options, seen)
        report = {name: _error(outputs[name], value) for name, value in expected.items()}
        report |= _gradients(model, twin, outputs, expected)
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
        for module, training in modes.items():
            module.training = training
    wrong = {name: error for name, error in report.items() if not error <= rtol}
    if wrong:
        first = next(((path, error) for path, error in seen if not error <= rtol), None)
        where, error = first or max(wrong.items(), key=lambda pair: pair[1])
        shown = ", ".join(f"{name} by {error:.2g}" for name, error in sorted(wrong.items(), key=lambda pair: -pair[1])[:5])
        begins = f"the first module whose output differs is {where!r}, by {error:.2g}" if first else "no converted layer's output differs"
        raise Difference(
            f"check: {type(model).__name__} on rank {mesh.rank} differs from its original (rtol={rtol:g}): {shown}; {begins}."
            " Code between layers that mixes samples or features is the usual cause: see parallelize(plan=..., io='local')",
            where,
            error,
        )
    return report


def _twin(model: Any, original: torch.nn.Module | None) -> Any:
    if original is None:
        config = getattr(model, "config", None)
        plain = next((cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models")), None)
        if plain is None or config is None:
            raise ValueError(
                f"check: {type(model).__name__} cannot be built again from a configuration; pass original=, a copy.deepcopy(model) made"
                " before gingham.parallelize"
            )
        config = copy.deepcopy(config)
        config._attn_implementation = "eager" if "eager" in str(config._attn_implementation) else "sdpa"
        original = plain(config)
    else:
        original = copy.deepcopy(original)
    state = original.state_dict()
    for key, parts in plain_keys(model).items():
        whole = [part.tensor.full_tensor() if isinstance(part.tensor, DTensor) else part.tensor for part in parts]
        full = whole[0] if len(whole) == 1 else torch.cat(whole, parts[0].dim)
        if key in state:
            state[key] = full.detach()
    original.load_state_dict(state)
    return original


def _named(output: Any) -> dict[str, torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return {"output": output}
    leaves, _ = pytree.tree_flatten_with_path(dict(output) if hasattr(output, "items") else output)
    found = {pytree.keystr(path).strip("[]'."): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in found.items() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()}


def _keeping(held: dict[str, Any], path: str) -> Any:
    """A hook that keeps the last output and changes none."""

    def keep(module: torch.nn.Module, args: Any, y: Any) -> None:
        held[path] = y

    return keep


def _watched(
    mesh: Mesh, model: Any, twin: Any, inputs: Any, options: dict[str, Any], seen: list[tuple[str, float]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs of the original and of the model; seen: each converted layer's error in the order in which the original calls them."""
    plain: dict[str, torch.Tensor] = {}
    handles = []
    lines = {line.path: line for line in getattr(model, "gingham_plan", ()) if line.layer is not None and "->" in line.layout}
    for path, module in twin.named_modules():
        if path in lines:
            handles.append(module.register_forward_hook(_keeping(plain, path)))
    expected = _named(twin(*copy.deepcopy(inputs), **copy.deepcopy(options)))
    here: dict[str, torch.Tensor] = {}
    for path, line in lines.items():
        handles.append(line.layer.register_forward_hook(_keeping(here, path)))
    outputs = _named(model(*inputs, **options))
    for handle in handles:
        handle.remove()
    for path, whole in plain.items():
        if isinstance(whole, torch.Tensor) and isinstance(here.get(path), torch.Tensor) and whole.dim() >= 2:
            seen.append((path, _block_error(mesh, here[path], whole, lines[path].layout.split("->")[1])))
    missing = sorted(expected.keys() - outputs.keys())
    if missing:
        raise Difference(f"check: the converted {type(model).__name__} lacks the output {missing[0]!r}", missing[0], math.inf)
    return expected, outputs


def _block_error(mesh: Mesh, got: torch.Tensor, whole: torch.Tensor, name: str) -> float:
    """Of this rank's block, the largest of all ranks'; 0 where the sizes say that it is laid out in another way."""
    cuts = mesh.layout(name).cuts(whole.dim())
    mine = block(whole.shape, cuts, mesh.sizes, mesh.coordinates)
    fits = tuple(got.shape) == tuple(length for _, length in mine)
    here = _error(got, whole[tuple(slice(start, start + length) for start, length in mine)]) if fits else 0.0
    return float(max(error for (error,) in numbers_of_all(mesh, [here])))


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    if got.shape != exact.shape:
        return math.inf
    got, exact = got.detach().double(), exact.detach().double()
    error = float((got - exact).norm() / exact.norm().clamp_min(1e-30)) if exact.numel() else 0.0
    return error if math.isfinite(error) or not torch.isfinite(exact).all() else math.inf


def _gradients(model: Any, twin: Any, outputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of the loss, or of the sum of all outputs weighed by their position."""
    totals: list[torch.Tensor] = []
    for found in (outputs, expected):
        values = [found["loss"]] if "loss" in found else [found[name] for name in expected]
        values = [value for value in values if value.requires_grad]
        if not values:
            return {}
        weighed = [
            (value * torch.linspace(0.5, 1.5, value.numel(), device=value.device).view(value.shape).to(value.dtype)).sum()
            for value in values
        ]
        totals.append(torch.stack(weighed).sum())
    for total in totals:
        total.backward()
    exact = {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None}
    scale = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in exact.values()))
    report = {}
    for key, parts in plain_keys(model).items():
        gradients: list[Any] = [getattr(part.tensor, "grad", None) for part in parts]
        if key not in exact or any(gradient is None for gradient in gradients):
            if key in exact and float(exact[key].norm()):
                report[f"gradient of {key}"] = math.inf
            continue
        whole = [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        got = whole[0] if len(whole) == 1 else torch.cat(whole, parts[0].dim)
        # a gradient that is 0 but for rounding is measured against all
        size = max(float(exact[key].norm()), 1e-3 * scale, 1e-30)
        report[f"gradient of {key}"] = float((got.double() - exact[key].double()).norm()) / size
    return report


def _entries(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters()
    yield from ((f"buffer {name}", buffer) for name, buffer in model.named_buffers())
    if optimizer is None:
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for key, value in sorted(group.items()):
            if key != "params":
                yield f"optimizer group {index}'s {key}", value
        for parameter in group["params"]:
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                yield f"optimizer's {key} of {names.get(id(parameter), 'a parameter of another model')}", value


def check_replicas(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Compares what the ranks hold in common, bit by bit: copies of blocks (weights over depth, biases and norms over rows), parameters
    and buffers that are whole on every rank, and of an optimizer its state and every number of its groups (learning rates, betas).

    Every rank calls it; call it now and then in a run that must not go wrong in silence. One checksum of 8 bytes a tensor is
    gathered from every rank. Raises MeshError on every rank that names the first that differs and the odd ranks.
    """
    mesh = current(mesh_among("check_replicas", model.parameters()))
    entries = list(_entries(model, optimizer))
    names = [name for name, _ in entries]
    told = mesh.world.sizes([len(names), crc32("\n".join(names).encode())])
    odd, _ = odd_ranks([tuple(each) for each in told], mesh.ranks)
    if odd:
        raise MeshError(f"check_replicas: rank {mesh.rank}: ranks {odd} hold other names, {len(names)} here: models or optimizers differ")
    parts = numbers_of_all(mesh, [_digest(value) for _, value in entries] or [0], torch.int64)
    wrong = []
    for index, (name, value) in enumerate(entries):
        for holders in _holders(mesh, value):
            named = [mesh.ranks[place] for place in holders]
            odd, _ = odd_ranks([parts[place][index] for place in holders], named)
            if odd:
                wrong.append((name, odd, named))
    if wrong:
        name, odd, holders = wrong[0]
        raise MeshError(
            f"check_replicas: rank {mesh.rank}: {name} differs: ranks {odd} hold other values than the rest of {holders}, which"
            f" should hold the same; {len({each for each, *_ in wrong})} of {len(names)} entries differ. A rank that skipped a step,"
            " stepped with another learning rate, or was given other inputs makes this; load the last checkpoint on all ranks"
        )


def _digest(value: Any) -> int:
    local = value._local_tensor if isinstance(value, DTensor) else value
    if isinstance(local, torch.Tensor):
        return digest_of(local.cpu())
    return crc32(repr(value).encode())


def _holders(mesh: Mesh, value: Any) -> list[list[int]]:
    """The sets of ranks that hold one block each."""
    if not isinstance(value, DTensor):
        return [list(range(mesh.size))]
    cuts = cuts_of(mesh, value.placements, value.dim())
    sets: dict[Any, list[int]] = {}
    for rank in range(mesh.size):
        sets.setdefault(block(value.shape, cuts, mesh.sizes, coordinates_of(rank, mesh.sizes)), []).append(rank)
    return list(sets.values())
