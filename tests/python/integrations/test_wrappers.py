"""accelerate alone, Lightning Fabric, and torch's data-parallel wrappers, on models that a mesh holds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import gingham
from grids import GRIDS, relative, whole


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.LayerNorm(20), torch.nn.Linear(20, 5))


def loader_of() -> Any:
    torch.manual_seed(2)  # the order of each epoch is drawn from torch's own generator, which the model's calls must leave
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 12, generator=generator), torch.randint(5, (40,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)


def accelerated(model: torch.nn.Module, folder: Path) -> dict[str, Any]:
    """Losses and norms of ten steps, of which the last five are run again from a saved state."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader_of(), scheduler)
    losses: list[float] = []
    norms: list[float] = []

    def epoch() -> None:
        for x, y in loader:
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.3)))
            optimizer.step()
            scheduler.step()
            losses.append(float(loss.detach()))

    epoch()
    accelerator.save_state(str(folder / "state"))
    weights = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
    accelerator.save_model(model, str(folder / "model"))
    epoch()
    accelerator.load_state(str(folder / "state"))
    epoch()
    counted = accelerator.gather_for_metrics(torch.ones(3)).sum()
    accelerator.end_training()  # must leave the mesh's process group
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "counted": float(counted),
        "wrapped": type(model).__name__,
        "main": accelerator.is_main_process,
    }


def on_mesh(rank: int, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    mesh = gingham.init(**options)
    return accelerated(gingham.parallelize(model_of(), mesh), folder)


def test_c2_accelerate_trains_and_resumes_as_one_process(ranks, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    expected = accelerated(model_of(), tmp_path / "serial")
    found = ranks(4)(on_mesh, GRIDS["2d"], tmp_path / "mesh")
    for rank, got in enumerate(found):
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert got["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert got["counted"] == 3 and got["wrapped"] == "Sequential" and got["main"] == (rank == 0)
    assert found[1]["weights"] == {}
    errors = {name: relative(found[0]["weights"][name], value) for name, value in expected["weights"].items()}
    assert max(errors.values()) < 1e-5, errors
    saved = load_file(tmp_path / "mesh" / "model" / "model.safetensors")
    assert all(torch.equal(found[0]["weights"][name], saved[name]) for name in expected["weights"])
    again = torch.load(tmp_path / "mesh" / "state" / "optimizer.bin", weights_only=True)
    assert again["state"][0]["exp_avg"].shape == (20, 12) and type(again["state"][0]["exp_avg"]) is torch.Tensor


def fabric_run(folder: Path, strategy: Any, model: torch.nn.Module, devices: int) -> dict[str, Any]:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy)
    fabric.launch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wrapped, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader_of())
    losses: list[float] = []

    def epoch() -> None:
        for x, y in loader:
            loss = torch.nn.functional.cross_entropy(wrapped(x), y)
            optimizer.zero_grad()
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, optimizer, max_norm=0.3)
            optimizer.step()
            losses.append(float(loss.detach()))

    epoch()
    fabric.save(folder / "state.ckpt", {"model": wrapped, "optimizer": optimizer})
    epoch()
    fabric.barrier()
    fabric.load(folder / "state.ckpt", {"model": wrapped, "optimizer": optimizer})
    epoch()
    return {"losses": losses, "zero": fabric.is_global_zero}


def fabric_on_mesh(rank: int, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    mesh = gingham.init(**options)
    return fabric_run(folder, gingham.integrations.fabric.OneBatch(), gingham.parallelize(model_of(), mesh), mesh.size)


def test_c2_fabric_trains_and_resumes_as_one_process(ranks, tmp_path: Path) -> None:
    expected = fabric_run(tmp_path / "serial", "auto", model_of(), 1)
    for rank, got in enumerate(ranks(4)(fabric_on_mesh, GRIDS["2d"], tmp_path / "mesh")):
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert got["zero"] == (rank == 0)


def refused(rank: int) -> list[str]:
    mesh = gingham.init(mode="2d", size=4)
    found = []
    layers = torch.nn.Sequential(gingham.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    for model in (gingham.parallelize(model_of(), mesh), layers, torch.nn.Sequential(gingham.nn.Dropout(0.1), torch.nn.Linear(4, 4))):
        for wrapper in (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel):
            with pytest.raises(gingham.MeshError) as raised:
                wrapper(model)
            found.append(str(raised.value))
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    return found


def test_c2_data_parallel_wrappers_are_refused_by_name(ranks) -> None:
    for messages in ranks(4)(refused):
        assert all("without the wrapper" in message and "DataParallel(Sequential)" in message for message in messages)
        assert "parameter 0.weight" in messages[0] and "layer 0" in messages[-1]


def clipped(rank: int, options: dict[str, Any], norm_type: float) -> list[float]:
    """Our norm of converted gradients beside the serial one, by Accelerator.clip_grad_norm_, and the clipped gradients' error."""
    from accelerate import Accelerator

    mesh = gingham.init(**options)
    model, serial = gingham.parallelize(model_of(), mesh), model_of()
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
    for each in (model, serial):
        each(x).square().mean().backward()
    norm = Accelerator(cpu=True).clip_grad_norm_(model.parameters(), 0.01, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(serial.parameters(), 0.01, norm_type)
    pairs = zip(model.parameters(), serial.parameters(), strict=True)
    return [relative(norm, expected), *(relative(whole(mine.grad), theirs.grad) for mine, theirs in pairs)]


@pytest.mark.parametrize("name", ["2.5d", pytest.param("3d", marks=pytest.mark.matrix)])
def test_c2_accelerate_clips_by_the_serial_norm(ranks, name: str) -> None:
    for norm_type in (2.0, torch.inf):
        for errors in ranks(8)(clipped, GRIDS[name], norm_type):
            assert max(errors) < 1e-5


SCRIPT = """
import sys, json, torch, gingham, transformers as hf
from accelerate import Accelerator
sys.path.insert(0, sys.argv[2])
from families import build
arguments = hf.TrainingArguments(output_dir=sys.argv[1], max_steps=4, logging_steps=1, per_device_train_batch_size=4, use_cpu=True,
    report_to=[], disable_tqdm=True, dataloader_num_workers=1, save_steps=4)      # before there is a mesh
model = build("llama", vocab_size=64)
if "WORLD_SIZE" in __import__("os").environ:
    model = gingham.parallelize(model, gingham.init(mode="2d", size=4))
generator = torch.Generator().manual_seed(1)
data = [dict(input_ids=ids, labels=ids) for ids in torch.randint(2, 60, (16, 8), generator=generator)]
trainer = hf.Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
if Accelerator().is_main_process:
    print("LOSSES", json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
gingham.destroy()
"""


@pytest.mark.matrix
def test_c2_trainer_under_torchrun_with_arguments_older_than_the_mesh(tmp_path: Path) -> None:
    """Losses of torchrun's run and of one process, from the lines they print: one line, rank 0's."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]):
        command = [sys.executable, *launcher, str(script), str(tmp_path / f"out{len(found)}"), str(Path(__file__).parents[2])]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith("LOSSES")]
        assert len(lines) == 1
        found.append(json.loads(lines[0].removeprefix("LOSSES")))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
