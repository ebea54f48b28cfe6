"""What the planner says crosses from host to host in a step of a hybrid is what a run counts, to the byte, of all axes together."""

from typing import Any

import pytest
import torch

import gingham
from gingham.plan import hybrids, workload
from gingham.plan.choose import Machine
from virtual import on_host, split

SIZE = dict(layers=4, width=48, heads=24, batch=9, context=7)
# data ranks, their shard, pipeline ranks, their schedule, micro-batches, the tensor mesh
CASES: dict[int, list[tuple[int, str | None, int, str, int, dict[str, Any]]]] = {
    4: [
        (1, None, 2, "1f1b", 4, dict(mode="1d", size=2)),
        (2, "all", 2, "gpipe", 3, dict(mode=None, size=1)),
        (2, "state", 2, "zbv", 4, dict(mode=None, size=1)),
        (4, None, 1, "1f1b", 1, dict(mode=None, size=1)),
        (2, "state", 1, "1f1b", 1, dict(mode="1d", size=2)),
        (2, None, 1, "1f1b", 3, dict(mode="1d", size=2, sequence=True)),
        (1, None, 1, "1f1b", 1, dict(mode="1d", size=4, sequence=True)),
        (1, None, 1, "1f1b", 4, dict(mode="2d", size=4)),
        (1, None, 1, "1f1b", 1, dict(mode="2.5d", size=4, depth=4)),
        (1, None, 1, "1f1b", 1, dict(mode=None, size=4, grid=(1, 2, 2))),
        (1, None, 4, "1f1b", 4, dict(mode=None, size=1)),
        (1, None, 1, "1f1b", 1, dict(mode="sequence", size=4)),
        (1, None, 1, "1f1b", 2, dict(mode="sequence", size=4, attention="gathered")),
        (1, None, 1, "1f1b", 1, dict(mode="sequence", size=4, attention="heads")),
        (2, "state", 1, "1f1b", 2, dict(mode="sequence", size=2)),
    ],
    8: [
        (2, None, 2, "zero_bubble", 4, dict(mode="1d", size=2, sequence=True)),
        (2, "state", 2, "dual", 5, dict(mode="1d", size=2)),
        (2, "all", 2, "interleaved", 4, dict(mode=None, size=2, grid=(1, 1, 2))),
        (1, None, 2, "1f1b", 4, dict(mode="2d", size=4)),
        (1, None, 2, "gpipe", 2, dict(mode="2.5d", size=4, depth=4)),
        (1, None, 1, "1f1b", 1, dict(mode="2.5d", size=8, depth=2)),
        (1, None, 1, "1f1b", 1, dict(mode="2.5d", size=8, depth=2, shard_depth=True)),
        (1, None, 1, "1f1b", 1, dict(mode="3d", size=8)),
        (1, None, 2, "zbv", 4, dict(mode=None, size=4, grid=(2, 2, 1))),
        (2, "state", 1, "1f1b", 3, dict(mode="2d", size=4)),
        (2, "all", 1, "1f1b", 3, dict(mode="2.5d", size=4, depth=4, shard_depth=True)),
        (2, None, 1, "1f1b", 1, dict(mode="2.5d", size=4, depth=4)),
        (2, None, 1, "1f1b", 1, dict(mode="2d", size=4)),
        (2, None, 2, "1f1b", 4, dict(mode="sequence", size=2)),
        (1, None, 2, "zbv", 4, dict(mode="sequence", size=4, attention="heads")),
        (1, None, 2, "1f1b", 2, dict(mode="1d", size=4, sequence=True)),
        (2, "all", 1, "1f1b", 2, dict(mode="1d", size=4, sequence=True)),
        (2, None, 1, "1f1b", 2, dict(mode=None, size=4, grid=(1, 2, 2))),
    ],
    6: [
        (2, "state", 3, "1f1b", 5, dict(mode=None, size=1)),
        (1, None, 3, "gpipe", 3, dict(mode="1d", size=2)),
        (3, None, 1, "1f1b", 2, dict(mode=None, size=2, grid=(1, 2, 1))),
        (6, "all", 1, "1f1b", 1, dict(mode=None, size=1)),
    ],
}
WAYS = {4: [split(2, 2), split(3, 1)], 8: [split(4, 4), split(2, 2, 4), (0, 1) * 4], 6: [split(3, 3), split(2, 4)]}
QUICK = [(4, split(2, 2), 0), (4, split(3, 1), 5), (8, split(4, 4), 0)]
ALL = [(size, hosts, case) for size, ways in WAYS.items() for hosts in ways for case in range(len(CASES[size]))]
WAYS = [pytest.param(*each, marks=[] if each in QUICK else [pytest.mark.matrix]) for each in ALL]


