"""The planner's hybrids of data, pipeline and tensor ranks beside what real steps count, hold and keep under way."""

import os
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch

import gingham
from gingham.commands.cli import main
from gingham.launch.auto import has_auto
from gingham.mesh.modes import axes_of
from gingham.pipeline.orders import order, stages_of
from gingham.plan import hybrids, pipeline, tables, workload
from gingham.plan.choose import Machine

SIZE = dict(layers=4, width=48, heads=24, batch=9, context=7)
# data ranks, their shard, pipeline ranks, their schedule, micro-batches, the tensor mesh
COUNTED: dict[int, list[tuple[int, str | None, int, str, int, dict[str, Any]]]] = {
    4: [
        (1, None, 2, "1f1b", 4, dict(mode="1d", size=2)),
        (2, "all", 2, "gpipe", 3, dict(mode=None, size=1)),
        (2, "state", 2, "zbv", 4, dict(mode=None, size=1)),
        (2, "state", 1, "1f1b", 1, dict(mode="1d", size=2)),
        (2, None, 1, "1f1b", 3, dict(mode="1d", size=2, sequence=True)),
        (1, None, 1, "1f1b", 4, dict(mode="2d", size=4)),
        (2, "all", 1, "1f1b", 1, dict(mode="sequence", size=2)),
    ],
    8: [
        (2, None, 2, "zero_bubble", 4, dict(mode="1d", size=2, sequence=True)),
        (2, "state", 2, "dual", 5, dict(mode="1d", size=2)),
        (2, None, 2, "1f1b", 4, dict(mode="sequence", size=2)),
        (1, None, 2, "zbv", 4, dict(mode="sequence", size=4, attention="heads")),
        (2, "all", 2, "interleaved", 4, dict(mode=None, size=2, grid=(1, 1, 2))),
        (1, None, 2, "1f1b", 4, dict(mode="2d", size=4)),
        (1, None, 2, "gpipe", 2, dict(mode="2.5d", size=4, depth=4)),
        (1, None, 2, "zbv", 4, dict(mode=None, size=4, grid=(2, 2, 1))),
        (2, "state", 1, "1f1b", 3, dict(mode="2d", size=4)),
        (2, "all", 1, "1f1b", 3, dict(mode="2.5d", size=4, depth=4, shard_depth=True)),
        (2, None, 1, "1f1b", 1, dict(mode="2.5d", size=4, depth=4)),
    ],
    6: [
        (2, "state", 3, "1f1b", 5, dict(mode=None, size=1)),
        (1, None, 3, "gpipe", 3, dict(mode="1d", size=2)),
        (3, None, 1, "1f1b", 2, dict(mode=None, size=2, grid=(1, 2, 1))),
        (2, None, 1, "1f1b", 1, dict(mode="sequence", size=3)),
        (2, "state", 1, "1f1b", 1, dict(mode="sequence", size=3, attention="heads")),
        (2, None, 1, "1f1b", 2, dict(mode="sequence", size=3, attention="gathered")),
    ],
    12: [(2, "all", 3, "1f1b", 4, dict(mode="1d", size=2)), (3, "state", 1, "1f1b", 2, dict(mode="2d", size=4))],
}
if os.environ.get("GINGHAM_DEVICE") == "cuda":  # plans count attention's ring as windows move it, which GPUs do not have
    COUNTED = {n: [each for each in cases if each[-1].get("mode") != "sequence" or "attention" in each[-1]] for n, cases in COUNTED.items()}
QUICK = 4


def one_step(rank: int, cases: list[Any], size: dict[str, int]) -> list[Any]:
    """What `steps` counts where no all-reduce is cut into pieces, as GPUs do with those of 8 MiB and more: plans count whole ones."""
    with mock.patch.dict(os.environ):
        os.environ.pop("GINGHAM_CHUNK_BYTES", None)  # set for tests over fake devices
        return steps(cases, size)


