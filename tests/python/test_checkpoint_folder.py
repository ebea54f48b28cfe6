"""A folder that several jobs save into, that holds strangers, that is full; and ranks that only believe to be alone."""

import os
import random
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gingham
from gingham.checkpoint import folders


class Numbers(torch.nn.Module):
    """Every element tells who saved it and when."""

    def __init__(self, value: float = 0.0, layers: Any = torch.nn) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(layers.Linear(8, 8) for _ in range(6))
        for parameter in self.parameters():
            parameter.data.fill_(value)

    def values(self) -> set[float]:
        return {float(value) for parameter in self.parameters() for value in parameter.detach().unique()}


def alone() -> None:
    """This rank of the pool is a job of its own."""
    for name in ("WORLD_SIZE", "RANK"):
        os.environ.pop(name, None)


def save_beside(rank: int, path: Path, count: int) -> tuple[int, int]:
    """(saves, loads that held values of one save only)."""
    alone()
    saved = good = 0
    for step in range(count):
        value = 1000.0 * rank + step
        gingham.save(Numbers(value), None, path, step=int(value), keep=2)
        saved += 1
        model = Numbers(-1.0)
        number = gingham.load(model, None, path)
        good += model.values() == {float(number)}
    return saved, good


@pytest.mark.parametrize("pairs", [5, pytest.param(50, marks=pytest.mark.matrix)])
def test_b4_two_jobs_save_into_one_folder(ranks: Any, tmp_path: Path, pairs: int) -> None:
    for pair in range(pairs):
        path = tmp_path / str(pair)
        assert ranks(2)(save_beside, path, 8) == [(8, 8), (8, 8)]
        assert not list(path.glob(".writing-*")) and 2 <= len(folders.complete(path)) <= 4


def export_beside(rank: int, path: Path, count: int) -> int:
    """Imports, among exports, that held values of one export only."""
    alone()
    good = 0
    for step in range(count):
        gingham.export_safetensors(Numbers(100.0 * rank + step), path, shard_size=300 if rank else 600)
        model = Numbers(-1.0)
        gingham.import_safetensors(model, path)
        good += len(model.values()) == 1
    return good


def test_b4_two_jobs_export_into_one_folder(ranks: Any, tmp_path: Path) -> None:
    """The set that stays is one job's."""
    for _ in range(3):
        assert ranks(2)(export_beside, tmp_path, 6) == [6, 6]
        model = Numbers(-1.0)
        gingham.import_safetensors(model, tmp_path)
        assert len(model.values()) == 1
        assert not list(tmp_path.glob(".writing-*"))


