"""Optimizers whose step DTensor cannot take: made on plain tensors, so that it is the serial one.

Most optimizers work on DTensors as they are, fused ones too (mesh/alike.py). Rprop treats every element for itself: its step is made on
each rank's own block. Adafactor, Muon, LBFGS and others that look at a whole matrix, or at all of them, make it on the
full tensors, the same on every rank, which then keeps its block: the bytes of a gather of parameters, gradients and
state of their shape a step (in mesh.traffic()), and the memory of the full tensors while it lasts, told by a warning once. Their
other state (row and column means, LBFGS's history) stays whole on every rank. LBFGS, which goes by the loss, gets the mean of what closures
return on all ranks; with a line search, which compares losses with gradients, they must return the job's. SparseAdam is refused, and on
a pipeline, whose ranks have the parameters of one stage, LBFGS and others whose step goes by numbers of all parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..autograd.casts import local_of
from ..autograd.relayout import move_block
from ..errors import MeshError
from ..mesh import Mesh, cuts_of, mesh_of
from ..mesh.carried import numbers_of_all
from ..mesh.layout import block, slices
from ..nn.clip import stage_of
from . import plain_parameters

# steps by numbers of all parameters together: of LBFGS dot products, of others a norm or an estimate of a distance
ACROSS = {"LBFGS", "FusedLAMB", "Prodigy", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptLion", "DAdaptSGD"}
WHOLE = {"Adafactor", "CAME", "LBFGS", "Muon", "Shampoo", "SOAP"}


def _names(optimizer: Any) -> set[str]:
    return {kind.__name__ for kind in type(optimizer).__mro__}


class Stand:
    """What stands in for one parameter on a mesh during a step: its block, or all of it."""

    def __init__(self, parameter: DTensor, mesh: Mesh, whole: bool) -> None:
        self.parameter, self.mesh, self.whole = parameter, mesh, whole
        self.cuts = cuts_of(mesh, parameter.placements, parameter.dim())
        self.mine = slices(block(parameter.shape, self.cuts, mesh.sizes, mesh.coordinates))
        self.plain = torch.nn.Parameter(self.of(parameter.detach()), requires_grad=parameter.requires_grad)
        self.take_gradient()

    def of(self, tensor: Any) -> torch.Tensor:
        """The plain tensor for one that is cut like the parameter."""
        local = local_of(tensor)
        if not self.whole:
            return local
        full = move_block(local, self.mesh, self.cuts, ((),) * len(self.cuts), tuple(self.parameter.shape))
        return full.clone() if full.data_ptr() == local.data_ptr() else full

    def take_gradient(self) -> None:
        gradient = self.parameter.grad
        self.plain.grad = None if gradient is None else self.of(gradient)

    def give(self) -> None:
        """The parameter gets the value of what stands for it."""
        if self.whole:
            local_of(self.parameter).copy_(self.plain.detach()[self.mine])

    def state_of(self, value: Any) -> Any:
        return self.of(value) if isinstance(value, DTensor) else value

    def state_back(self, value: Any) -> Any:
        """State shaped like what stands there is cut as the parameter is."""
        if not isinstance(value, torch.Tensor) or value.shape != self.plain.shape or not value.dim():
            return value
        local = value[self.mine].clone() if self.whole else value
        like, shape = self.parameter, self.parameter.shape
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


class Step:
    """One step of an optimizer, whose groups hold plain tensors while it lasts."""

    def __init__(self, optimizer: torch.optim.Optimizer, whole: bool) -> None:
        self.optimizer = optimizer
        self.stands: dict[int, Stand] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                mesh = mesh_of(parameter) if isinstance(parameter, DTensor) else None
                if mesh is not None:
                    self.stands[id(parameter)] = Stand(parameter, mesh, whole)
        self.plain = {id(stand.plain): stand.parameter for stand in self.stands.values()}
        for stand in self.stands.values():
            if stand.parameter in optimizer.state:
                values = optimizer.state.pop(stand.parameter)
                optimizer.state[stand.plain] = {name: stand.state_of(value) for name, value in values.items()}
        self.swap_in()

    def swap_in(self) -> None:
        # in place: LBFGS keeps the list itself
        for group in self.optimizer.param_groups:
            group["params"][:] = [self.stands[id(p)].plain if id(p) in self.stands else p for p in group["params"]]

    def swap_out(self) -> None:
        for group in self.optimizer.param_groups:
            group["params"][:] = [self.plain.get(id(p), p) for p in group["params"]]

    def closure(self, asked: Callable[[], Any]) -> Callable[[], Any]:
        """The user's closure, for which the model has the values of this moment, and the optimizer the model's parameters."""

        def run() -> Any:
            with torch.no_grad():
                self.hand_over()
            self.swap_out()
            try:
                return _of_all(self.optimizer, next(iter(self.stands.values())).mesh, asked())
            finally:
                self.swap_in()
                with torch.no_grad():
                    for stand in self.stands.values():
                        stand.take_gradient()

        return run

    def hand_over(self) -> None:
        for stand in self.stands.values():
            stand.give()
        torch.autograd.graph.increment_version([stand.parameter for stand in self.stands.values()])

    @torch.no_grad()
    def end(self) -> None:
        self.swap_out()
        for stand in self.stands.values():
            values = self.optimizer.state.pop(stand.plain, None)
            if values is not None:
                self.optimizer.state[stand.parameter] = {name: stand.state_back(value) for name, value in values.items()}
        self.hand_over()


@torch.no_grad()
def _of_all(optimizer: Any, mesh: Mesh, loss: Any) -> Any:
    """The loss by which an LBFGS goes, the same on every rank, where data ranks may have returned their own. Raises MeshError on every rank
    where a line search would go by their mean, which is the job's loss for batches of one size only. 8 bytes a rank, not counted."""
    if "line_search_fn" not in optimizer.param_groups[0] or mesh.data.size == 1:
        return loss
    mesh.say(f"{type(optimizer).__name__}.step's loss")
    every = [each for (each,) in numbers_of_all(mesh, [float(loss)])]
    if optimizer.param_groups[0]["line_search_fn"] is not None and max(every) - min(every) > 1e-6 * max(map(abs, every)):
        raise MeshError(
            f"{type(optimizer).__name__}.step: its line search compares losses, and the closure returned {float(loss):.9g} on rank"
            f" {mesh.rank}, {min(every):.9g} to {max(every):.9g} on all; expected the job's loss, the same on every rank: return"
            " gingham.cross_entropy, a loss by labels=, or of losses one a sample the mean over all ranks'"
            " (after backward: mesh.gather(mesh.scatter(losses.detach(), 'rows', own=True), 'rows').mean())"
        )
    return torch.as_tensor(loss).new_tensor(sum(every) / len(every))


