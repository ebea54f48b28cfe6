"""Parameters that a model's own code reads by name, used by the training code outside of the model's calls, and full_tensor() inside of
them: gradients are those of one process, in float64, also where a function of a checkpoint runs again in the backward pass."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import families
from grids import relative, whole

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "1d": (4, dict(mode="1d", size=4)),
    "2d": (4, dict(mode="2d", size=4)),
    "2.5d": (8, dict(mode="2.5d", size=8, depth=2)),
    "3d": (8, dict(mode="3d", size=8)),
    "data": (8, dict(parallel=dict(data=2, tensor=dict(size=4, mode="2d")))),
}


def full(p: torch.Tensor) -> torch.Tensor:
    """As a helper function of a user's may read a weight, which no scan of the model's code sees."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 1.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Pair(nn.Module):
    """As CLIP: the logits are made outside. `how`: the kind of checkpoint inside of the forward."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        self.image, self.text, self.table = nn.Linear(6, 8), nn.Linear(5, 8), nn.Embedding(3, 8)
        self.logit_scale, self.gate, self.w = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(8)), nn.Parameter(torch.randn(4, 8))
        self.scaled = Scaled()

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        head = F.linear(self.image(x), full(self.image.weight).T[:, :8], full(self.image.bias)[:6])
        return self.scaled(self.image(head) * self.gate.exp())

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = checkpoint(self.inner, a, use_reentrant=self.how == "reentrant") if self.how else self.inner(a)
        y = self.text(b) * self.logit_scale + self.table.weight.sum(0)
        return F.normalize(x + F.linear(x, self.w) @ self.w, dim=-1), F.normalize(y, dim=-1)


def criterion(model: Any, a: torch.Tensor, b: torch.Tensor, how: str) -> torch.Tensor:
    a = a.clone().requires_grad_()  # a reentrant checkpoint asks for it
    x, y = model(a, b)

    def logits(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model.logit_scale.exp() * x @ y.T + (x @ model.w.T).mean() + (y.detach() @ model.w.T).square().mean()

    z = checkpoint(logits, x, y, use_reentrant=how == "reentrant") if how else logits(x, y)
    loss = F.cross_entropy(z, torch.arange(len(a)))
    penalty = 0.1 * model.gate.square().sum() + model.scaled.scale.norm() + full(model.image.weight).square().mean()
    return loss + penalty + model.scaled(x).square().mean() + (F.linear(x, full(model.table.weight)) ** 2).mean()


def trained(rank: int, options: dict[str, Any], how: str) -> dict[str, Any]:
    import gingham

    torch.set_default_dtype(torch.float64)
    try:
        mesh = gingham.init(**options)
        torch.manual_seed(0)
        original = Pair()
        model = gingham.parallelize(copy.deepcopy(original), mesh)
        model.how = how
        sizes = [7, 5][: mesh.data.size]
        a, b = torch.randn(sum(sizes), 6), torch.randn(sum(sizes), 5)
        parts = list(zip(a.split(sizes), b.split(sizes), strict=True))
        loss = criterion(model, *parts[mesh.data.rank], how)
        loss.backward()
        serial = sum(criterion(original, *part, "") * len(part[0]) for part in parts) / len(a)
        serial.backward()
        expected = dict(original.named_parameters())
        # of what every rank has whole, each compares its own
        return {name: relative(whole(p.grad), expected[name].grad) for name, p in model.named_parameters()}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("how", ["", "reentrant", "other"])
@pytest.mark.parametrize("name", list(MESHES))
def test_gradients_of_what_is_used_outside_are_the_serial_ones(ranks, name: str, how: str) -> None:
    size, options = MESHES[name]
    for found in ranks(size)(trained, options, how):
        assert max(found.values()) <= 1e-9, {key: value for key, value in found.items() if value > 1e-9}


def as_parameters(rank: int) -> dict[str, Any]:
    """What a user does with such a parameter, on a converted model and on one that is not."""
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    original = Pair()
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    a, b = torch.randn(7, 6), torch.randn(7, 5)
    found: dict[str, Any] = {}
    for kind, each in (("ours", model), ("copy", copy.deepcopy(model)), ("serial", original)):
        seen = []
        each.gate.register_hook(lambda g, seen=seen: seen.append(float(whole(g).sum())))
        optimizer = torch.optim.AdamW([each.gate, each.scaled.scale, each.table.weight], lr=0.1)
        each.w.requires_grad_(False)
        each.gate.data = torch.full((8,), 0.5)
        facts = [each.gate.is_leaf, isinstance(each.gate, nn.Parameter), any(each.gate is p for p in each.parameters())]
        facts += [each.get_parameter("gate") is each.gate, each.w.requires_grad, each.gate.grad is None]
        x, y = each(a, b)
        (x.square()[:, :3].sum() + y[:, 0].sum()).backward()
        facts += [each.gate.grad is not None, each.w.grad is None]
        numbers = [seen[0], float(whole(each.gate.grad).sum())]
        optimizer.step()
        with torch.no_grad():
            each.logit_scale -= 0.25
            each.gate -= 0.1 * each.gate.grad
            z = each.logit_scale.exp() * x @ y.T + F.linear(x, each.scaled.scale[None]) + torch.einsum("bd,kd->bk", y, each.w)[:, :1]
            numbers += [float(z.sum()), float((x > each.gate).sum()), float((torch.mul(x, each.gate)).sum())]
        numbers += [float(whole(p.detach()).sum()) for p in each.parameters()]
        each.gate.grad = None
        facts += [each.gate.grad is None, dict(each.named_parameters())["gate"].grad is None]
        x, y = each(a, b)
        found[kind] = (facts, [*numbers, float(x.square()[:, 0].sum()), float(y[:, 0].sum())])
    return found


def test_outside_the_attribute_is_the_parameter(ranks) -> None:
    for found in ranks(4)(as_parameters):
        assert found["ours"][0] == found["copy"][0] == found["serial"][0]
        for kind in ("ours", "copy"):
            torch.testing.assert_close(torch.tensor(found[kind][1]), torch.tensor(found["serial"][1]), rtol=1e-4, atol=1e-4)


def refused(rank: int) -> dict[str, str]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    model = gingham.parallelize(Pair(), mesh)
    x, _ = model(torch.randn(7, 6), torch.randn(7, 5))
    llama = gingham.parallelize(families.build("llama"), mesh)
    layer = llama.model.layers[0]
    layer.mlp.register_forward_hook(lambda module, args, y: y * layer.mlp.up_proj.weight.full_tensor().mean())
    found = {}
    for name, call in {"linear": lambda: F.linear(x, model.w), "cut": lambda: llama(**families.batch("llama"))}.items():
        try:
            found[name] = f"nothing was raised: {call()}"
        except gingham.MeshError as error:
            found[name] = str(error)
    return found


def test_what_has_no_right_gradient_is_refused(ranks) -> None:
    for rank, found in enumerate(ranks(4)(refused)):
        assert f"rank {rank} got a plain tensor (7, 8) beside" in found["linear"] and "w.full_tensor()" in found["linear"], found["linear"]
        assert f"full_tensor: rank {rank} got" in found["cut"] and "outside of the model, or .detach()" in found["cut"], found["cut"]


def local(rank: int) -> float:
    import gingham

    torch.set_default_dtype(torch.float64)
    try:
        mesh = gingham.init(mode="2d", size=4)
        torch.manual_seed(0)
        original = Pair()
        model = gingham.parallelize(copy.deepcopy(original), mesh, io="local")
        a, b = torch.randn(7, 6), torch.randn(7, 5)
        for each, x, y in ((model, mesh.scatter(a, "rows"), mesh.scatter(b, "rows")), (original, a, b)):
            (each.logit_scale.exp() * each(x, y)[0][:, :2]).square().sum().backward()
        expected = dict(original.named_parameters())
        return max(relative(whole(p.grad), expected[name].grad) for name, p in model.named_parameters() if p.grad is not None)
    finally:
        torch.set_default_dtype(torch.float32)


def test_local_tensors_meet_blocks_everywhere(ranks) -> None:
    assert max(ranks(4)(local)) <= 1e-9


def compiled(rank: int) -> dict[str, Any]:
    """A step in one graph, and a weight that a helper function reads, where a graph tells nothing of rows."""
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), Scaled())
    model = gingham.parallelize(copy.deepcopy(original), mesh)
    x = torch.randn(8, 6)

    def step(each: Any) -> torch.Tensor:
        return (each(x) * each[2].scale.exp()).square().sum() + each[2].scale.square().sum()

    torch.compile(lambda: step(model), backend="aot_eager", fullgraph=True)().backward()
    step(original).backward()
    found: dict[str, Any] = {"gradient": relative(whole(model[2].scale.grad), original[2].scale.grad)}
    weight = model[0].weight
    try:
        found["helper"] = f"nothing was raised: {torch.compile(lambda: (model(x) @ weight.full_tensor()).sum(), backend='aot_eager')()}"
    except Exception as error:
        found["helper"] = str(error)
    return found


def test_outside_of_a_call_in_a_compiled_step(ranks) -> None:
    for found in ranks(4)(compiled):
        assert found["gradient"] <= 2e-6, found
        assert "in code of torch.compile" in found["helper"], found["helper"]


class Split(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(self.body(x))

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(h))


def called_alone(rank: int, options: dict[str, Any]) -> tuple[str, float, float]:
    """What a layer of a converted model says that is called by itself; the error of its output without gradients, and that of the
    gradient by a method of the model."""
    import gingham

    mesh = gingham.init(**options)
    serial = Split().double()
    model = gingham.parallelize(copy.deepcopy(serial), mesh)
    h = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    said = ""
    try:
        model.head(h)
    except gingham.MeshError as error:
        said = str(error)
    with torch.no_grad():
        error = float((model.head(h) - serial.head(h)).abs().max())
    for each in (model, serial):
        each.logits(h).square().sum().backward()
    return said, error, float((model.head.weight.grad.full_tensor() - serial.head.weight.grad).abs().max())


@pytest.mark.parametrize("options", [{"mode": "2d", "size": 4}, {"mode": "3d", "size": 8}, {"mode": "1d", "size": 4}], ids=str)
def test_a_layer_called_alone_is_refused_where_its_gradient_would_be_counted_often(ranks: Any, options: dict[str, Any]) -> None:
    for rank, (said, output, gradient) in enumerate(ranks(options["size"])(called_alone, options)):
        assert output < 1e-12 and gradient < 1e-12
        assert said.startswith(f"head (Linear(8, 3)): rank {rank} got a call from outside") or options["mode"] == "1d" and not said, said