def test_b4_only_what_nobody_owns_is_removed(tmp_path: Path) -> None:
    writing = folders.begin(tmp_path)
    (writing.folder / "x").write_text("x")
    gingham.save(Numbers(1.0), None, tmp_path)
    assert writing.folder.is_dir()
    writing.lock.release()  # as its death would
    gingham.save(Numbers(2.0), None, tmp_path)
    assert not writing.folder.exists()
    # what is being read stays until it is read
    folder, lock = folders.reading(tmp_path)
    for _ in range(3):
        gingham.save(Numbers(3.0), None, tmp_path, keep=1)
    assert folder.is_dir() and gingham.load(Numbers(), None, folder) is None
    assert lock is not None
    lock.release()
    gingham.save(Numbers(4.0), None, tmp_path, keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["00000006"]


def started(rank: int) -> None:
    """The pool is up, so that the time to the kill is spent saving."""


def save_for_ever(rank: int, path: Path) -> None:
    alone()
    while True:
        gingham.save(Numbers(float(rank)), None, path)


@pytest.mark.parametrize("points", [3, pytest.param(25, marks=pytest.mark.matrix)])
def test_b4_a_killed_job_beside_a_living_one(ranks: Any, tmp_path: Path, points: int) -> None:
    """The living one goes on, and its next save clears away what the dead one left."""
    draw = random.Random(points)
    for _ in range(points):
        pool = ranks(1)
        pool(started)
        killer = threading.Timer(draw.uniform(0.02, 0.2), lambda pool=pool: os.kill(pool.pids[0], signal.SIGKILL))
        killer.start()
        outcome = pool(save_for_ever, tmp_path, outcomes=True)
        killer.join()
        assert "exit code -9" in str(outcome[0])
        gingham.save(Numbers(7.0), None, tmp_path)
        model = Numbers()
        gingham.load(model, None, tmp_path)
        assert model.values() == {7.0} and not list(tmp_path.glob(".writing-*"))


def test_b4_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves and loads work, and nothing of anybody's is removed but checkpoints beyond `keep`."""

    def none(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    left = folders.begin(tmp_path)
    for step in range(3):
        gingham.save(Numbers(float(step)), None, tmp_path, step=step)
    model = Numbers(-1.0)
    assert gingham.load(model, None, tmp_path) == 2 and model.values() == {2.0}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [left.folder.name, "00000002", "00000003"]
    gingham.export_safetensors(model, tmp_path / "out")
    gingham.import_safetensors(model, tmp_path / "out")


def test_b9_strangers_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".writing-x").write_text("a file")
    (tmp_path / ".writing-00000005").write_text("a file of our name")
    (tmp_path / ".writing-mine").mkdir()
    (tmp_path / "²").mkdir()
    (tmp_path / "٣").mkdir()
    (tmp_path / "00000004").write_text("a file")
    (tmp_path / "7").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    os.symlink(elsewhere, tmp_path / "00000009")
    os.symlink(elsewhere, tmp_path / ".writing-00000008")
    os.symlink(tmp_path / "nowhere", tmp_path / ".writing-00000007")
    before = {entry.name for entry in tmp_path.iterdir()}
    for step in range(4):
        gingham.save(Numbers(float(step)), None, tmp_path, step=step)
        model = Numbers(-1.0)
        assert gingham.load(model, None, tmp_path) == step and model.values() == {float(step)}
    assert {entry.name for entry in tmp_path.iterdir()} - before == {"00000012", "00000013"}
    assert before <= {entry.name for entry in tmp_path.iterdir()} and (elsewhere / "precious").exists()


def test_b9_paths_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Numbers()
    (tmp_path / "file").write_text("x")
    for call in (gingham.save, gingham.load):
        for path in ("", None):
            with pytest.raises(gingham.CheckpointError, match="expected the path of a folder"):
                call(model, None, path)  # type: ignore[arg-type]
    for call in (gingham.export_safetensors, gingham.import_safetensors):
        with pytest.raises(gingham.CheckpointError, match="expected the path of a folder"):
            call(model, "")
    with pytest.raises(gingham.CheckpointError, match="is no folder"):
        gingham.save(model, None, tmp_path / "file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    gingham.save(model, None, ".")
    assert gingham.load(model, None, ".") is None
    with pytest.raises(gingham.CheckpointError, match="is a single checkpoint"):
        gingham.save(model, None, "00000001")


def on_a_full_disk(rank: int, path: Path, small: bool) -> str:
    gingham.init(mode="2d", size=4)
    model = Numbers(1.0, gingham.nn)
    big = gingham.nn.Linear(1024, 1024)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not small and rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    gingham.save(model, None, path, step=1)
    with pytest.raises(gingham.CheckpointError) as caught:
        gingham.save(big, None, path, step=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert gingham.load(model, None, path) == 1
    return str(caught.value)


def test_b9_a_full_disk_is_named(ranks: Any, tmp_path: Path) -> None:
    """On a small tmpfs where this user may mount one; with a limit on the size of files everywhere."""
    said = ranks(4)(on_a_full_disk, tmp_path / "limit", False)
    assert len(set(said)) == 1 and "rank 2: " in said[0] and "File too large" in said[0] and "rank 0" not in said[0]
    assert "weight (1,048,576 of this rank's" in said[0] and "bytes are free there" in said[0] and "enforce fail" not in said[0]
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)], capture_output=True).returncode:
        return
    try:
        said = ranks(4)(on_a_full_disk, small, True)
        assert "No space left on device" in said[0] and "enforce fail" not in said[0]
        assert [entry.name for entry in small.iterdir()] == ["00000001"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def believe_alone(rank: int, path: Path) -> list[str]:
    """What each rank is told that saves when no mesh unites it with the others."""
    said = []

    def refused(model: torch.nn.Module, call: Any = gingham.save, *args: Any) -> None:
        with pytest.raises((gingham.MeshError, gingham.CheckpointError)) as caught:
            call(model, *args, path / f"{rank}")
        said.append(str(caught.value))

    gingham.init(mode="2d", size=4)
    model = gingham.nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    gingham.destroy()
    refused(model, gingham.save, None)
    refused(model, gingham.save, optimizer)
    refused(model, gingham.export_safetensors)
    refused(torch.nn.Linear(4, 4), gingham.save, None)  # torchrun's environment, init forgotten
    alone()
    refused(model, gingham.save, None)
    refused(model, gingham.export_safetensors)
    gingham.init()
    refused(model, gingham.save, None)
    refused(model, gingham.export_safetensors)
    gingham.destroy()
    assert not (path / f"{rank}").exists()
    gingham.save(torch.nn.Linear(16, 16), None, path / f"whole {rank}")
    refused(model, lambda each, _: gingham.load(each, None, path / f"whole {rank}"))
    return said


def test_a24_save_by_ranks_that_believe_to_be_alone_is_refused(ranks: Any, tmp_path: Path) -> None:
    for rank, said in enumerate(ranks(4)(believe_alone, tmp_path)):
        after, _, export, forgotten, ended, _, other, _, load = said
        assert f"rank {rank} of 4 (WORLD_SIZE) would write alone" in after and "gingham.destroy()" in after
        assert f"rank {rank} of 4" in export and f"rank {rank} of 4" in forgotten
        assert "weight: is one block of 4 on a mesh that has ended" in ended and "mesh that has ended" in load
        assert "64 of 256 elements" in other


def after_destroy(rank: int, path: Path) -> str:
    gingham.init(mode="2d", size=4)
    model = gingham.nn.Linear(16, 16)
    gingham.save(model, None, path)
    torch.distributed.destroy_process_group()  # the mesh does not need it
    gingham.save(model, None, path)
    if rank == 0:
        with pytest.raises(gingham.PeerDied) as caught:
            gingham.save(model, None, path)
        assert caught.value.rank in (1, 2, 3)
        return str(caught.value)
    if rank == 1:
        time.sleep(0.3)
        gingham.destroy()
    time.sleep(0.5)
    return ""


def test_b9_save_on_one_rank_only_says_that_all_must_call_it(ranks: Any, tmp_path: Path) -> None:
    said = ranks(4)(after_destroy, tmp_path)[0]
    assert "left the job" in said and "every rank of the mesh must call it" in said and "gingham.save to" in said
    assert len(folders.complete(tmp_path)) == 2
