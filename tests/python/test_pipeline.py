"""Pipelines: the numbers of one process that accumulates over the same micro-batches, in every schedule, on every mesh; what travels."""

from math import prod
from typing import Any

import pytest
import torch

import gingham
from gingham import native, nn
from gingham.autograd import later
from gingham.pipeline.orders import order, stages_of
from gingham.plan.pipeline import SCHEDULES, balance, border_words, bubble
from pipelines import SHAPE, Ringed, gpt, sample, sequential, tied

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "none": (1, dict(size=1)),
    "1d": (2, dict(size=2, mode="1d")),
    "1d sequence": (2, dict(size=2, mode="1d", sequence=True)),
    "2d": (4, dict(size=4, mode="2d")),
    "2.5d": (4, dict(size=4, mode="2.5d", depth=4)),
    "1x2x2": (4, dict(grid=(1, 2, 2))),
    "2x1x1": (2, dict(grid=(2, 1, 1))),
    "sequence": (2, dict(size=2, mode="sequence")),
}
QUICK = {("none", 1, "zbv"), ("1d", 2, "1f1b"), ("1d sequence", 1, "dual"), ("2d", 1, "zero_bubble"), ("2.5d", 1, "interleaved")}
CASES = [
    pytest.param(name, data, shard, schedule, marks=[] if (name, data, schedule) in QUICK and shard is None else [pytest.mark.matrix])
    for name, (size, _) in MESHES.items()
    for data, shard in ((1, None), (2, None), (2, "all"), (2, "state"))
    for schedule in SCHEDULES
    if 2 * size * data <= 12
]


def full(gradient: Any) -> torch.Tensor:
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def accumulated(model: Any, ids: torch.Tensor, targets: torch.Tensor, parts: list[tuple[int, int]] | int) -> torch.Tensor:
    """The serial step. parts: the number of micro-batches."""
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for x, target in zip(ids.tensor_split(parts), targets.tensor_split(parts), strict=True):
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), target.flatten(), reduction="sum") / (targets != -100).sum()
        loss.backward()
        total += loss.detach()
    return total


def trained(model: Any, step: Any, clip: Any, batch: int, steps: int, vocabulary: int) -> Any:
    optimizer, losses, norms = torch.optim.AdamW(model.parameters(), lr=1e-3), [], []
    gradients: dict[str, torch.Tensor] = {}
    for number in range(steps):
        ids, targets = sample(batch, number)
        ids, targets = ids % vocabulary, torch.where(targets < 0, targets, targets % vocabulary)
        optimizer.zero_grad()
        losses.append(step(ids, targets).item())
        gradients = gradients or {name: full(weight.grad) for name, weight in model.named_parameters()}
        norms.append(clip(model.parameters(), 1.0).item())
        optimizer.step()
    return losses, norms, gradients


def steps(rank: int, config: Any, schedule: str, parts: int, batch: int, make: Any, dtype: torch.dtype, count: int) -> Any:
    mesh = gingham.init(parallel=config, timeout=30.0)
    vocabulary = 256 if make is gpt else 64
    model = gingham.pipeline(make(mesh, dtype), mesh, parts, schedule)
    found = trained(model, model.step, gingham.clip_grad_norm_, batch, count, vocabulary)
    model.eval()
    ids, targets = sample(batch)
    ids, targets = ids % vocabulary, torch.where(targets < 0, targets, targets % vocabulary)
    return *found, model(ids), model.eval_step(ids, targets).item(), mesh.pipeline


def compare(answers: Any, parts: int, batch: int, make: Any, dtype: torch.dtype, count: int) -> None:
    """With one process, in float64; losses and norms are the same on every rank."""
    model, vocabulary = make(None, torch.float64), 256 if make is gpt else 64
    step = lambda ids, targets: accumulated(model, ids, targets, parts)  # noqa: E731
    losses, norms, gradients = trained(model, step, torch.nn.utils.clip_grad_norm_, batch, count, vocabulary)
    model.eval()
    logits = model(sample(batch)[0] % vocabulary).detach()
    wide, seen = dtype == torch.float64, set()
    for found, clipped, held, outputs, evaluated, _ in answers:
        assert found == answers[0][0] and clipped == answers[0][1] and evaluated == answers[0][4]
        assert found == pytest.approx(losses, rel=1e-12 if wide else 1e-5) and clipped == pytest.approx(norms, rel=1e-6 if wide else 1e-5)
        assert float((outputs - logits).abs().max() / logits.abs().max()) <= (1e-12 if wide else 1e-4)
        for name, gradient in held.items():
            # the key bias has no effect, so that its true gradient is 0: measured against the query bias's
            name = name if name in gradients else "table.weight"  # the head's is the same
            error = float((gradient - gradients[name]).norm() / gradients[name.replace(".k.bias", ".q.bias")].norm())
            assert error <= (1e-12 if wide else 2e-5), f"{name}: {error:.2e}"
        seen |= held.keys()
    assert seen >= gradients.keys()  # each is on some rank


