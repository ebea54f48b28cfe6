"""Training tools on a mesh beside serial torch: autocast, GradScaler, no_sync, recomputed models, repeatable runs, clipping."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gingham
import theory
from gingham import nn
from gingham.autograd.relayout import relayout
from gingham.commands import gpt
from grids import GRIDS, grids, ranks_of, relative, whole


class Stack(torch.nn.Module):
    """Linears and norms; `kit` is gingham.nn or torch.nn."""

    def __init__(self, kit: Any) -> None:
        super().__init__()
        self.one, self.norm, self.two = kit.Linear(24, 48), kit.LayerNorm(48), kit.Linear(48, 24)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.one(x)
        z = self.norm(y)
        with torch.autocast("cpu", enabled=False):
            last = self.two(z.to(self.two.weight.dtype))
        return [y, z, self.two(z), last]


def autocast(rank: int, options: dict[str, Any], dtype: torch.dtype) -> tuple[list[Any], list[Any], list[tuple[float, float]]]:
    """Dtypes of ours and torch's; for results and gradients our error and torch's own, against float64."""
    mesh = gingham.init(**options)
    stacks = []
    for kit in (nn, torch.nn, torch.nn):
        torch.manual_seed(0)
        stacks.append(Stack(kit))
    full = torch.randn(24, 24)
    dtypes, values = [], []
    for index, stack in enumerate(stacks):
        exact = index == 2
        stack = stack.double() if exact else stack
        x = (full.double() if exact else full.clone()).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=not exact):
            found = stack(x if index else mesh.scatter(x))
            target = torch.arange(24) % 24
            logits = (found[2].double() if exact else found[2]).contiguous()
            loss = torch.nn.functional.cross_entropy(logits, target) if index else nn.cross_entropy(logits, mesh.scatter(target))
        loss.backward()
        dtypes.append([*(y.dtype for y in found), loss.dtype, x.grad.dtype, *(p.grad.dtype for p in stack.parameters())])
        outputs = found if index else [mesh.gather(y) for y in found]
        values.append([*outputs, loss, x.grad, *(whole(p.grad) for p in stack.parameters())])
    return dtypes[0], dtypes[1], [(relative(a, c), relative(b, c)) for a, b, c in zip(*values, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@grids("2.5d")
def test_autocast_has_the_dtypes_and_the_accuracy_of_serial(ranks, name: str, dtype: torch.dtype) -> None:
    for ours, theirs, errors in ranks(ranks_of(name))(autocast, GRIDS[name], dtype):
        assert ours == theirs
        assert all(error <= 1.5 * serial + 1e-5 for error, serial in errors), errors


def converted(rank: int, options: dict[str, Any]) -> tuple[list[torch.dtype], list[torch.dtype], set[torch.dtype]]:
    """Dtypes of a linear's output, of the model's and of all gradients; the first two of the original too."""
    mesh = gingham.init(**options)
    model = torch.nn.TransformerEncoderLayer(24, 12, 48, dropout=0.0, batch_first=True)
    found: list[list[torch.dtype]] = []
    for make in (lambda model: model, lambda model: gingham.parallelize(model, mesh)):
        made, seen = make(model), []
        handle = made.linear1.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            y = made(torch.ones(8, 4, 24))
        handle.remove()
        found.append([*seen, y.dtype])
    y.float().sum().backward()
    return found[0], found[1], {parameter.grad.dtype for parameter in made.parameters()}


def test_autocast_of_a_converted_model(ranks) -> None:
    for theirs, ours, gradients in ranks(4)(converted, GRIDS["2d"]):
        assert theirs == ours and ours[0] == torch.bfloat16 and gradients == {torch.float32}


def scaled(rank: int, fused: bool) -> list[tuple[bool, float, bool]]:
    """Per step: whether the weights moved, the scale after it, whether the plain parameter moved; step 1 has an inf on rank 2."""
    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    layer, plain = nn.Linear(8, 8), torch.nn.Parameter(torch.ones(3))
    groups = [{"params": list(layer.parameters())}, {"params": [plain]}]
    optimizer, scaler = torch.optim.AdamW(groups, lr=1e-2, fused=fused), gingham.GradScaler(init_scale=64.0, growth_interval=100)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y = layer(mesh.scatter(torch.ones(4, 8)))
        scaler.scale(mesh.gather(y).float().sum() + plain.sum()).backward()
        if step == 1 and rank == 2:
            layer.weight.grad.to_local()[0, 0] = torch.inf
        before = [layer.weight.to_local().clone(), plain.detach().clone()]
        scaler.step(optimizer)
        scaler.update()
        found.append((not torch.equal(before[0], layer.weight.to_local()), scaler.get_scale(), not torch.equal(before[1], plain)))
    return found


@pytest.mark.parametrize("fused", [False, True])
def test_an_infinity_on_one_rank_skips_the_step_on_all(ranks, fused: bool) -> None:
    assert ranks(4)(scaled, fused) == [[(True, 64.0, True), (False, 32.0, False), (True, 32.0, True)]] * 4


MICRO = 3


def accumulated(rank: int, options: dict[str, Any]) -> tuple[float, dict[str, int], dict[str, int], bool]:
    """Error against the large batch in float64, bytes received with no_sync and without, whether clipping refused parts."""
    mesh = gingham.init(**options)
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.Linear(24, 48, bias=False), nn.LayerNorm(48), nn.Linear(48, 24, bias=False))
    torch.manual_seed(0)
    serial = torch.nn.Sequential(torch.nn.Linear(24, 48, bias=False), torch.nn.LayerNorm(48), torch.nn.Linear(48, 24, bias=False)).double()
    full = torch.randn(MICRO, 24, 24)
    serial(full.double().flatten(0, 1)).pow(2).mean().backward()

    def step(index: int) -> None:
        # rows differ, so the mean over elements does not: every rank's y is a part
        (mesh.gather(model(mesh.scatter(full[index]))).pow(2).mean() / MICRO).backward()

    bytes_of = []
    for deferred in (False, True):
        model.zero_grad()
        mesh.traffic(reset=True)
        refused = not deferred
        if deferred:
            with gingham.no_sync(model):
                for index in range(MICRO - 1):
                    step(index)
            try:
                gingham.clip_grad_norm_(model.parameters(), 1.0)
            except gingham.MeshError:
                refused = True
            step(MICRO - 1)
        else:
            for index in range(MICRO):
                step(index)
        bytes_of.append({axis: counts["bytes_received"] for axis, counts in mesh.traffic(reset=True).items()})
    error = max(relative(whole(a.grad), b.grad) for a, b in zip(model.parameters(), serial.parameters(), strict=True))
    return error, bytes_of[1], bytes_of[0], refused


@grids("2.5d")
def test_no_sync_sums_once_and_equals_the_large_batch(ranks, name: str) -> None:
    answers = ranks(ranks_of(name))(accumulated, GRIDS[name])
    assert all(error <= 2e-6 and refused for error, *_, refused in answers), answers
    if name != "2.5d":
        return
    grid = theory.Grid.of(**GRIDS[name])
    linears = theory.linear(grid, 24, 24, 48, bias=False, products={"y", "dw"}) + theory.linear(grid, 24, 48, 24, bias=False)
    each = linears.bytes(4) + theory.layer_norm(grid, 24, 48)
    for axis in each.words:
        plain, deferred = (sum(answer[place][axis] for answer in answers) for place in (2, 1))
        times = 1 if axis in ("depth", "m") else MICRO  # depth: dW; m: gamma's and beta's gradients
        assert plain == MICRO * each.words[axis] and deferred == times * each.words[axis], axis


class Product(torch.nn.Module):
    """The product of two linears that share their input, back in the outer layout."""

    def __init__(self, mesh: Any, pair: list[nn.Linear]) -> None:
        super().__init__()
        self.mesh, self.pair = mesh, torch.nn.ModuleList(pair)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return relayout(self.pair[0](x) * self.pair[1](x), self.mesh, self.mesh.inner, self.mesh.outer, 24)


def recomputed(rank: int, options: dict[str, Any], reentrant: bool) -> list[float]:
    """GPT with a shared-input attention and a tied head: gradients with blocks recomputed, against those kept."""
    mesh = gingham.init(**options)
    ids = mesh.scatter(torch.randint(256, (8, 4), generator=torch.Generator().manual_seed(1)))
    found = []
    for again in (False, True):
        torch.manual_seed(2)
        model = gpt.GPT(gpt.parallel_kit(mesh), gpt.Shape(layers=2, width=24, heads=12, context=4, dropout=0.2)).double()
        pair = [nn.Linear(24, 24, layout="outer->inner", dtype=torch.float64) for _ in range(2)]
        nn.share_input(*pair)
        head = nn.Classifier(24, 256, tied=model.token)
        x = model.dropout(model.token(ids))
        parts = [*model.blocks, Product(mesh, pair)]
        for part in parts:
            x = checkpoint(part, x, use_reentrant=reentrant) if again else part(x)
        loss = nn.cross_entropy(head(x), ids, mesh=mesh, layout="inner")
        loss.backward()
        parameters = [*model.token.parameters(), *model.blocks.parameters(), *pair[0].parameters(), *pair[1].parameters()]
        found.append([loss.detach(), *(parameter.grad.to_local().clone() for parameter in parameters)])
    return [relative(one, other) for one, other in zip(*found, strict=True)]


@pytest.mark.parametrize("reentrant", [True, False])
@grids("2.5d")
def test_recomputed_blocks_give_the_same_gradients(ranks, name: str, reentrant: bool) -> None:
    for errors in ranks(ranks_of(name))(recomputed, GRIDS[name], reentrant):
        assert max(errors) <= 1e-12, errors


def trained(rank: int) -> list[torch.Tensor]:
    mesh = gingham.init(mode="2.5d", size=8, depth=2)
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(1)
        model = gpt.GPT(gpt.parallel_kit(mesh), gpt.Shape(layers=1, width=32, heads=4, context=8, dropout=0.1))
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), []
        for step in range(3):
            ids = mesh.scatter(torch.randint(256, (8, 8), generator=torch.Generator().manual_seed(step)))
            optimizer.zero_grad()
            loss = model.loss(model(ids), ids)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().clone())
        return [*losses, *(parameter.to_local().clone() for parameter in model.parameters())]
    finally:
        torch.use_deterministic_algorithms(False)


def test_training_repeats_bit_by_bit_under_deterministic_algorithms(ranks) -> None:
    first, second = ranks(8)(trained), ranks(8)(trained)
    assert all(torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True))


def clipped(rank: int, dtype: torch.dtype) -> tuple[float, float]:
    """Errors of norm and gradients with block and plain parameters together, after two accumulated passes."""
    mesh = gingham.init(mode="2.5d", size=8, depth=2)
    torch.manual_seed(3)
    layer, plain = nn.Linear(24, 24, dtype=dtype), torch.nn.Parameter(torch.linspace(-1, 1, 24, dtype=dtype))
    x = mesh.scatter(torch.randn(8, 24, dtype=dtype))
    for _ in range(2):
        (mesh.gather(layer(x)) * plain).float().pow(2).sum().backward()
    parameters = [*layer.parameters(), plain]
    before = [whole(parameter.grad).double().clone() for parameter in parameters]
    norm = torch.stack([gradient.norm() for gradient in before]).norm()
    got = gingham.clip_grad_norm_(parameters, 0.5)
    scale = 0.5 / (norm + 1e-6)
    return relative(got, norm), max(relative(whole(p.grad), gradient * scale) for p, gradient in zip(parameters, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_of_mixed_parameters(ranks, dtype: torch.dtype) -> None:
    limit = 1e-6 if dtype == torch.float32 else 2**-8
    assert all(norm <= 1e-6 and gradients <= limit for norm, gradients in ranks(8)(clipped, dtype))


def clipped_by_torch(rank: int, options: dict[str, Any], norm_type: float) -> tuple[list[float], str]:
    """Errors of torch's own clip_grad_norm_, of its norm, of gradients, and of the norm that ours finds then; what it says of parts."""
    mesh = gingham.init(**options)
    models: list[Any] = []
    for kit in (nn, torch.nn):
        torch.manual_seed(0)
        models.append(torch.nn.Sequential(kit.Linear(7, 11), torch.nn.GELU(), kit.LayerNorm(11), kit.Linear(11, 5)).double())
    full = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mesh.gather(models[0](mesh.scatter(full))).square().sum().backward()
    models[1](full).square().sum().backward()
    ours, serial = (torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type) for model in models)
    pairs = [(mine.grad.full_tensor(), theirs.grad) for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True)]
    after = gingham.clip_grad_norm_(models[0].parameters(), 1.0, norm_type)
    errors = [
        relative(whole(ours), serial),
        max(relative(*pair) for pair in pairs),
        abs(after.item() - 0.1) if after.dtype == serial.dtype else 1.0,
    ]
    models[0].zero_grad()
    with gingham.no_sync(models[0]):
        mesh.gather(models[0](mesh.scatter(full))).square().sum().backward()
    try:
        torch.nn.utils.clip_grad_norm_(models[0].parameters(), 0.1)
    except gingham.MeshError as error:
        return errors, str(error)
    return errors, ""


