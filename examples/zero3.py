"""A small Llama with ZeRO-3 over two hosts: parameters, gradients and optimizer states are cut over 2 data ranks, one a host, and 2 tensor
ranks inside each; every data rank loads its own batches. Beside it one process on the joined batches.

python examples/zero3.py                                         starts its own 4 ranks, as two virtual hosts on this machine
torchrun --nnodes 2 --nproc-per-node 2 .. examples/zero3.py      on two hosts, with their --rdzv-endpoint
"""

import argparse
import os
from collections.abc import Iterable
from typing import Any

import torch
from llama import build
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gingham
from gingham.commands.gpt import read_text

ROWS, LENGTH, DATA = 6, 48, 2


def windows(text: str | None) -> TensorDataset:
    read = read_text(text)
    return TensorDataset(read[: len(read) // LENGTH * LENGTH].view(-1, LENGTH).long())


def train(model: Any, batches: Iterable[Any], options: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
    clip = gingham.clip_grad_norm_ if gingham.mesh.has_mesh() else torch.nn.utils.clip_grad_norm_
    losses = []
    for _, (ids,) in zip(range(options.steps), batches, strict=False):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss  # of the job: the mean over all data ranks' tokens
        loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def joined(dataset: TensorDataset) -> Iterable[Any]:
    """What the data ranks load, one after the other."""
    loaders = [DataLoader(dataset, ROWS, sampler=DistributedSampler(dataset, DATA, rank)) for rank in range(DATA)]
    for parts in zip(*loaders, strict=True):
        yield (torch.cat([ids for (ids,) in parts]),)


def main(rank: int, options: Any, parallel: dict[str, Any]) -> tuple[list[float], list[float], float]:
    """The losses on the mesh; on rank 0 those of one process; the part of all parameters that this rank holds."""
    mesh = gingham.init(parallel=parallel)
    model, dataset = gingham.parallelize(build(), mesh), windows(options.text)
    loader = DataLoader(dataset, ROWS, sampler=mesh.sampler(dataset))
    losses = train(model, loader, options)
    held = sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    crossed = sum(counts.get("bytes_crossed", 0) for counts in mesh.traffic().values())
    gingham.destroy()
    serial = train(build(), joined(dataset), options) if rank == 0 else []
    if rank == 0:
        print(f"{mesh}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, serial {serial[-1]:.4f}")
        print(f"a rank holds {held:.3f} of the parameters; {crossed / options.steps / 1e6:.2f} MB a step came to it from the other host")
    return losses, serial, held


def on_virtual_hosts(rank: int, options: Any, parallel: dict[str, Any]) -> Any:
    os.environ["GINGHAM_HOST"] = "ab"[rank // 2]
    try:
        return main(rank, options, parallel)
    finally:
        del os.environ["GINGHAM_HOST"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--text", help="a file or folder")
    options = parser.parse_args()
    parallel = dict(data=dict(size=DATA, shard="all"), tensor=dict(size=2, mode="1d"))
    if "RANK" in os.environ:
        main(int(os.environ["RANK"]), options, parallel)
    else:
        gingham.spawn(on_virtual_hosts, 2 * DATA, options, parallel)
