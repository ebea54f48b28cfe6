"""Several meshes at once: of other ranks of one job, and of the same ranks; a death anywhere is named everywhere."""

import os
import random
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import gingham
from gingham import nn
from gingham.launch.init import report_failure
from pool import RankError

LIMIT = 1.0  # seconds until all know of a death


def batches(seed: int, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed + 10)
    return [(torch.randn(8, 16, generator=generator), torch.randint(8, (8,), generator=generator)) for _ in range(steps)]


def serial(seed: int, steps: int) -> list[float]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for x, target in batches(seed, steps):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(mesh: gingham.Mesh, seed: int, steps: int) -> list[float]:
    """The losses of a model of this seed on the mesh."""
    torch.manual_seed(seed)
    first = nn.Linear(16, 32, mesh=mesh, layout="outer->inner")
    model = torch.nn.Sequential(first, torch.nn.GELU(), nn.Linear(32, 8, mesh=mesh, layout="inner->outer"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for x, target in batches(seed, steps):
        loss = gingham.cross_entropy(model(mesh.scatter(x)), mesh.scatter(target), mesh=mesh)
        optimizer.zero_grad()
        loss.backward()
        gingham.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


MODES = ({"mode": "2.5d", "size": 4, "depth": 4}, {"mode": "2d", "size": 4})


def group_of(rank: int, **options: Any) -> gingham.Mesh:
    """The mesh of ranks 0 to 3, or of 4 to 7."""
    group = rank // 4
    return gingham.init(**MODES[group], ranks=range(4 * group, 4 * group + 4), **options)


def test_two_meshes_in_one_job_train_different_models(ranks) -> None:
    def train(rank: int) -> Any:
        mesh = group_of(rank)
        assert (mesh.rank, mesh.index, mesh.ranks) == (rank, rank % 4, tuple(range(rank // 4 * 4, rank // 4 * 4 + 4)))
        full = mesh.gather(mesh.scatter(torch.arange(8.0).view(2, 4)))
        assert torch.equal(full, torch.arange(8.0).view(2, 4))
        return trained(mesh, rank // 4, 3 + 4 * (rank // 4))  # they make other numbers of calls, too

    for rank, losses in enumerate(ranks(8)(train)):
        assert losses == pytest.approx(serial(rank // 4, len(losses)), rel=1e-5), rank


def test_ranks_in_any_order_make_a_mesh(ranks) -> None:
    def train(rank: int) -> Any:
        mesh = gingham.init(mode="2d", size=4, ranks=(3, 1, 0, 2))
        assert mesh.index == (3, 1, 0, 2).index(rank)
        whole = mesh.device_mesh.mesh.flatten().tolist()
        parameter = nn.Linear(4, 4).weight
        torch.manual_seed(0)
        return whole, trained(mesh, 1, 3), parameter.full_tensor().shape

    for whole, losses, shape in ranks(4)(train):
        assert whole == [3, 1, 0, 2] and losses == pytest.approx(serial(1, 3), rel=1e-5) and shape == (4, 4)


def default_group(rank: int, size: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(os.environ["GINGHAM_STORE"] + ".group", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def test_a_slice_of_a_device_mesh_is_a_mesh(ranks) -> None:
    def train(rank: int) -> Any:
        default_group(rank, 8)
        parent = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("stage", "row", "col"))
        mesh = gingham.init(parent["row", "col"])
        losses = trained(mesh, rank // 4, 3)
        passed = torch.full((2,), float(rank))
        dist.all_reduce(passed, group=parent.get_group("stage"))  # the user's own groups go on beside it
        gingham.destroy()
        assert dist.is_initialized()
        dist.destroy_process_group()
        return losses, passed.tolist(), mesh.ranks

    for rank, (losses, passed, whole) in enumerate(ranks(8)(train)):
        assert losses == pytest.approx(serial(rank // 4, 3), rel=1e-5)
        assert passed == [float(2 * (rank % 4) + 4)] * 2 and whole == tuple(range(rank // 4 * 4, rank // 4 * 4 + 4))


SLICES = [
    (dict(stage=2, data=2, tp=2), ("data", "tp"), 64),
    *(
        pytest.param(*each, marks=pytest.mark.matrix)
        for each in (
            (dict(data=2, row=2, col=2), ("data", "row", "col"), 32),
            (dict(data=2, depth=4, row=1, col=1), ("data", "depth", "row", "col"), 128),
            (dict(k=2, n=1, data=2, m=2), ("k", "n", "data", "m"), 32),
            (dict(stage=4, data=2), ("data",), 128),
            (dict(stage=2, data=1, tp=4), ("data", "tp"), 32),
        )
    ),
]


@pytest.mark.parametrize(("parent", "names", "held"), SLICES, ids=str)
def test_a_slice_with_replicas(ranks, parent: dict[str, int], names: tuple[str, ...], held: int) -> None:
    """Weights are replicated over the dim "data", each of whose ranks may load its own rows."""

    def train(rank: int) -> Any:
        default_group(rank, 8)
        whole = init_device_mesh("cpu", tuple(parent.values()), mesh_dim_names=tuple(parent))
        given = whole[names] if names != tuple(parent) else whole
        mesh = gingham.init(given)
        losses = trained(mesh, 1, 3)
        weight = nn.Linear(8, 16, layout="outer->inner").weight
        gingham.destroy()
        dist.destroy_process_group()
        return losses, mesh.data.size, weight.to_local().numel(), weight.device_mesh == given

    for found in ranks(8)(train):
        assert found == (pytest.approx(serial(1, 3), rel=1e-5), parent["data"], held, True)


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (("stage", "row", "col"), (2, 2, 2), "a mesh is that of one stage; leave stage out"),
        (("pp", "data", "tp"), (2, 2, 2), "leave pp out"),
        (("dp", "tp"), (2, 2), "call the dim of replicas 'data' in place of 'dp'"),
        (("data", "k", "n", "m"), (2, 1, 2, 2), r"in the order of the mesh's axes, \('k', 'n', 'data', 'm'\)"),
        (("tp", "data"), (2, 2), r"\('data', 'tp'\)"),
        (("data", "rows"), (2, 2), "expected .tp., .row, col."),
        (("data", "row", "col"), (2, 1, 2), "row and col must have the same size"),
    ],
    ids=str,
)
def test_dims_that_are_no_meshs_are_refused(names: tuple[str, ...], shape: tuple[int, ...], message: str) -> None:
    from gingham.mesh.modes import axes_named

    with pytest.raises(gingham.MeshError, match=message):
        axes_named(names, shape)


def test_a_device_mesh_of_one_groups_ranks_does_not_hang(ranks) -> None:
    def train(rank: int) -> Any:
        default_group(rank, 8)
        first = rank // 4 * 4
        own = DeviceMesh("cpu", torch.arange(first, first + 4).view(2, 2), mesh_dim_names=("row", "col"))
        losses = trained(gingham.init(own), rank // 4, 2)
        gingham.destroy()
        dist.destroy_process_group()
        return losses

    for rank, losses in enumerate(ranks(8)(train, timeout=60.0)):
        assert losses == pytest.approx(serial(rank // 4, 2), rel=1e-5)


def test_several_meshes_on_the_same_ranks(ranks) -> None:
    def train(rank: int) -> Any:
        first = gingham.init(mode="2d", size=4)
        with pytest.raises(gingham.MeshError, match="default=False"):
            gingham.init(mode="1d", size=4)
        second = gingham.init(mode="1d", size=4, default=False)
        third = gingham.init(mode="2d", size=4, default=False)
        assert nn.Linear(8, 8).mesh is first
        found = [trained(mesh, seed, 3) for seed, mesh in enumerate((first, second, third))]
        with pytest.raises(gingham.MeshError, match="several meshes"):
            gingham.clip_grad_norm_([nn.Linear(8, 8, mesh=mesh).weight for mesh in (first, second)], 1.0)
        gingham.destroy(second)
        with pytest.raises(gingham.MeshError, match="destroy"):
            trained(second, 0, 1)
        found.append(trained(first, 3, 3))
        fourth = gingham.init(mode="2.5d", size=4, depth=4, default=False, timeout=7.0)
        found.append(trained(fourth, 4, 3))
        gingham.destroy()
        return [*found, trained(gingham.init(mode="1d", size=4), 5, 3)]

    for losses in ranks(4)(train):
        for seed, each in enumerate(losses):
            assert each == pytest.approx(serial(seed, 3), rel=1e-5), seed


def test_the_second_of_two_equal_meshes_outlives_the_first(ranks) -> None:
    """torch's DTensor takes equal meshes for one, and hands on the groups of the first."""

    def train(rank: int) -> Any:
        mine = (0, 1) if rank < 2 else (2, 3)
        first = gingham.init(mode="1d", size=2, ranks=mine)
        second = gingham.init(mode="1d", size=2, ranks=mine, default=False)
        layers = [nn.Linear(8, 8, mesh=mesh) for mesh in (first, second)]
        kept = [layer.weight.full_tensor().clone() for layer in layers]
        gingham.destroy(first)
        assert torch.equal(layers[1].weight.full_tensor(), kept[1])
        third = gingham.init(mode="1d", size=2, ranks=mine)
        return trained(second, 0, 2), trained(third, 1, 2)

    for losses in ranks(4)(train):
        assert list(losses) == [pytest.approx(serial(seed, 2), rel=1e-5) for seed in range(2)]


def test_meshes_that_cross_each_other(ranks) -> None:
    """Ranks 0, 1 | 2, 3 and 0, 2 | 1, 3 at once, as tensor and pipeline ranks are."""

    def train(rank: int) -> Any:
        row = rank // 2 * 2
        first = gingham.init(mode="1d", size=2, ranks=(row, row + 1))
        second = gingham.init(mode="1d", size=2, ranks=(rank % 2, rank % 2 + 2), default=False)
        return [trained(mesh, seed, 2) for seed, mesh in enumerate((first, second))]

    for losses in ranks(4)(train):
        assert losses == [pytest.approx(serial(seed, 2), rel=1e-5) for seed in range(2)]


def test_a_later_life_has_groups_of_its_own(ranks) -> None:
    """DTensor gave a mesh what it had planned for an equal one of an earlier life, whose process groups had other names."""

    def whole(mesh: gingham.Mesh, seed: int) -> bool:
        torch.manual_seed(seed)
        layer = nn.Linear(8, 8, mesh=mesh)
        layer(mesh.scatter(torch.ones(4, 8))).sum().backward()
        torch.manual_seed(seed)
        right = torch.nn.Linear(8, 8)
        right(torch.ones(4, 8)).sum().backward()
        pairs = [(layer.weight, right.weight), (layer.weight.detach(), right.weight), (layer.bias.grad, right.bias.grad)]
        return all(torch.equal(got.full_tensor(), expected) for got, expected in pairs)

    def live(rank: int) -> list[bool]:
        row, column = (rank // 2 * 2, rank // 2 * 2 + 1), (rank % 2, rank % 2 + 2)
        found = []
        for life in ([row], [column, row], [None], [row, None, column]):
            meshes = [
                gingham.init(mode="1d" if each else "2d", size=2 if each else 4, ranks=each, default=at == 0)
                for at, each in enumerate(life)
            ]
            found += [whole(mesh, seed) for seed, mesh in enumerate(meshes)]
            gingham.destroy()
        return found

    assert ranks(4)(live) == [[True] * 7] * 4


def test_saves_of_two_meshes_are_their_own(ranks, tmp_path) -> None:
    def save(rank: int) -> Any:
        mesh = group_of(rank)
        torch.manual_seed(rank // 4)
        layer = nn.Linear(8, 8)
        gingham.save(layer, None, tmp_path / str(rank // 4))
        kept = layer.weight.full_tensor().clone()
        with torch.no_grad():
            layer.weight.zero_()
        gingham.load(layer, None, tmp_path / str(rank // 4))
        assert torch.equal(layer.weight.full_tensor(), kept)
        return mesh.size

    assert ranks(8)(save) == [4] * 8
    for group in range(2):
        torch.manual_seed(group)
        expected = torch.nn.Linear(8, 8)
        got = torch.nn.Linear(8, 8)
        gingham.load(got, None, tmp_path / str(group))
        assert torch.equal(got.weight, expected.weight)


def test_wrong_ranks_are_refused(ranks) -> None:
    def start(rank: int) -> list[str]:
        said = []
        for options in (
            {"mode": "2d", "size": 4, "ranks": (0, 1, 2)},
            {"mode": "1d", "size": 2, "ranks": (0, 0)},
            {"mode": "1d", "size": 2, "ranks": (0, 9)},
            {"mode": "1d", "size": 2, "ranks": ((rank + 1) % 4, (rank + 2) % 4)},
            {"mode": "1d", "size": 2, "ranks": (0, rank or 1)},  # rank 0 makes one with rank 1; ranks 2 and 3 with rank 0
        ):
            with pytest.raises(gingham.MeshError) as caught:
                gingham.init(**options, timeout=20.0)
            said.append(str(caught.value))
        return said

    for rank, said in enumerate(ranks(4)(start)):
        assert "4 ranks" in said[0] and "different ranks" in said[1] and "0 to 3" in said[2]
        assert f"rank {rank} is not among the ranks" in said[3]
        assert "makes a mesh of ranks" in said[4] and "in the same order" in said[4]


def test_other_calls_of_one_mesh_are_named_by_the_jobs_ranks(ranks) -> None:
    def call(rank: int) -> Any:
        mesh = group_of(rank)
        layer, x = nn.Linear(8, 12 if rank == 6 else 8), mesh.scatter(torch.ones(8, 8))
        try:
            for _ in range(200):
                layer(x)
                time.sleep(0.01)
        except (gingham.MeshError, gingham.ShapeError) as error:
            return str(error)
        return "nothing"

    for said in ranks(8)(call):
        assert "rank 6 got" in said and "ranks 4, 5, 7 expected" in said, said


def until_killed(rank: int, victim: int, after: float) -> Any:
    """Steps on two meshes; who saw what, and when."""
    mesh = group_of(rank)
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16), mesh.scatter(torch.ones(8, 16))
    start = time.monotonic()
    try:
        while True:
            if rank == victim and time.monotonic() > start + after:
                os.kill(os.getpid(), signal.SIGKILL)
            layer(x).sum().backward()
    except BaseException as error:
        report_failure(error)
        return type(error).__name__, getattr(error, "rank", None), str(error), time.monotonic()


def killed(ranks: Any, victim: int, after: float) -> float:
    outcomes = ranks(8)(until_killed, victim, after, outcomes=True, timeout=30.0)
    seen = []
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert isinstance(outcome, RankError)
            continue
        assert outcome[:2] == ("PeerDied", victim) and f"rank {victim}" in outcome[2], (victim, rank, outcome)
        seen.append(outcome[3])
    return max(seen) - min(seen)


@pytest.mark.parametrize("victim", [1, 6])
def test_a_death_in_one_mesh_is_named_in_both(ranks, victim: int) -> None:
    assert killed(ranks, victim, 0.1) < LIMIT


@pytest.mark.matrix
def test_a_hundred_random_kills_are_named_by_all(ranks) -> None:
    drawn = random.Random(0)
    late = sorted(killed(ranks, drawn.randrange(8), drawn.random() * 0.2) for _ in range(100))
    print(f"100 kills: all 7 others know within {late[98]:.3f} s (p99), {late[-1]:.3f} s (max)")
    assert late[-1] < LIMIT


def test_memory_that_runs_out_in_one_mesh_leaves_the_other_alone(ranks) -> None:
    def train(rank: int) -> Any:
        os.environ["GINGHAM_FAULT"] = "rank=1,op=linear.forward,call=2,kind=oom"
        mesh = group_of(rank)
        del os.environ["GINGHAM_FAULT"]
        layer, x = nn.Linear(16, 16), mesh.scatter(torch.ones(8, 16))
        said = []
        for _ in range(4):
            try:
                layer(x).sum().backward()
                said.append("done")
            except MemoryError as error:
                said.append(f"{type(error).__name__} {getattr(error, 'rank', rank)}")
        return said

    for rank, said in enumerate(ranks(8)(train)):
        expected = "done" if rank > 3 else "MemoryError 1" if rank == 1 else "PeerOutOfMemory 1"
        assert said == ["done", expected, "done", "done"], (rank, said)