def steps(cases: list[Any], size: dict[str, int]) -> list[Any]:
    """By case: traffic by axis, bytes of parameters and of AdamW's moments, and the pipeline rank."""
    from gingham.commands.gpt import GPT, Shape, parallel_kit

    found = []
    for data, shard, stages, schedule, parts, tensor in cases:
        config = dict(data=dict(size=data, shard=shard), tensor=tensor)
        mesh = gingham.init(parallel=config | (dict(pipeline=stages) if stages > 1 else {}), timeout=30.0)
        torch.manual_seed(1)
        model: Any = GPT(parallel_kit(mesh), Shape(size["layers"], size["width"], size["heads"], size["context"], 0.0))
        ids = torch.zeros(size["batch"], size["context"], dtype=torch.int64)
        if stages > 1 or parts > 1:
            model = gingham.pipeline(model, mesh, parts, schedule)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        mesh.traffic(reset=True)
        if stages > 1 or parts > 1:
            model.step(ids, ids)
        else:
            model.loss(model(mesh.scatter(ids)), mesh.scatter(ids) if mesh.inner.rows else ids).backward()
        optimizer.step()
        held = sum(4 * parameter.to_local().numel() for parameter in model.parameters())
        states = sum(4 * state[kind].to_local().numel() for state in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq"))
        found.append((mesh.traffic(), held, states, mesh.pipeline.rank))
        gingham.destroy()
    return found


@pytest.mark.parametrize("ranks_used", [QUICK, *(pytest.param(each, marks=pytest.mark.matrix) for each in COUNTED if each != QUICK)])
def test_predicted_bytes_are_the_bytes_counted_in_a_run(ranks: Any, ranks_used: int) -> None:
    """To the byte, of all axes and of pipeline and data alone; messages and words held of the rank that has most."""
    answers = ranks(ranks_used)(one_step, COUNTED[ranks_used], SIZE)
    wrong = []
    for index, (data, shard, stages, schedule, parts, tensor) in enumerate(COUNTED[ranks_used]):
        case = data, shard, stages, schedule, parts, tensor
        planned = hybrids.hybrid_cost(workload.gpt(**SIZE), Machine(), tensor, data, shard, stages, schedule, parts)
        assert not planned.reason
        counted = [answer[index] for answer in answers]
        total = sum(axis["bytes_received"] for traffic, *_ in counted for axis in traffic.values())
        across = sum(traffic.get("pipeline", {"bytes_received": 0})["bytes_received"] for traffic, *_ in counted)
        messages = max(sum(axis["messages"] for axis in traffic.values()) for traffic, *_ in counted)
        held, states = (max(each[at] for each in counted if each[3] == planned.fullest) for at in (1, 2))
        got = sum(planned.received.values()), planned.received["pipeline"], sum(planned.messages.values()), planned.memory["states"]
        if got != (total, across, messages, states) or (shard != "state" and planned.memory["parameters"] != held):
            wrong.append((case, got, (total, across, messages, states), planned.memory, held))
        axes = axes_of(**tensor, data=data, shard=shard)
        # elsewhere groups of data and other axes together send over both, or tables are cut over data in place of tp
        if data > 1 and axes.m == axes.outer.rows == ("data",) and (shard != "all" or axes.size == data):
            apart = sum(traffic["data"]["bytes_received"] for traffic, *_ in counted)
            if planned.received["data"] != apart:
                wrong.append((case, "data", planned.received["data"], apart))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
def test_what_is_under_way_is_what_the_orders_hold(schedule: str) -> None:
    """Of (stage, micro-batch) pairs, at most; and which numbers torch's schedules refuse."""
    for size, parts in product((2, 3, 4), range(1, 17)):
        stages = stages_of(schedule, None)
        said = pipeline.refused(schedule, size, parts)
        for rank in range(size):
            try:
                actions = order(schedule, rank, size, parts, stages)
            except gingham.MeshError as error:
                assert said, (size, parts, error)
                continue
            assert not said, (size, parts)
            held: set[tuple[int, int]] = set()
            most = 0
            for each in actions:
                if each.kind == "F":
                    held.add((each.stage, each.part))
                most = max(most, len(held))
                if each.kind in "BW":
                    held.discard((each.stage, each.part))
            planned = pipeline.in_flight(schedule, rank, size, parts, stages)
            # a zbv that has not as many micro-batches as it could have under way has fewer
            assert most == planned or (schedule == "zbv" and parts < 2 * size and most <= planned), (size, parts, rank, most, planned)


def test_the_plan_command_shows_hybrids(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    size = ["plan", "--ranks", "4", "--width", "96", "--heads", "6", "--layers", "2", "--batch", "8", "--context", "16"]
    assert main([*size, "--hybrids"]) == 0
    out = capsys.readouterr().out
    for part in (
        "parallel='auto' takes the cheapest. ",
        "2 data (state) x 1d of 2",
        "the least of ",
        "cannot make 8 stages",
        "pipeline bytes",
    ):
        assert part in out, out
    assert main([*size, "--data", "2", "--zero", "3", "--pipeline", "2", "--schedule", "1f1b", "--microbatches", "4"]) == 0
    out = capsys.readouterr().out
    planned = hybrids.hybrid_cost(workload.gpt(2, 96, 6, 8, 16), Machine(), dict(mode=None, size=1), 2, "all", 2, "1f1b", 4)
    line = next(line for line in out.splitlines() if line.startswith("2 pipeline (1f1b, 4) x 2 data (all)"))
    assert (
        all(f" {tables.amount(planned.received[axis] / 4)} " in line for axis in ("data", "pipeline")) and f"{planned.bubble:.0%}" in line
    )
    assert main([*size, "--mode", "sequence"]) == 0 and "sequence of 4" in capsys.readouterr().out
    assert main([*size, "--hosts", "2", "--between", "1"]) == 0
    out = capsys.readouterr().out
    assert "from other hosts" in out and "on 2 hosts, parallel={'data'" in out and "parallel='auto'" not in out
    assert main([*size, "--hosts", "3"]) == 2 and "--hosts 3 must divide the 4 ranks" in capsys.readouterr().err
    assert main([*size, "--hybrids", "--memory", "0.0001"]) == 1 and "needs" in capsys.readouterr().out


def test_the_choice_is_the_cheapest_that_fits_and_says_why() -> None:
    described = workload.gpt(4, 64, 8, 16, 32)
    machine = Machine(2e-5, 5e9, 5e10)
    every = hybrids.hybrids(described, 8, machine)
    possible = [each for each in every if not each.reason]
    least = min(each.seconds for each in possible)
    first, reason = hybrids.choose_hybrid(described, 8, machine)
    assert first.seconds == least and first.name in reason and f"of {len(possible)} hybrids of 8 ranks" in reason
    limit = sorted(sum(each.memory.values()) for each in possible)[len(possible) // 4]
    fits = [each for each in possible if sum(each.memory.values()) <= limit]
    held, _ = hybrids.choose_hybrid(described, 8, Machine(2e-5, 5e9, 5e10, limit))
    assert held.seconds == min(each.seconds for each in fits) and sum(held.memory.values()) <= limit
    flat = workload.Workload(described.parts, 16, 32)
    assert hybrids.choose_hybrid(flat, 8, machine)[0].pipeline == 1  # not known as layers in a row
    # of equals the one that holds least
    alike = [each for each in possible if each.seconds == least]
    assert sum(first.memory.values()) == min(sum(each.memory.values()) for each in alike)
    with pytest.raises(gingham.MeshError, match="no hybrid of 8 ranks fits: .*needs"):
        hybrids.choose_hybrid(described, 8, Machine(memory=1e3))


AUTO: list[tuple[Any, Any]] = [
    ("auto", hybrids.Wish()),
    (dict(data="auto", tensor=dict(mode="auto")), hybrids.Wish(pipeline=1)),
    (dict(tensor=dict(size=2, mode="auto")), hybrids.Wish(shards=(None,), pipeline=1, size=2)),
    (dict(data=dict(size=2, shard="auto"), tensor=dict(size=2, mode="1d")), hybrids.Wish(2, pipeline=1, tensor=dict(mode="1d", size=2))),
    (dict(pipeline=dict(size=2, schedule="auto"), tensor="auto"), hybrids.Wish(shards=(None,), pipeline=2)),
]


def chosen(rank: int, parallel: Any) -> Any:
    from gingham.commands.gpt import GPT, Shape, parallel_kit, serial_kit

    with torch.device("meta"):
        described: Any = GPT(serial_kit(), Shape(4, 48, 24, 7, 0.0))
    mesh = gingham.init(parallel=parallel, model=described, tokens=(8, 7), machine=dict(latency=1e-5, bandwidth=1e9, speed=1e10))
    model = gingham.pipeline(GPT(parallel_kit(mesh), Shape(4, 48, 24, 7, 0.0)), mesh)
    ids = torch.zeros(8, 7, dtype=torch.int64)
    return mesh.sizes, mesh.pipeline.size, mesh.data.size, dict(mesh.schedule), mesh.chosen, model.step(ids, ids).item()


@pytest.mark.parametrize(("parallel", "wish"), [AUTO[0], *(pytest.param(*each, marks=pytest.mark.matrix) for each in AUTO[1:])], ids=str)
def test_init_takes_the_cheapest_hybrid(ranks, parallel: Any, wish: Any) -> None:
    answers = ranks(4)(chosen, parallel)
    best, why = hybrids.choose_hybrid(workload.gpt(4, 48, 24, 8, 7), 4, Machine(1e-5, 1e9, 1e10), wish)
    assert all(answer == answers[0] for answer in answers)
    sizes, stages, data, schedule, said, loss = answers[0]
    assert (stages, data) == (best.pipeline, best.data) and said == why
    assert sizes == dict(axes_of(**best.tensor, data=best.data, shard=best.shard).sizes)
    assert stages == 1 or (schedule["schedule"], schedule["microbatches"]) == (best.schedule, best.microbatches)
    assert 0 < loss < 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(parallel="auto"), "parallel='auto' got model=NoneType, tokens=None: expected a torch.nn.Module"),
        (dict(parallel="best", model=workload.gpt(1, 8, 2, 1, 1)), "parallel='best': expected 'auto' or dict"),
        (dict(parallel=dict(tensor=dict(mode="auto", depth=2)), model=workload.gpt(1, 8, 2, 1, 1)), "mode='auto' chooses depth itself"),
        (dict(parallel=dict(data="auto", tensor=dict(size=3, mode="1d")), model=workload.gpt(1, 8, 2, 1, 1)), "sizes must multiply"),
        (dict(parallel=dict(data="auto", rows=2), model=workload.gpt(1, 8, 2, 1, 1)), r"unknown \['rows'\]"),
        (dict(parallel="auto", mode="2d", model=workload.gpt(1, 8, 2, 1, 1)), "parallel= excludes mode"),
    ],
    ids=str,
)
def test_what_auto_cannot_decide_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(gingham.MeshError, match=message):
        gingham.init(**wrong)


def test_the_way_of_attention_is_left_to_the_layers() -> None:
    tensor = {"size": 2, "mode": "sequence", "attention": "auto"}
    assert not has_auto({"tensor": tensor}) and has_auto({"data": "auto", "tensor": tensor}) and has_auto({"tensor": {"mode": "auto"}})
