"""What a checkpoint holds, as one flat dict under names that do not depend on the grid:

model.<plain key>                  parameters and persistent buffers
optimizer.state.<plain key>.<name> what the optimizer keeps for a parameter (AdamW: exp_avg, exp_avg_sq, step)
rng                                [ranks, bytes]: torch's CPU generator on each rank
extra                              everything that is not a tensor (`Extra`), by torch.save
"""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from . import stages
from .blocks import FORMAT, Opened, check_format, unpacked
from .folders import LOCK
from .reading import fill
from .tensors import Part, Whole, plain_keys, whole_of
from .together import CheckpointError, Ranks

MODEL, STATE, RNG, EXTRA = "model.", "optimizer.state.", "rng", "extra"
NOT_CUT = "step"  # the name under which torch's optimizers count steps: never shaped like the parameter


def gathered(ranks: Ranks, model: torch.nn.Module, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors that this rank's part of a save writes, and what is here of that which is no tensor. Raises CheckpointError where
    something cannot be saved."""
    keys, firsts = plain_keys(model), stages.first_keys(model)
    state: dict[str, Any] = {MODEL + key: whole_of(key, parts) for key, parts in keys.items()}
    scalars: dict[str, Any] = {}
    if optimizer is not None:
        for key, parts in _optimized(optimizer, keys, firsts).items():
            _gather_optimizer_state(state, scalars, optimizer, key, parts)
    generator = torch.get_rng_state()
    state[RNG] = Whole(
        torch.Size((ranks.size, len(generator))), generator.dtype, {(ranks.rank, 0): (torch.Size((1, len(generator))), generator[None])}
    )
    part = {
        "dropout": {path: (module.name, module.calls) for path, module in dropouts(model) if stages.holds(model, path)},
        "modules": {path: value for path, value in _module_state(model) if stages.holds(model, path)},
        "groups": None if optimizer is None else _groups(optimizer, keys, firsts),
        "scalars": scalars,
    }
    return state, part


def extra_state(ranks: Ranks, parts: list[dict[str, Any]], beside: dict[str, Any], step: int | None) -> io.BytesIO:
    """Everything that is not a tensor, of all ranks' parts; `beside`: scheduler and scaler by name, or None for each."""
    grid = None if ranks.mesh is None else dict(ranks.mesh.sizes)
    states = {name: None if each is None else each.state_dict() for name, each in beside.items()}
    return packed({"format": FORMAT, "step": step, "grid": grid, **stages.merged(parts), **states})


def packed(extra: dict[str, Any]) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(extra, file)
    try:
        unpacked(file)
    except Exception as error:
        raise CheckpointError(
            f"{EXTRA}: the scheduler's, scaler's, optimizer's or a module's state holds what a checkpoint cannot ({error});"
            " expected numbers, strings, tensors and their lists and dicts"
        ) from error
    return file


def extra_of(opened: Opened) -> dict[str, Any]:
    """Everything of a checkpoint that is not a tensor; {} where another tool wrote it. Raises CheckpointError for another format."""
    if EXTRA not in opened.metadata.state_dict_metadata:
        return {}
    held: dict[str, Any] = {EXTRA: None}
    try:
        fill(opened, held)
        extra = unpacked(held[EXTRA])
    except Exception as error:
        raise CheckpointError(f"{opened.folder}: {EXTRA} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(extra, dict):
        raise CheckpointError(f"{opened.folder}: {EXTRA} holds a {type(extra).__name__}, expected a dict")
    check_format(opened.folder, extra.get("format"))
    if extra["format"] > 1 and opened.sums is None:
        raise CheckpointError(f"{opened.folder}: has lost its {LOCK}, which format {extra['format']} has: the checkpoint is damaged")
    return extra


def dropouts(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules that draw their masks from a name and a number of calls."""
    for path, module in model.named_modules():
        if all(hasattr(module, name) for name in ("calls", "name", "p")):
            yield path, module


def _module_state(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
            yield path, module.get_extra_state()


def _optimized(optimizer: Any, keys: dict[str, list[Part]], firsts: dict[str, str]) -> dict[str, list[Part]]:
    """The plain keys that the optimizer changes, each with its parts; tied ones under their first key, which `firsts` has where only
    another rank has it."""
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found: dict[str, list[Part]] = {}
    seen: set[int] = set()
    for key, parts in keys.items():
        held = [id(part.tensor) in mine for part in parts]
        if any(held) and not all(held):
            lacking = [part.name for part, has in zip(parts, held, strict=True) if not has]
            raise CheckpointError(f"{key}: the optimizer has only some of its parts, {lacking} are missing; give it all or none")
        if all(held) and not {id(part.tensor) for part in parts} & seen:
            found[firsts.get(key, key)] = parts
            seen |= {id(part.tensor) for part in parts}
    if mine - seen:
        raise CheckpointError(f"the optimizer has {len(mine - seen)} parameters that are not the model's; pass the model it trains")
    return found


def _groups(optimizer: Any, keys: dict[str, list[Part]], firsts: dict[str, str]) -> list[dict[str, Any]]:
    """Per group its settings and, under "params", the plain keys, in the model's order."""
    key_of = {id(part.tensor): key for key, parts in _optimized(optimizer, keys, firsts).items() for part in parts}
    groups = []
    for group in optimizer.param_groups:
        settings = {name: value for name, value in group.items() if name != "params"}
        groups.append({**settings, "params": list(dict.fromkeys(key_of[id(parameter)] for parameter in group["params"]))})
    seen: dict[str, int] = {}
    for index, group in enumerate(groups):
        for key in group["params"]:
            if seen.setdefault(key, index) != index:
                raise CheckpointError(f"{key}: its parts are in the optimizer's groups {seen[key]} and {index}; put them in one")
    return groups


def _gather_optimizer_state(state: dict[str, Any], scalars: dict[str, Any], optimizer: Any, key: str, parts: list[Part]) -> None:
    kept = [optimizer.state.get(part.tensor, {}) for part in parts]
    if len({frozenset(values) for values in kept}) > 1:
        raise CheckpointError(f"{key}: the optimizer keeps different things for its parts: {[sorted(values) for values in kept]}")
    for name in kept[0]:
        values = [values[name] for values in kept]
        full = f"{STATE}{key}.{name}"
        if name != NOT_CUT and all(_shaped_like(value, part.tensor) for value, part in zip(values, parts, strict=True)):
            by_part = dict(zip((part.name for part in parts), values, strict=True))
            state[full] = whole_of(full, parts, lambda part, of=by_part: of[part.name])  # type: ignore[misc]
            continue
        if any(not _equal(value, values[0]) for value in values[1:]):
            raise CheckpointError(f"{full}: differs between its parts {[part.name for part in parts]}: {values}; it cannot be joined")
        if isinstance(values[0], torch.Tensor):
            state[full] = whole_of(full, [Part(full, values[0])])
        else:
            scalars[full] = values[0]


def _shaped_like(value: Any, tensor: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == tensor.shape


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other


class Target:
    """What a load fills: `state` for the reader; `apply` then hands it to optimizer, scheduler, scaler, modules and generator.
    `wrong`: every reason why the checkpoint does not fit, found before a byte of the model is changed."""

    def __init__(
        self, ranks: Ranks, model: torch.nn.Module, optimizer: Any, beside: dict[str, Any], saved: Any, extra: dict[str, Any], strict: bool
    ) -> None:
        self.model, self.optimizer, self.beside, self.extra = model, optimizer, beside, extra
        self.keys, self.firsts = plain_keys(model), stages.first_keys(model)
        self.state: dict[str, Any] = {MODEL + key: whole_of(key, parts) for key, parts in self.keys.items()}
        self.optimizer_state: dict[Any, dict[str, Any]] = defaultdict(dict)
        self.generator: torch.Tensor | None = None
        self.wrong: list[str] = []
        wanted = {name for name in saved if name.startswith(MODEL)}
        if optimizer is not None:
            self._prepare_optimizer(saved, extra)
            self._prepare_generator(ranks, saved)
            wanted |= {name for name in saved if name.startswith((STATE, RNG))}
            for name in beside:
                if (beside[name] is None) != (extra.get(name) is None):
                    holds, fix = ("no", f"leave {name}= out") if beside[name] is not None else ("a", f"pass {name}=")
                    self.wrong.append(f"{name}: the checkpoint holds {holds} {name}'s state; {fix}, or strict=False")
        self.wrong += [f"{name}: got nothing, expected in the checkpoint" for name in self.state if name not in saved]
        self.wrong += [
            f"{name}: is in the checkpoint, expected nothing of that name"
            for name in sorted(wanted - self.state.keys())
            if not self._elsewhere(name)
        ]
        modules = dict(_module_state(model)).keys() ^ extra.get("modules", {}).keys()
        self.wrong += [f"{path}: has extra state in the model or the checkpoint, not in both" for path in sorted(modules)]
        if not strict:
            self.wrong = []
            self.state = {name: whole for name, whole in self.state.items() if name in saved}

    def _elsewhere(self, name: str) -> bool:
        """Whether a saved name is that of other stages of a pipeline."""
        return stages.is_absent(self.model, name.removeprefix(MODEL).removeprefix(STATE))

    def _prepare_optimizer(self, saved: Any, extra: dict[str, Any]) -> None:
        groups, found = extra.get("groups"), _groups(self.optimizer, self.keys, self.firsts)
        if groups is None:
            self.wrong.append("optimizer: got nothing, expected an optimizer's state in the checkpoint; pass optimizer=None")
            return
        for index in range(max(len(groups), len(found))):
            theirs, ours = (set(of[index]["params"]) if index < len(of) else set() for of in (groups, found))
            for key in sorted(key for key in theirs ^ ours if not self._elsewhere(key)):
                who = "checkpoint" if key in theirs else "optimizer given"
                self.wrong.append(f"{key}: is in group {index} of the {who} only")
        for key, parts in _optimized(self.optimizer, self.keys, self.firsts).items():
            prefix = f"{STATE}{key}."
            for name in [name for name in saved if name.startswith(prefix) and "." not in name[len(prefix) :]]:
                self._prepare_optimizer_tensor(name, name[len(prefix) :], parts, saved[name])
            for name, value in extra["scalars"].items():
                if name.startswith(prefix) and "." not in name[len(prefix) :]:
                    for part in parts:
                        self.optimizer_state[part.tensor][name[len(prefix) :]] = value

    def _prepare_optimizer_tensor(self, full: str, name: str, parts: list[Part], saved: Any) -> None:
        """Room for a saved state: shaped and cut like the parameter, or whole and shared by all parts' values."""
        dtype = saved.properties.dtype
        if name != NOT_CUT and saved.size == whole_of(full, parts).shape:
            for part in parts:
                self.optimizer_state[part.tensor][name] = torch.empty_like(part.tensor.detach(), dtype=dtype)
            self.state[full] = whole_of(full, parts, lambda part: self.optimizer_state[part.tensor][name])
            return
        if saved.size.numel() != 1 and isinstance(parts[0].tensor, DTensor):
            shape = tuple(whole_of(full, parts).shape)
            self.wrong.append(f"{full}: got shape {tuple(saved.size)}, expected {shape} or one number; a mesh cannot cut this state")
        group = next(group for group in self.optimizer.param_groups if any(parts[0].tensor is p for p in group["params"]))
        there = parts[0].tensor.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
        value = torch.empty(saved.size, dtype=dtype, device=there)
        self.state[full] = whole_of(full, [Part(full, value)])
        for part in parts:
            self.optimizer_state[part.tensor][name] = value

    def _prepare_generator(self, ranks: Ranks, saved: Any) -> None:
        if RNG not in saved:
            self.wrong.append(f"{RNG}: got nothing, expected the state of torch's generator in the checkpoint")
            return
        rows, length = saved[RNG].size
        self.generator = torch.empty(1, length, dtype=torch.uint8, device="cpu")
        row = ranks.rank if rows == ranks.size else 0
        self.state[RNG] = Whole(saved[RNG].size, torch.uint8, {(row, 0): (self.generator.shape, self.generator)})

    def apply(self) -> None:
        """After the reader has filled the tensors: everything that is not one of the model's."""
        for path, value in self.extra.get("modules", {}).items():
            module = dict(self.model.named_modules()).get(path)
            if module is not None:
                module.set_extra_state(value)
        if self.optimizer is None:
            return
        if self.extra.get("groups") is not None:
            self._apply_optimizer()
        for name, each in self.beside.items():
            if each is not None and self.extra.get(name) is not None:
                each.load_state_dict(self.extra[name])
        if self.generator is not None:
            torch.set_rng_state(self.generator[0])
        saved = dict(self.extra.get("dropout", {}))
        for path, module in dropouts(self.model):
            if path in saved:
                module.name, module.calls = saved.pop(path)
            elif module.p > 0:
                warnings.warn(f"gingham.load: {path}: its dropout calls are not in the checkpoint, masks start anew", stacklevel=4)
        drawn = sorted(path for path, (_, calls) in saved.items() if calls > 0)
        if drawn:
            warnings.warn(f"gingham.load: {drawn} are no gingham.nn.Dropout here: masks differ from an unbroken run", stacklevel=4)

    def _apply_optimizer(self) -> None:
        for group, saved in zip(self.optimizer.param_groups, self.extra["groups"], strict=False):
            group.update({name: value for name, value in saved.items() if name != "params"})
        owned = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for parameter in owned:
            self.optimizer.state.pop(parameter, None)
        for parameter, values in self.optimizer_state.items():
            # parts that were saved as one get a count of steps each: optimizers add to it in place
            own = {name: value.clone() if name == NOT_CUT and isinstance(value, torch.Tensor) else value for name, value in values.items()}
            self.optimizer.state[parameter] = own