@pytest.mark.parametrize(("name", "data", "shard", "schedule"), CASES)
def test_numbers_are_those_of_one_process(ranks, name: str, data: int, shard: str | None, schedule: str) -> None:
    size, tensor = MESHES[name]
    config = dict(pipeline=2, data=dict(size=data, shard=shard), tensor=tensor)
    answers = ranks(2 * size * data)(steps, config, schedule, 4, 9, gpt, torch.float64, 2)
    compare(answers, 4, 9, gpt, torch.float64, 2)
    assert [place.rank for *_, place in answers] == [rank // (size * data) for rank in range(2 * size * data)]


def tensor_size(config: Any) -> int:
    tensor = config.get("tensor", dict(size=1))
    return prod(tensor["grid"]) if "grid" in tensor else tensor["size"]


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        (dict(pipeline=2), "1f1b"),
        pytest.param(dict(pipeline=2), "dual", marks=pytest.mark.matrix),
        pytest.param(dict(pipeline=3, tensor=dict(size=2, mode="1d")), "gpipe", marks=pytest.mark.matrix),
        pytest.param(dict(pipeline=3, tensor=dict(size=4, mode="2d")), "zero_bubble", marks=pytest.mark.matrix),
        pytest.param(dict(pipeline=2, tensor=dict(size=4, mode="2.5d", depth=4)), "zero_bubble", marks=pytest.mark.matrix),
        pytest.param(dict(pipeline=2, tensor=dict(grid=(1, 2, 2))), "zbv", marks=pytest.mark.matrix),
        pytest.param(dict(tensor=dict(size=4, mode="2d")), "1f1b", marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_tied_tables_and_recomputed_blocks(ranks, config: Any, schedule: str) -> None:
    count = config.get("pipeline", 1) * tensor_size(config)
    parts = 6
    answers = ranks(count)(steps, config, schedule, parts, 7, tied, torch.float64, 2)
    compare(answers, parts, 7, tied, torch.float64, 2)


UNEVEN = [
    (make, config, schedule, parts, batch)
    for make in (tied, gpt)
    for config in (dict(pipeline=2, data=2), dict(pipeline=2, data=3), dict(pipeline=2, tensor=dict(size=2, mode="1d", sequence=True)))
    for schedule in ("interleaved", "zero_bubble", "1f1b")
    for parts, batch in ((3, 7), (4, 7), (4, 8))
    if schedule != "zero_bubble" or parts % 2 == 0
]
FEW = [(tied, dict(pipeline=2, data=2), "interleaved", 4, 7), (gpt, dict(pipeline=2, data=3), "zero_bubble", 4, 8)]


@pytest.mark.parametrize(
    ("make", "config", "schedule", "parts", "batch"),
    [pytest.param(*each, marks=[] if each in FEW else [pytest.mark.matrix]) for each in UNEVEN],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
def test_micro_batches_whose_rows_change_on_some_ranks_only(ranks, make: Any, config: Any, schedule: str, parts: int, batch: int) -> None:
    """Also to none; in passes forward, and where layers are computed again for another micro-batch than the last that came forward."""
    size = 2 * config.get("data", 1) * tensor_size(config)
    compare(ranks(size)(steps, config, schedule, parts, batch, make, torch.float64, 2), parts, batch, make, torch.float64, 2)


@pytest.mark.matrix
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_twenty_steps_in_float32(ranks, schedule: str) -> None:
    answers = ranks(4)(steps, dict(pipeline=2, tensor=dict(size=2, mode="1d")), schedule, 4, 8, gpt, torch.float32, 20)
    compare(answers, 4, 8, gpt, torch.float32, 20)


def ringed(rank: int, config: Any, way: dict[str, Any], schedule: str) -> Any:
    mesh = gingham.init(parallel=config, timeout=30.0)
    model = gingham.pipeline(Ringed(way), mesh, 2, schedule, dim=1, order=way.get("order"))
    found = trained(model, model.step, gingham.clip_grad_norm_, 3, 2, 64)
    model.eval()
    return found, model(sample(3)[0] % 64)


WAYS = [
    ("2d", dict(size=4, mode="2d"), dict(ring=True, order="zigzag"), "zero_bubble"),
    ("2x1x2", dict(grid=(2, 1, 2)), dict(ring="heads"), "1f1b"),
    ("2.5d", dict(size=4, mode="2.5d", depth=4), dict(ring=True), "interleaved"),
    ("3x1x1", dict(grid=(3, 1, 1)), dict(order="zigzag"), "gpipe"),
]


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "tensor", "way", "schedule"), WAYS, ids=str)
def test_attention_over_cut_sequences_inside_stages(ranks, name: str, tensor: Any, way: dict[str, Any], schedule: str) -> None:
    """With one rank's losses, norms, gradients and logits; 8 places do not divide by 3."""
    config = dict(pipeline=2, tensor=tensor)
    ((losses, norms, gradients), logits), seen = ranks(1)(ringed, {}, {}, "1f1b")[0], set()
    for (found, clipped, held), outputs in ranks(2 * tensor_size(config))(ringed, config, way, schedule):
        assert found == pytest.approx(losses, rel=1e-12) and clipped == pytest.approx(norms, rel=1e-10)
        assert float((outputs - logits).abs().max() / logits.abs().max()) <= 1e-12
        for key, gradient in held.items():
            against = gradients[key.replace(".k.bias", ".q.bias")].norm()
            assert float((gradient - gradients[key]).norm() / against) <= 1e-11, key
        seen |= held.keys()
    assert seen == gradients.keys()


def own_rows(rank: int, rows: tuple[int, ...]) -> Any:
    mesh = gingham.init(parallel=dict(pipeline=dict(size=2, schedule="zbv", microbatches=4), data=2), timeout=30.0)
    model = gingham.pipeline(gpt(mesh, torch.float64).eval(), mesh)
    ids, targets = sample(sum(rows))
    mine = [each.split(list(rows))[mesh.data.rank] for each in (ids, targets)]
    loss = model.step(*mine, own=True)
    drawn = sorted(mesh.sampler(range(10), seed=2))
    return loss.item(), {name: full(weight.grad) for name, weight in model.named_parameters()}, mesh.data.rank, drawn


def test_uneven_rows_of_data_ranks(ranks) -> None:
    answers = ranks(4)(own_rows, (5, 6))
    model = gpt(None, torch.float64).eval()
    loss = accumulated(model, *sample(11), 1)
    truth = {name: weight.grad for name, weight in model.named_parameters()}
    for found, gradients, data, drawn in answers:
        assert found == pytest.approx(loss.item(), rel=1e-12)
        assert drawn == next(other for *_, place, other in answers if place == data)
        for name, gradient in gradients.items():
            assert float((gradient - truth[name]).norm() / truth[name.replace(".k.bias", ".q.bias")].norm()) <= 1e-12, name


def counted(rank: int, config: Any, schedule: str) -> Any:
    """Of the first step and the second: products of inputs' and weights' gradients, and traffic by axis."""
    mesh = gingham.init(parallel=config, timeout=30.0)
    model = gingham.pipeline(gpt(mesh, torch.float32), mesh, 4, schedule)
    calls: list[str] = []
    backward, forward, make = native.Step.backward, native.Step.forward, later._make

    def counting(self: Any, x: Any, weights: Any, dys: Any, need_x: bool, need_w: bool, *rest: Any) -> Any:
        calls.extend("x" * need_x + "w" * need_w)
        return backward(self, x, weights, dys, need_x, need_w, *rest)

    native.Step.backward = counting  # type: ignore[method-assign]
    native.Step.forward = lambda self, *args, **named: (calls.append("y"), forward(self, *args, **named))[1]  # type: ignore[method-assign]
    later._make = lambda *args: (calls.append("later"), make(*args))[1]  # type: ignore[assignment]
    found = []
    try:
        for _ in range(2):
            calls.clear()
            mesh.traffic(reset=True)
            model.step(*sample(8))
            found.append(({kind: calls.count(kind) for kind in "xwy"}, mesh.traffic(), calls.count("later")))
    finally:
        native.Step.backward, native.Step.forward, later._make = backward, forward, make  # type: ignore[method-assign]
    return found


def summed(answers: Any, step: int) -> Any:
    """Of all ranks: products, and by axis bytes and messages but those of the pipeline."""
    products = {kind: sum(answer[step][0][kind] for answer in answers) for kind in "xwy"}
    axes = {axis for answer in answers for axis in answer[step][1] if axis != "pipeline"}
    return products, {
        axis: {key: sum(answer[step][1][axis][key] for answer in answers) for key in answers[0][step][1][axis]} for axis in axes
    }


@pytest.mark.parametrize("name", ["1d sequence", *(pytest.param(each, marks=pytest.mark.matrix) for each in ("1d", "2d", "2.5d", "1x2x2"))])
def test_every_schedule_makes_the_products_and_bytes_of_1f1b_also_in_its_first_step(ranks, name: str) -> None:
    size, tensor = MESHES[name]
    expected: Any = None
    for schedule in ("1f1b", *(each for each in SCHEDULES if each != "1f1b")):
        answers = ranks(2 * size)(counted, dict(pipeline=2, tensor=tensor), schedule)
        expected = expected or summed(answers, 0)
        assert summed(answers, 0) == summed(answers, 1) == expected, schedule
        halves = [answer[1][2] for answer in answers]
        # where k and n are both cut every linear gathers dY, once for both gradients
        splits = schedule in ("zero_bubble", "zbv", "dual") and name != "1x2x2"
        assert (sum(halves) > 0) == splits, (schedule, halves)
        block = 8 * SHAPE["context"] * SHAPE["width"]  # activations of the batch
        borders = [answer[1][1]["pipeline"] for answer in answers]
        for direction in ("bytes_received", "bytes_sent"):
            total = [sum(each[direction] for each in borders[place * size : (place + 1) * size]) for place in range(2)]
            copies = size if name == "1d" else 1  # whose activations are cut over nothing
            assert total == [4 * copies * border_words(block, place, 2, schedule, stages_of(schedule, None)) for place in range(2)], (
                schedule
            )


def idle(schedule: str, size: int, parts: int, stages: int) -> float:
    """Of a simulated step, in which forward, I and W take one unit each."""
    orders = [order(schedule, rank, size, parts, stages) for rank in range(size)]
    clock, done, at = [0] * size, {}, [0] * size
    while any(at[rank] < len(orders[rank]) for rank in range(size)):
        before = list(at)
        for rank, actions in enumerate(orders):
            while at[rank] < len(actions):
                each = actions[at[rank]]
                needed = [("F", each.stage, each.part)] * (each.kind in "BI")
                needed += [("F", each.stage - 1, each.part)] * (each.kind == "F" and each.stage > 0)
                needed += [("B", each.stage + 1, each.part)] * (each.kind in "BI" and each.stage < size * stages - 1)
                if any(need not in done for need in needed):
                    break
                clock[rank] = max([clock[rank], *(done[need] for need in needed)]) + (2 if each.kind == "B" else 1)
                done["B" if each.kind == "I" else each.kind, each.stage, each.part] = clock[rank]
                at[rank] += 1
        assert at != before, f"{schedule}: ranks wait for each other"
    return 1 - 3 * stages * parts / max(clock)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_orders_are_complete_and_idle_as_the_formula_says(schedule: str) -> None:
    stages = stages_of(schedule, None)
    for size, parts in ((2, 4), (2, 8), (3, 6), (4, 8), (4, 16)):
        assert idle(schedule, size, parts, stages) == pytest.approx(bubble(schedule, size, parts, stages))
        for rank in range(size):
            actions = order(schedule, rank, size, parts, stages)
            forward = [(each.stage, each.part) for each in actions if each.kind == "F"]
            assert sorted(forward) == sorted((each.stage, each.part) for each in actions if each.kind in "BI")
            assert len(forward) == len(set(forward)) == stages * parts
            for stage in {stage for stage, _ in forward}:  # the order in which dropout counts its calls
                assert [part for each, part in forward if each == stage] == list(range(parts))


def test_stages_are_balanced() -> None:
    assert balance([0, 4, 4, 4, 4, 1], 2) == [0, 3, 6] and balance([3, 1, 1, 1], 2) == [0, 1, 4] and balance([1.0], 1) == [0, 1]
    with pytest.raises(ValueError, match="2 parts cannot make 3 stages"):
        balance([1, 1], 3)


def scaled(rank: int) -> Any:
    """A Sequential of floats with a loss of the user's own, under a GradScaler; the second step has an infinity on one rank."""
    mesh = gingham.init(parallel=dict(pipeline=2, tensor=dict(size=2, mode="1d")), timeout=30.0)
    torch.manual_seed(2)
    x, target = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)

    def loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(mesh.gather(y), mesh.gather(target))

    model, scaler = gingham.pipeline(sequential(nn.Linear), mesh, 4, loss=loss), gingham.GradScaler("cpu", init_scale=8.0)
    optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
    for step in range(2):
        optimizer.zero_grad()
        value = model.step(x, target, scaler=scaler)
        if step == 1 and rank == 3:
            next(model.parameters()).grad.to_local().fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        found.append((value.item(), scaler.get_scale(), {name: full(weight.detach()) for name, weight in model.named_parameters()}))
    return found


def test_sequentials_losses_of_ones_own_and_scalers(ranks) -> None:
    answers = ranks(4)(scaled)
    model = sequential(torch.nn.Linear)
    torch.manual_seed(2)
    x, target = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    loss = torch.nn.functional.mse_loss(model(x), target)
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    for first, second in answers:
        assert first[0] == pytest.approx(loss.item(), rel=1e-12) and (first[1], second[1]) == (8.0, 4.0) and first[2]
        for name, weight in first[2].items():
            torch.testing.assert_close(weight, model.get_parameter(name).detach(), rtol=0, atol=1e-14)
            assert torch.equal(weight, second[2][name])  # a step that all have skipped
