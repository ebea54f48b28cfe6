"""What may go wrong while saving and loading: kills, full disks, checkpoints that do not fit. Nobody hangs, nothing is lost."""

import os
import random
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gingham

GRID = dict(mode="2.5d", size=8, depth=2)
ALL_AXES = dict(pipeline=2, data=dict(size=2, shard="state"), tensor=dict(size=2, mode="1d"))


class Small(torch.nn.Module):
    """The same keys on a mesh and, where there is none, in torch.nn."""

    def __init__(self, width: int = 24, mesh: Any = None) -> None:
        super().__init__()
        linear, norm = (torch.nn.Linear, torch.nn.LayerNorm) if mesh is None else (gingham.nn.Linear, gingham.nn.LayerNorm)
        self.first, self.norm, self.second = linear(width, 36), norm(36), linear(36, width)
        self.indices = {name: index for index, (name, _) in enumerate(self.named_parameters())}
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    @torch.no_grad()
    def become(self, step: int) -> None:
        """Numbers that tell the step at every element."""
        for name, parameter in self.named_parameters():
            full = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape) + 1000 * self.indices[name] + step / 64
            if hasattr(parameter, "to_local"):
                from torch.distributed.tensor import distribute_tensor

                full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(full)
        self.seen.fill_(step)

    def in_a_row(self) -> Any:
        return [(part, [part]) for part in (self.first, self.norm, self.second)]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == its and torch.equal(value, expected) for (name, value), (its, expected) in pairs)


def save_until_killed(rank: int, path: Path, flag: Path, step: int) -> None:
    mesh = gingham.init(mode="2d", size=4) if int(os.environ["WORLD_SIZE"]) == 4 else gingham.init(parallel=ALL_AXES)
    model: Any = Small(mesh=mesh)
    model = model if mesh.whole is None else gingham.pipeline(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    while True:
        step += 1
        model.become(step)
        gingham.save(model, optimizer, path, step=step)
        if rank == 0:
            flag.with_suffix(".new").write_text(str(step))
            os.replace(flag.with_suffix(".new"), flag)


def kill_while_saving(pool: Any, path: Path, flag: Path, step: int, point: int) -> tuple[list[Any], list[int]]:
    """Kills all ranks or, at every second point, one, after a first save; the outcomes and the victims.

    The moment is a random one at two points of three. At the third it is inside a save for certain: all ranks are
    stopped, and run on until they are stopped with a folder half written.
    """
    draw, everyone = random.Random(point), list(range(pool.size))
    victims = everyone if point % 2 == 0 else [draw.choice(everyone)]
    before = flag.read_text() if flag.exists() else ""

    def signal_to(ranks: list[int], number: int) -> None:
        for rank in ranks:
            os.kill(pool.pids[rank], number)

    def kill() -> None:
        while not flag.exists() or flag.read_text() == before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.4))
        while point % 3 == 0:
            signal_to(everyone, signal.SIGSTOP)
            if list(path.glob(".writing-*")):
                break
            signal_to(everyone, signal.SIGCONT)
            time.sleep(draw.uniform(0.0, 0.002))
        signal_to(victims, signal.SIGKILL)
        signal_to([rank for rank in everyone if rank not in victims], signal.SIGCONT)

    killer = threading.Thread(target=kill)
    killer.start()
    outcomes = pool(save_until_killed, path, flag, step, outcomes=True)
    killer.join()
    return outcomes, victims


@pytest.mark.parametrize(("size", "points"), [(4, 4), *(pytest.param(size, 20, marks=pytest.mark.matrix) for size in (4, 8))])
def test_killed_while_saving_the_previous_or_the_new_one_loads(ranks: Any, tmp_path: Path, size: int, points: int) -> None:
    """On 2d, and on a pipeline of 2 x data of 2 x 1d of 2."""
    path, flag = tmp_path / "run", tmp_path / "flag"
    step, loaded = 0, 0
    for point in range(points):
        outcomes, victims = kill_while_saving(ranks(size), path, flag, step, point)
        for rank, outcome in enumerate(outcomes):
            if rank not in victims:
                assert isinstance(outcome.error, gingham.PeerDied) and outcome.error.rank == victims[0], (rank, outcome)
        assert point % 3 or len(victims) < size or list(path.glob(".writing-*")), "killed inside a save, nothing half written was left"
        last = int(flag.read_text())
        model, expected = Small(), Small()
        step = gingham.load(model, None, path)
        assert step in (last, last + 1)
        expected.become(step)
        loaded += same(model, expected)
    assert loaded == points


