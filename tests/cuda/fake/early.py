"""Weights gathered before their layers begin (autograd/early.py) on fake GPUs: each case with it and without it, on every rank.

Prints as JSON: what differs, [] for nothing; how many gathers each case made and used on rank 0; what the ranks are told where one
alone writes a weight, or sets a hook while the pass runs.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

import gingham
from gingham import nn
from gingham.autograd import early

WIDTH, ROWS, STEPS = 24, 24, 4
MODES: list[dict[str, Any]] = [{"mode": "2.5d", "size": 8, "depth": 2}, {"grid": (3, 1, 2), "size": 6}]
counts = {"begun": 0, "used": 0}


def counted() -> None:
    start, take = early.Ahead.start, early.Ahead.take

    def counting_start(self: Any) -> None:
        start(self)
        counts["begun"] += self._ready is not None

    def counting_take(self: Any, *args: Any) -> Any:
        found = take(self, *args)
        counts["used"] += found is not None
        return found

    early.Ahead.start, early.Ahead.take = counting_start, counting_take  # type: ignore[method-assign]


def stack(bias: bool = True, dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    return torch.nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias, dtype=dtype, swapped=i == 2) for i in range(4)))


def passes(
    mesh: gingham.Mesh, model: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor] | None = None, eval_too: bool = False
) -> Any:
    """Losses of steps of SGD and the gradients of the last."""
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found: list[torch.Tensor] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        y = (forward or model)(mesh.scatter(x).requires_grad_())
        y.square().sum().backward()
        found.append(y.detach().clone())
        optimizer.step()
        if eval_too:
            with torch.no_grad():
                found += [model(mesh.scatter(x)).clone() for _ in range(2)]
    return found + [p.grad.to_local().clone() for p in model.parameters() if p.grad is not None]


def plain(mesh: gingham.Mesh) -> Any:
    return passes(mesh, stack())


def halves(mesh: gingham.Mesh) -> Any:
    return passes(mesh, stack(dtype=torch.bfloat16))


def autocast(mesh: gingham.Mesh) -> Any:
    model = stack()

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    return passes(mesh, model, forward)


def written(mesh: gingham.Mesh) -> Any:
    """Each layer changes the next one's weight, in the ways that count up no version too."""
    model = stack()

    def write(layer: Any, *_: Any) -> None:
        after = model[(list(model).index(layer) + 1) % 4]
        with torch.no_grad():
            if layer is model[0]:
                after.weight.mul_(1.25)
            elif layer is model[1]:
                after.weight.data.mul_(0.75)

    for layer in model:
        layer.register_forward_hook(write)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():  # a backward pass would refuse the versions
            model(x)
        write(model[3])
        return model[3](x)

    return passes(mesh, model, forward)


def recomputed(mesh: gingham.Mesh) -> Any:
    model = stack()

    def forward(x: torch.Tensor) -> torch.Tensor:
        for i in (0, 2):
            x = torch.utils.checkpoint.checkpoint(model[i : i + 2], x, use_reentrant=False)
        return x

    return passes(mesh, model, forward)


def judged(mesh: gingham.Mesh) -> Any:
    return passes(mesh, stack(), eval_too=True)


def frozen(mesh: gingham.Mesh) -> Any:
    model = stack()
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    return passes(mesh, model)


def in_parts(mesh: gingham.Mesh) -> Any:
    """Two forward passes before their backward passes."""
    model = stack()
    return passes(mesh, model, lambda x: model(x) + model(2 * x))


def shared(mesh: gingham.Mesh) -> Any:
    block = torch.nn.Sequential(nn.SelfAttention(WIDTH, 4), nn.MLP(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH))
    return passes(mesh, block, lambda x: block(x.view(-1, 2, x.shape[-1])).view(x.shape))


def jumping(mesh: gingham.Mesh) -> Any:
    """Another order of layers each time: guesses are wrong."""
    model, chosen = stack(), torch.Generator().manual_seed(3)

    def forward(x: torch.Tensor) -> torch.Tensor:
        for i in torch.randperm(4, generator=chosen):
            x = model[i](x)
        return x

    return passes(mesh, model, forward)