_warned: set[str] = set()


def _begin(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    """torch calls it before a step of any optimizer."""
    if torch.compiler.is_compiling():
        return None
    left = optimizer.__dict__.pop("_gingham_step", None)
    if left is not None:  # the last step raised
        left.end()
    plain_parameters.begin(optimizer)
    names = _names(optimizer)
    if names & ACROSS:
        _refuse_stage(optimizer)
    whole = bool(names & WHOLE)
    if not (whole or names & {"Rprop", "SparseAdam"}):
        return None
    cut = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, DTensor) and mesh_of(p) is not None]
    if not cut:
        return None
    if "SparseAdam" in names:
        raise MeshError(
            f"SparseAdam: its parameter of shape {tuple(cut[0].shape)} lies on a mesh, whose gradients are dense; expected torch.optim.Adam"
            " (or AdamW) for it"
        )
    if whole:
        _warn(optimizer, cut)
    with torch.no_grad():
        step = optimizer.__dict__["_gingham_step"] = Step(optimizer, whole)
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": step.closure(kwargs["closure"])}
    if len(args) > 1 and args[1] is not None:
        return (args[0], step.closure(args[1]), *args[2:]), kwargs
    return None


def _refuse_stage(optimizer: Any) -> None:
    mesh = stage_of(p for group in optimizer.param_groups for p in group["params"])
    if mesh is not None:
        raise NotImplementedError(
            f"{type(optimizer).__name__} on a pipeline: rank {mesh.rank} has the parameters of one stage, and its step goes by numbers of"
            " those of all stages; expected an optimizer that steps each parameter by itself, such as torch.optim.AdamW, or a mesh"
            " without pipeline="
        )


def _warn(optimizer: Any, cut: list[Any]) -> None:
    name = type(optimizer).__name__
    if name not in _warned:
        _warned.add(name)
        size = sum(p.numel() * p.element_size() for p in cut) / 1e6
        warnings.warn(
            f"{name} looks at whole matrices: each of its steps gathers the {len(cut)} parameters that ranks hold in blocks, and their"
            f" gradients, on every rank ({size:.1f} MB each). AdamW works on the blocks.",
            stacklevel=4,
        )


def _end(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    step = optimizer.__dict__.pop("_gingham_step", None)
    if step is not None:
        step.end()


register_optimizer_step_pre_hook(_begin)
register_optimizer_step_post_hook(_end)