def test_keeps_the_last_two_and_removes_what_killed_processes_left(tmp_path: Path) -> None:
    model = Small()
    for step in range(1, 5):
        model.become(step)
        (tmp_path / ".writing-00000077").mkdir()
        gingham.save(model, None, tmp_path, step=step)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"{n:08d}" for n in (step - 1, step) if n]
    fresh, third = Small(), Small()
    third.become(3)
    assert gingham.load(fresh, None, tmp_path) == 4 and same(fresh, model)
    assert gingham.load(fresh, None, tmp_path / "00000003") == 3 and same(fresh, third)
    gingham.save(model, None, tmp_path, keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["00000005"]
    assert gingham.load(fresh, None, tmp_path) is None


def full_disk(rank: int, path: Path) -> str:
    mesh = gingham.init(**GRID)
    model = Small(mesh=mesh)
    model.become(1)
    gingham.save(model, None, path, step=1)
    model.become(2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    with pytest.raises(gingham.CheckpointError) as caught:
        gingham.save(model, None, path, step=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gingham.mesh.current().world.sizes([0])
    assert rank != 0 or [entry.name for entry in path.iterdir()] == ["00000001"]
    gingham.mesh.current().world.sizes([0])
    assert gingham.load(model, None, path) == 1
    model.become(3)
    gingham.save(model, None, path, step=3)
    return str(caught.value)


def test_a_rank_that_cannot_write_tells_all_and_the_last_one_stays(ranks: Any, tmp_path: Path) -> None:
    messages = ranks(8)(full_disk, tmp_path)
    assert len(set(messages)) == 1 and "rank 5: " in messages[0] and "File too large" in messages[0], messages
    model, expected = Small(), Small()
    expected.become(3)
    assert gingham.load(model, None, tmp_path) == 3 and same(model, expected)


def load_other_models(rank: int, path: Path) -> list[str]:
    mesh = gingham.init(**GRID)
    model = Small(mesh=mesh)
    model.become(1)
    gingham.save(model, None, path, step=1)
    said = []
    for change in ("missing on one rank", "shape on all", "unused", "optimizer"):
        other = Small(width=28 if change == "shape on all" else 24, mesh=mesh)
        before = [parameter.to_local().clone() for parameter in other.parameters()]
        optimizer = None
        if change == "missing on one rank" and rank == 3:
            other.register_buffer("extra", torch.zeros(1))
        if change == "unused":
            other.norm = None
        if change == "optimizer":
            optimizer = torch.optim.AdamW(other.parameters())
        with pytest.raises(gingham.CheckpointError) as caught:
            gingham.load(other, optimizer, path)
        said.append(str(caught.value))
        if change != "unused":
            unchanged = zip(before, other.parameters(), strict=True)
            assert all(torch.equal(old, parameter.to_local()) for old, parameter in unchanged), "a refused load changed the model"
        if change != "shape on all":
            assert gingham.load(other, None, path, strict=False) == 1
    return said


def test_what_does_not_fit_is_told_to_all_ranks(ranks: Any, tmp_path: Path) -> None:
    answers = ranks(8)(load_other_models, tmp_path)
    assert all(said == answers[0] for said in answers)
    missing, shape, unused, optimizer = answers[0]
    assert "rank 3: model.extra: got nothing, expected in the checkpoint" in missing and "rank 0" not in missing
    assert "model.first.weight: got shape (36, 24), expected (36, 28)" in shape
    assert "model.norm.weight: is in the checkpoint, expected nothing" in unused
    assert "expected an optimizer's state" in optimizer


def load_damaged(rank: int, path: Path) -> tuple[str, str]:
    model = Small(mesh=gingham.init(**GRID))
    gingham.save(model, None, path)
    folder, said = path / "00000001", []
    for damage in ("overwritten", "truncated"):
        if rank == 0:
            for file in folder.glob("*.distcp"):
                size = file.stat().st_size
                file.write_bytes(bytes(size if damage == "overwritten" else size - 1))
        gingham.mesh.current().world.sizes([0])
        with pytest.raises(gingham.CheckpointError) as caught:
            gingham.load(model, None, path)
        said.append(str(caught.value))
    return said[0], said[1]


def test_a_damaged_file_is_an_error_everywhere(ranks: Any, tmp_path: Path) -> None:
    answers = ranks(8)(load_damaged, tmp_path)
    assert all(said == answers[0] for said in answers)
    overwritten, truncated = answers[0]
    assert "rank " in overwritten and "half loaded" not in truncated
    assert "rank 0: " in truncated and "distcp: got " in truncated and "the checkpoint is damaged" in truncated


def test_refusals_of_one_process(tmp_path: Path) -> None:
    model = Small()
    with pytest.raises(gingham.CheckpointError, match="no complete checkpoint"):
        gingham.load(model, None, tmp_path / "nothing")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    gingham.save(model, optimizer, tmp_path, scheduler)
    with pytest.raises(gingham.CheckpointError, match="holds a scheduler's state; pass scheduler="):
        gingham.load(model, optimizer, tmp_path)
    with pytest.raises(gingham.CheckpointError, match="group 0 of the checkpoint only"):
        gingham.load(model, torch.optim.SGD([model.first.weight], lr=1.0), tmp_path, scheduler)
    with pytest.raises(gingham.CheckpointError, match="not the model's"):
        gingham.save(model, torch.optim.SGD(Small().parameters(), lr=1.0), tmp_path)
    with pytest.raises(gingham.CheckpointError, match="cannot hold it exactly"):
        gingham.load(Small().bfloat16(), None, tmp_path)
    scheduler.odd = object()
    with pytest.raises(gingham.CheckpointError, match="what a checkpoint cannot"):
        gingham.save(model, optimizer, tmp_path, scheduler)
    with pytest.raises(gingham.CheckpointError, match="meta device"):
        gingham.load(Small().to("meta"), None, tmp_path)
    with pytest.raises(ValueError, match="keep=0"):
        gingham.save(model, None, tmp_path, keep=0)
    assert not list(tmp_path.glob(".writing-*"))


def test_torch_reads_the_folder_itself(tmp_path: Path) -> None:
    """It is torch.distributed.checkpoint's format under "model." and "optimizer.state."."""
    from torch.distributed.checkpoint import FileSystemReader, load

    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    gingham.save(model, optimizer, tmp_path)
    state = {"model": {"first.weight": torch.zeros(36, 24)}, "optimizer.state.first.weight.exp_avg": torch.zeros(36, 24)}
    with pytest.warns(UserWarning, match="single process"):
        load(state, storage_reader=FileSystemReader(tmp_path / "00000001"), no_dist=True)
    assert torch.equal(state["model"]["first.weight"], model.first.weight.detach())
    assert torch.equal(state["optimizer.state.first.weight.exp_avg"], optimizer.state[model.first.weight]["exp_avg"])


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9),
    "Adam amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01), amsgrad=True),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_continues_where_it_was(name: str, tmp_path: Path) -> None:
    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            (model.second(model.norm(model.first(torch.ones(2, 24)))) ** 2).sum().backward()
            optimizer.step()

    model, other = Small(), Small()
    optimizer, again = (OPTIMIZERS[name](it.parameters()) for it in (model, other))
    steps(model, optimizer, 3)
    gingham.save(model, optimizer, tmp_path)
    steps(other, again, 1)
    gingham.load(other, again, tmp_path)
    steps(model, optimizer, 2)
    steps(other, again, 2)
    assert same(model, other) and all(parameter.isfinite().all() for parameter in model.parameters())
    for parameter, its in zip(model.parameters(), other.parameters(), strict=True):
        kept, loaded = optimizer.state[parameter], again.state[its]
        assert kept.keys() == loaded.keys() and all(torch.equal(torch.as_tensor(kept[key]), torch.as_tensor(loaded[key])) for key in kept)


def test_state_that_a_mesh_cannot_cut_is_refused(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.Adafactor(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    gingham.save(model, optimizer, tmp_path)
    mesh = gingham.init()
    try:
        model = Small(mesh=mesh)
        with pytest.raises(gingham.CheckpointError, match=r"row_var: got shape \(36, 1\), expected \(36, 24\) or one number"):
            gingham.load(model, torch.optim.Adafactor(model.parameters()), tmp_path)
    finally:
        gingham.destroy()