def compiled(mesh: gingham.Mesh) -> Any:
    """The last step's layers but the first are a compiled graph, which asks for no W: what is on its way for the second is left."""
    model = stack()
    graph, steps = torch.compile(model[1:], backend="aot_eager"), iter(range(STEPS))
    return passes(mesh, model, lambda x: (model[1:] if next(steps) < STEPS - 1 else graph)(model[0](x)))


def hooked(mesh: gingham.Mesh) -> Any:
    """As plain, with a hook on one rank, in one of the steps: sums over depth are in another place of the order of messages there."""
    model, handles, seen = stack(), list[Any](), list[torch.Tensor]()
    steps = iter(range(STEPS))

    def forward(x: torch.Tensor) -> torch.Tensor:
        step = next(steps)
        if step == 2 and mesh.rank == 1:
            handles.append(model[1].weight.register_hook(lambda gradient: seen.append(gradient.to_local().clone())))
        elif step == 3 and mesh.rank == 1:
            handles.pop().remove()
        return model(x)

    found = passes(mesh, model, forward)
    assert len(seen) == (1 if mesh.rank == 1 else 0)
    return found


# and whether bytes are those without it: not where a layer is guessed that does not come
CASES = {
    plain: True,
    halves: True,
    autocast: True,
    written: False,
    recomputed: True,
    judged: True,
    frozen: True,
    in_parts: True,
    shared: True,
}
CASES |= {jumping: False, hooked: True, compiled: False}


def all_cases(rank: int, options: dict[str, Any]) -> Any:
    counted()
    found = {}
    for case in CASES if options.get("depth") else (plain, halves, shared):
        for least in (0, sys.maxsize):
            early.LEAST = least
            mesh = gingham.init(**options)
            torch.manual_seed(0)
            counts.update(begun=0, used=0)
            tensors = case(mesh)
            moved = {axis: dict(count) for axis, count in mesh.traffic().items()}
            found[case.__name__, least] = tensors, moved, dict(counts)
            gingham.destroy()
    return found


def alone(rank: int) -> str:
    """Rank 1 alone counts up a version between two layers."""
    early.LEAST = 0
    mesh = gingham.init(mode="2d", size=4, timeout=10)
    model = stack()
    if rank == 1:
        calls: list[int] = []

        def write(*_: Any) -> None:
            calls.append(1)
            if len(calls) == STEPS - 1:
                with torch.no_grad():
                    model[1].weight.mul_(1)

        model[0].register_forward_hook(write)
    try:
        passes(mesh, model)
    except (gingham.MeshError, gingham.ShapeError) as error:
        return str(error)
    return "nothing"


def within(rank: int) -> str:
    """Rank 1 alone sets a hook while a backward pass runs, when sums over depth are queued a layer late."""
    mesh = gingham.init(mode="2.5d", size=8, depth=2, timeout=10)
    model = stack()
    try:
        passes(mesh, model)
        y = model[:2](mesh.scatter(torch.ones(ROWS, WIDTH)))
        if rank == 1:
            y.register_hook(lambda _: model[1].weight.register_hook(lambda _: None) and None)
        model[2:](y).sum().backward()
    except (gingham.MeshError, gingham.ShapeError, gingham.PeerStalled) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> dict[str, Any]:
    wrong, made = [], {}
    for options in MODES:
        for rank, found in enumerate(gingham.spawn(all_cases, options["size"], options)):
            for case, same_bytes in CASES.items():
                if (case.__name__, 0) not in found:
                    continue
                one, other = found[case.__name__, 0], found[case.__name__, sys.maxsize]
                same = len(one[0]) == len(other[0]) and all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
                bytes_of = [{axis: count["bytes_received"] for axis, count in each[1].items()} for each in (one, other)]
                same = same and (case is not hooked or all(map(torch.equal, one[0], found["plain", 0][0])))
                if not same or (same_bytes and bytes_of[0] != bytes_of[1]) or other[2]["begun"]:
                    wrong.append(f"{options} rank {rank} {case.__name__}: bits {same}, bytes {bytes_of}, without it {other[2]}")
                if rank == 0:
                    made[f"{case.__name__} {options.get('mode', options.get('grid'))}"] = one[2]
    return {"wrong": wrong[:5], "made": made, "alone": gingham.spawn(alone, 4), "within": gingham.spawn(within, 8)}


if __name__ == "__main__":
    print(json.dumps(main()))