@pytest.mark.parametrize("norm_type", [2.0, torch.inf])
@pytest.mark.parametrize("options", [{"mode": "2.5d", "size": 8, "depth": 2}, {"mode": "3d", "size": 8}], ids=str)
def test_torchs_own_clipping(ranks, options: dict[str, Any], norm_type: float) -> None:
    for rank, (errors, said) in enumerate(ranks(8)(clipped_by_torch, options, norm_type)):
        assert max(errors) < 1e-5, errors
        assert said.startswith(f"torch.nn.utils.clip_grad_norm_: rank {rank} got gradients whose sums over ranks no_sync left out"), said


@pytest.mark.parametrize("kit", [nn, torch.nn], ids=["gingham.nn", "torch.nn"])
def test_torchs_own_norms_and_lbfgs_are_refused_in_a_pipeline(ranks, kit: Any) -> None:
    """Also of layers of torch's own in it, whose parameters are plain tensors. What needs no other stage goes on."""

    def said(rank: int) -> list[str]:
        mesh = gingham.init(parallel=dict(pipeline=2))
        model = gingham.pipeline(torch.nn.Sequential(kit.Embedding(8, 4), kit.Linear(4, 4), kit.Linear(4, 8)), mesh, 2)
        ids = torch.zeros(4, 3, dtype=torch.int64)
        model.step(ids, ids)
        found = []
        for ask, kind in (
            (lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), gingham.MeshError),
            (lambda: torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]), gingham.MeshError),
            (lambda: torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, torch.tensor(2.0)), gingham.MeshError),
            (lambda: torch.optim.LBFGS(model.parameters()).step(lambda: model.step(ids, ids)), NotImplementedError),
        ):
            with pytest.raises(kind) as caught:
                ask()
            found.append(str(caught.value))
        kept = [whole(p.grad).clone() for p in model.parameters()]
        gingham.clip_grad_norm_(model.parameters(), torch.inf)
        assert all(torch.equal(whole(p.grad), before) for p, before in zip(model.parameters(), kept, strict=True))
        torch.optim.AdamW(model.parameters()).step()
        own = torch.nn.Linear(4, 4)
        own(torch.ones(4)).sum().backward()
        assert float(torch.nn.utils.get_total_norm([p.grad for p in own.parameters()])) > 0
        torch.optim.LBFGS(own.parameters()).step(lambda: own(torch.ones(4)).square().sum())
        return found

    for rank, (*norms, lbfgs) in enumerate(ranks(2)(said)):
        for words in norms:
            assert f"rank {rank} got the gradients of one stage of a pipeline; expected gingham.clip_grad_norm_" in words
        assert lbfgs.startswith(f"LBFGS on a pipeline: rank {rank} has the parameters of one stage"), lbfgs
        assert "expected an optimizer that steps each parameter by itself, such as torch.optim.AdamW" in lbfgs


def test_weight_norm_where_a_rank_has_no_rows(ranks) -> None:
    """torch's kernel ends a process that has nothing to divide by."""

    def error(rank: int) -> float:
        mesh = gingham.init("1d", size=4)
        models, losses = [], []
        for kit in (nn, torch.nn):
            torch.manual_seed(0)
            models.append(torch.nn.utils.parametrizations.weight_norm(kit.Linear(6, 9)))  # 3, 3, 3 and 0 rows
        full = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        for model, take, give in ((models[0], mesh.scatter, mesh.gather), (models[1], torch.clone, torch.clone)):
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            for _ in range(3):
                optimizer.zero_grad()
                loss = give(model(take(full))).square().sum()
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
        return abs(losses[0] / losses[1] - 1)

    assert max(ranks(4)(error)) < 1e-5
