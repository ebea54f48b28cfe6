"""torch's own functions applied to parameters of layers: one process's result, or an error that names the parameter (A14, C4, C5)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, prune

import gingham
from gingham import nn

ROWS, WIDTH = 6, 8
FULL = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH) / 20 - 1
IDS = torch.tensor([0, 1])

RIGHT: dict[str, Callable[[Any], Any]] = {
    "where": lambda w: torch.where(w > 0, w, FULL),
    "where of a plain condition": lambda w: torch.where(FULL > 0, w, 0.0),
    "add": lambda w: torch.add(FULL, w, alpha=2),
    "compare": lambda w: (w < FULL).float(),
    "equal": lambda w: torch.tensor([torch.equal(w, FULL), torch.equal(w, whole(w)), torch.allclose(whole(w), w)]),
    "a mask": lambda w: w[FULL > 0],
    "mse_loss": lambda w: F.mse_loss(w, FULL),
    "mse_loss of two": lambda w: F.mse_loss(w, w.detach() * 2),
    "smooth_l1_loss": lambda w: F.smooth_l1_loss(w, FULL),
    "bce": lambda w: F.binary_cross_entropy_with_logits(w, FULL.sigmoid()),
    "cosine": lambda w: F.cosine_similarity(w, FULL),
    "moving average": lambda w: FULL.clone().mul_(0.9).add_(w.detach(), alpha=0.1),
    "copy": lambda w: FULL.clone().copy_(w.detach()),
    "unique": lambda w: torch.unique(w.detach().mul(3).round()),
    "rows": lambda w: torch.stack(list(w)),
    "nuclear norm": lambda w: torch.linalg.matrix_norm(w, "nuc"),
    "max": lambda w: w.max(),
    "amin": lambda w: w.amin(0),
    "argmax": lambda w: w.argmax().float(),
    "multinomial": lambda w: torch.manual_seed(3) and torch.multinomial(w.detach().abs(), 3).float(),
}
REFUSED: dict[str, Callable[[Any], Any]] = {
    "linear": lambda layer: F.linear(torch.ones(4, WIDTH), layer.weight),
    "linear with a bias": lambda layer: F.linear(torch.ones(4, WIDTH), layer.weight, layer.bias),
    "matmul": lambda layer: torch.matmul(torch.ones(4, WIDTH), layer.weight.T),
    "einsum": lambda layer: torch.einsum("bi,oi->bo", torch.ones(4, WIDTH), layer.weight),
    "cat": lambda layer: torch.cat([layer.weight, torch.zeros(1, WIDTH)]),
    "embedding": lambda layer: F.embedding(IDS, layer.weight),
    "index": lambda layer: layer.weight[IDS],
    "layer_norm": lambda layer: F.layer_norm(torch.ones(4, ROWS), (ROWS,), layer.bias),
    "conv1d": lambda layer: F.conv1d(torch.ones(4, WIDTH, 3), layer.weight.unsqueeze(-1)),
    "where with a gradient": lambda layer: torch.where(layer.weight > 0, layer.weight, torch.ones(ROWS, WIDTH, requires_grad=True)),
    "tolist": lambda layer: layer.weight.tolist(),
}


def whole(w: Any) -> torch.Tensor:
    return w.full_tensor() if isinstance(w, torch.distributed.tensor.DTensor) else w


def twins(make: Callable[[Any], torch.nn.Module]) -> tuple[Any, Any]:
    made = []
    for kind in (nn, torch.nn):
        torch.manual_seed(0)
        made.append(make(kind))
    return made[0], made[1]


def functions(rank: int, options: dict[str, Any]) -> dict[str, float]:
    """The largest difference of results and gradients."""
    gingham.init(**options)
    errors = {}
    for name, function in RIGHT.items():
        found: list[list[torch.Tensor]] = []
        for layer in twins(lambda kind: kind.Linear(WIDTH, ROWS)):
            result = function(layer.weight)
            gradient = torch.autograd.grad(result.square().sum(), layer.weight) if result.requires_grad else ()
            found.append([whole(each).detach().double() for each in (result, *gradient)])
        errors[name] = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    return errors


@pytest.mark.parametrize("options", [{"mode": "2d", "size": 4}, {"grid": (1, 1, 3)}, {"mode": "1d", "size": 4}])
def test_c5_torchs_functions_of_a_parameter_give_one_processs_result(ranks, options: dict[str, Any]) -> None:
    for errors in ranks(3 if "grid" in options else 4)(functions, options):
        assert max(errors.values()) < 1e-4, {name: error for name, error in errors.items() if error >= 1e-4}


def named(rank: int) -> dict[str, str]:
    mesh = gingham.init(mode="2d", size=4)
    model = torch.nn.Sequential(torch.nn.Sequential(nn.Linear(WIDTH, ROWS)))
    words = {}
    for name, function in REFUSED.items():
        try:
            function(model[0][0])
            words[name] = "nothing"
        except gingham.MeshError as error:
            words[name] = str(error)
    try:
        F.linear(mesh.scatter(torch.ones(4, WIDTH)), model[0][0].weight)
    except gingham.LayoutError as error:
        words["linear of a block"] = str(error)
    return words


def test_c5_what_nobody_can_tell_is_refused_with_the_parameters_name(ranks) -> None:
    for rank, words in enumerate(ranks(4)(named)):
        assert len(words) == len(REFUSED) + 1
        for name, text in words.items():
            assert "the parameter 0.0.weight (6, 8) cut dim 0 over col, dim 1 over row" in text or "0.0.bias (6,)" in text, (name, text)
            assert "full_tensor()" in text and (f"rank {rank}" in text or name == "tolist"), (name, text)


def reshaped(rank: int) -> dict[str, float]:
    """Pruned and orthogonal layers after a step, beside one process."""
    mesh = gingham.init(mode="2d", size=4)
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    changes: dict[str, Callable[[Any], Any]] = {
        "l1": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        "l1, twice": lambda layer: [prune.l1_unstructured(layer, "weight", amount) for amount in (0.3, 0.2)],
        "random": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
        "rows": lambda layer: prune.ln_structured(layer, "weight", 0.3, 2, 0),
        "global": lambda layer: prune.global_unstructured([(layer, "weight"), (layer, "bias")], prune.L1Unstructured, amount=0.3),
        "matrix_exp": lambda layer: parametrizations.orthogonal(layer),
        "householder": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder", use_trivialization=False),
    }
    errors = {}
    for name, change in changes.items():
        found = []
        for layer in twins(lambda kind: kind.Linear(WIDTH, ROWS)):
            ours = isinstance(layer, nn.layer.Layer)
            torch.manual_seed(2)
            change(layer)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            for _ in range(2):
                y = mesh.gather(layer(mesh.scatter(x))) if ours else layer(x)
                optimizer.zero_grad()
                y.square().sum().backward()
                optimizer.step()
            found.append(y.detach())
        errors[name] = float((found[0] - found[1]).abs().max())
    return errors


def test_c5_pruned_and_orthogonal_layers_train_as_in_one_process(ranks) -> None:
    for errors in ranks(4)(reshaped):
        assert max(errors.values()) < 1e-4, errors


def test_c5_parts_of_a_view_are_written_or_refused(ranks) -> None:
    def written(rank: int) -> list[Any]:
        gingham.init(mode="2d", size=4)
        mask = torch.ones_like(nn.Linear(WIDTH, ROWS).weight.detach())
        mask.view(-1)[torch.tensor([3, 5, 40])] = 0
        mask.flatten()[47] = 0
        with pytest.raises(gingham.MeshError, match="changed unbind"):
            torch.unbind(mask)[0].zero_()
        return (whole(mask).flatten() == 0).nonzero().flatten().tolist()

    assert all(found == [3, 5, 40, 47] for found in ranks(4)(written))


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("AdamW", dict(fused=True, amsgrad=True)),
    ("AdamW", dict(foreach=True)),
    ("SGD", dict(momentum=0.9, weight_decay=0.1, nesterov=True)),
    ("SGD", dict(momentum=0.9, fused=True)),
    ("Adagrad", dict(fused=True)),
    ("RMSprop", dict(centered=True)),
    ("NAdam", {}),
    ("RAdam", dict(foreach=True)),
    ("Adamax", {}),
    ("Adadelta", {}),
    ("ASGD", {}),
]


def test_c5_steps_of_optimizers_are_made_on_the_blocks(ranks) -> None:
    """Of a layer whose blocks are uneven: one process's numbers, without torch's rules, and without a message."""

    def trained(rank: int) -> list[float]:
        mesh = gingham.init(mode="2d", size=4)
        searched: list[Any] = []
        dispatcher = torch.distributed.tensor.DTensor._op_dispatcher
        search = dispatcher._propagate_op_sharding_dispatch_slow_path
        errors = []
        for name, options in OPTIMIZERS:
            torch.manual_seed(0)
            layer = nn.Linear(WIDTH + 1, ROWS + 2)
            torch.manual_seed(0)
            serial = torch.nn.Linear(WIDTH + 1, ROWS + 2)
            mine, theirs = (getattr(torch.optim, name)(each.parameters(), lr=0.01, **options) for each in (layer, serial))
            for step in range(3):
                x = torch.randn(4, WIDTH + 1, generator=torch.Generator().manual_seed(step))
                mesh.gather(layer(mesh.scatter(x))).square().sum().backward()
                serial(x).square().sum().backward()
                mesh.traffic(reset=True)
                if step:
                    dispatcher._propagate_op_sharding_dispatch_slow_path = lambda *args: searched.append(args[0]) or search(*args)
                mine.step()
                dispatcher._propagate_op_sharding_dispatch_slow_path = search
                assert not any(count["messages"] for count in mesh.traffic().values())
                theirs.step()
            errors += [(p.full_tensor() - q).abs().max().item() for p, q in zip(layer.parameters(), serial.parameters(), strict=True)]
        assert searched == []
        return errors

    assert max(max(each) for each in ranks(4)(trained)) < 1e-5


def test_c5_a_step_that_raises_leaves_the_errors_of_mixtures(ranks) -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("no step")

    def mixed(rank: int) -> None:
        gingham.init(mode="2d", size=4)
        layer = nn.Linear(WIDTH, WIDTH)
        with pytest.raises(RuntimeError, match="no step"):
            Broken(layer.parameters(), 0.1).step()
        with pytest.raises(gingham.MeshError, match="got a plain tensor"):
            torch.add(layer.weight, FULL[0])

    ranks(4)(mixed)


def test_c5_operands_that_lie_otherwise_go_by_torchs_rules(ranks) -> None:
    def made(rank: int) -> list[float]:
        gingham.init(mode="2d", size=4)
        full = torch.arange(float(WIDTH * ROWS)).view(ROWS, WIDTH) / 100
        torch.manual_seed(0)
        w = nn.Linear(WIDTH, ROWS).weight.detach()
        w.copy_(full)
        other = w.redistribute(placements=[torch.distributed.tensor.Replicate()] * 2)
        found = [
            w * other,
            w + w,
            w > w * 0.5,
            torch.where(w > 1, w, -w),
            w.exp().to(torch.float64),
            torch._foreach_sqrt([w])[0],
            w * w[:1],
        ]
        wanted = [
            full * full,
            full + full,
            full > full * 0.5,
            torch.where(full > 1, full, -full),
            full.exp().double(),
            full.sqrt(),
            full * full[:1],
        ]
        return [(whole(one).double() - two.double()).abs().max().item() for one, two in zip(found, wanted, strict=True)]

    assert max(max(each) for each in ranks(4)(made)) < 1e-6


def test_c5_numbers_of_ranks_are_added_into_plain_numbers(ranks) -> None:
    """As optimizers written by hand do that scale by the norm of all gradients. Where that would lose a gradient, an error says so."""

    def made(rank: int) -> tuple[list[float], list[float], str]:
        gingham.init(mode="2d", size=4)
        w = nn.Linear(WIDTH, ROWS).weight
        w.detach().copy_(FULL)
        found = []
        for each in (w.detach(), FULL):
            one, number, several = torch.zeros(1), torch.zeros(()), torch.zeros(3)
            for _ in range(2):
                one.add_(each.pow(2).sum())
                number += each.norm()
            several[1] = each.norm()
            several[2].lerp_(each.mean(), 0.5)
            changed = torch.ones(1, 1).mul_(each.abs().max())
            found.append([*torch.cat([one, number.view(1), several, changed.view(1), torch.ones(1).fill_(each.sum())]).tolist()])
        with pytest.raises(gingham.MeshError) as caught:
            torch.zeros(1).add_(w.square().sum())
        (torch.zeros(1).add_(w.square().sum().full_tensor())).backward()
        assert torch.allclose(whole(w.grad), 2 * FULL)
        return found[0], found[1], str(caught.value)

    for rank, (got, wanted, said) in enumerate(ranks(4)(made)):
        assert got == pytest.approx(wanted, rel=1e-5), (got, wanted)
        assert said.startswith(f"add_: rank {rank} writes a DTensor () ") and "expected a new tensor, total = total + x" in said, said