def one_step(rank: int, case: Any, hosts: tuple[int, ...]) -> dict[str, int]:
    """Bytes that came from other hosts in a step, by axis, and all that were received."""
    from gingham.commands.gpt import GPT, Shape, parallel_kit

    data, shard, stages, schedule, parts, tensor = case
    config = dict(data=dict(size=data, shard=shard), tensor=tensor) | (dict(pipeline=stages) if stages > 1 else {})
    with on_host(rank, hosts):
        mesh = gingham.init(parallel=config, timeout=30.0)
    torch.manual_seed(1)
    model: Any = GPT(parallel_kit(mesh), Shape(SIZE["layers"], SIZE["width"], SIZE["heads"], SIZE["context"], 0.0))
    ids = torch.zeros(SIZE["batch"], SIZE["context"], dtype=torch.int64)
    if stages > 1 or parts > 1:
        model = gingham.pipeline(model, mesh, parts, schedule)
    mesh.traffic(reset=True)
    if stages > 1 or parts > 1:
        model.step(ids, ids)
    else:
        model.loss(model(mesh.scatter(ids)), mesh.scatter(ids) if mesh.inner.rows else ids).backward()
    for parameter in model.parameters():
        parameter.grad.to_local()  # waits for the sums behind the backward pass
    counts = mesh.traffic()
    received = sum(each["bytes_received"] for each in counts.values())
    return {axis: each["bytes_crossed"] for axis, each in counts.items() if each.get("bytes_crossed")} | {"received": received}


@pytest.mark.parametrize(("size", "hosts", "case"), WAYS)
def test_predicted_crossing_is_the_crossing_counted(ranks: Any, size: int, hosts: tuple[int, ...], case: int) -> None:
    chosen = CASES[size][case]
    data, shard, stages, schedule, parts, tensor = chosen
    planned = hybrids.hybrid_cost(workload.gpt(**SIZE), Machine(), tensor, data, shard, stages, schedule, parts, hosts)
    assert not planned.reason
    answers = ranks(size)(one_step, chosen, hosts)
    received = sum(answer.pop("received") for answer in answers)
    behind = sum(answer.get("pipeline", 0) for answer in answers)
    total = sum(sum(answer.values()) for answer in answers)
    assert planned.crossed["pipeline"] == behind
    assert sum(planned.received.values()) == received
    assert sum(planned.crossed.values()) == total, (chosen, planned.crossed, answers)


def test_a_slow_link_between_hosts_turns_the_choice() -> None:
    """The one border between hosts is then shared by as many ranks as can be."""
    size, wish = workload.gpt(layers=4, width=512, heads=8, batch=8, context=32), hybrids.Wish(schedules=("1f1b",), hosts=2)
    near, far = (hybrids.hybrids(size, 8, Machine(latency=0, between=each), wish)[0] for each in (None, 1e8))
    assert (near.pipeline, far.pipeline) == (4, 2) and 0 < far.crossed["pipeline"] == sum(far.crossed.values())
    alone = hybrids.hybrids(size, 8, Machine(latency=0, between=1e8), hybrids.Wish(schedules=("1f1b",)))[0]
    assert sum(alone.crossed.values()) == 0 and alone.name == near.name
