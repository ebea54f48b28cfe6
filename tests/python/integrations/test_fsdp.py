"""torch's FSDP2 over layers of a tensor mesh: one process's numbers, checkpoints, clipping."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gingham
from gingham import nn

WIDTH, HIDDEN = 17, 33  # nothing divides
TENSOR: dict[tuple[str, ...], tuple[int, ...]] = {("tp",): (2,), ("row", "col"): (2, 2)}
pytestmark = pytest.mark.filterwarnings("ignore")


def wrapped(whole: Any) -> Any:
    model = torch.nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, WIDTH))
    for layer in model:
        fully_shard(layer, mesh=whole["dp"])
    return fully_shard(model, mesh=whole["dp"])


def serial_model() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, HIDDEN), torch.nn.LayerNorm(HIDDEN), torch.nn.Linear(HIDDEN, WIDTH))


def trained(rank: int, names: tuple[str, ...], folder: Path) -> dict[str, Any]:
    shape = TENSOR[names]
    size = 2 * torch.Size(shape).numel()
    store = dist.FileStore(os.environ["GINGHAM_STORE"] + ".group", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    whole = init_device_mesh("cpu", (2, *shape), mesh_dim_names=("dp", *names))
    mesh = gingham.init(whole[names] if len(names) > 1 else whole[names[0]], timeout=30.0)
    full = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    own = full.chunk(2)[whole.get_local_rank("dp")]
    torch.manual_seed(0)
    model = wrapped(whole)
    torch.manual_seed(0)
    serial = serial_model()
    pairs = [(each, torch.optim.AdamW(each.parameters(), lr=1e-2)) for each in (model, serial)]
    norms: list[float] = []

    def train(steps: int) -> float:
        (mine, optimizer), (theirs, other) = pairs
        for _ in range(steps):
            for each in (optimizer, other):
                each.zero_grad()
            mine(mesh.scatter(own)).square().sum().backward()
            (theirs(full).square().sum() / 2).backward()  # FSDP2 takes the mean over its ranks
            norms.extend(
                float(clip(each.parameters(), 1.0))
                for clip, each in ((gingham.clip_grad_norm_, mine), (torch.nn.utils.clip_grad_norm_, theirs))
            )
            for each in (optimizer, other):
                each.step()
        return max((p.full_tensor() - q).abs().max().item() for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))

    found: dict[str, Any] = {"error": train(3)}
    gingham.save(*pairs[0], folder / "checkpoint")
    gingham.export_safetensors(model, folder / "model.safetensors")
    torch.manual_seed(5)
    again = wrapped(whole)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    gingham.load(again, optimizer, folder / "checkpoint")
    states = [(p, q, pairs[0][1].state[p], optimizer.state[q]) for p, q in zip(model.parameters(), again.parameters(), strict=True)]
    found["same"] = all(
        torch.equal(one.to_local(), other.to_local())
        for p, q, a, b in states
        for one, other in ((p, q), (a["exp_avg"], b["exp_avg"]), (a["exp_avg_sq"], b["exp_avg_sq"]))
    )
    pairs[0] = again, optimizer
    found["resumed"] = train(2)
    found["norms"] = norms
    found["serial"] = {name: value.clone() for name, value in serial.state_dict().items()}
    gingham.destroy()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("names", [("tp",), pytest.param(("row", "col"), marks=pytest.mark.matrix)])
def test_fsdp2_over_tensor_ranks(ranks, names: tuple[str, ...], tmp_path: Path) -> None:
    for found in ranks(2 * torch.Size(TENSOR[names]).numel())(trained, names, tmp_path):
        assert found["error"] < 1e-5 and found["resumed"] < 1e-5 and found["same"]
        assert found["norms"][::2] == pytest.approx(found["norms"][1::2], rel=1e-5)
    model = serial_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gingham.load(model, optimizer, tmp_path / "checkpoint")  # of one process
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in model.state_dict().items())


def test_other_orders_of_cuts_are_refused(ranks) -> None:
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    def refused(rank: int, folder: str) -> str:
        mesh = gingham.init(mode="2d", size=4)
        layer = torch.nn.Linear(4, 4, bias=False)
        places = [Shard(0), _StridedShard(0, split_factor=2)]
        layer.weight = torch.nn.Parameter(DTensor.from_local(torch.ones(1, 4), mesh.device_mesh, places, run_check=False))
        with pytest.raises(Exception) as error:
            gingham.save(layer, None, folder)
        return str(error.value)

    assert all("weight" in said and "fully_shard" in said for said in ranks(4)(refused, "nowhere"))
