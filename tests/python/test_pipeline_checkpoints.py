"""Checkpoints of pipelines: under the whole model's keys, bitwise from any mesh to any other, with the next step's loss."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gingham
from pipelines import gpt, sample, tied

HYBRIDS: dict[str, tuple[int, dict[str, Any], str]] = {
    "serial": (0, {}, "1f1b"),
    "one": (1, dict(tensor=dict(size=1)), "1f1b"),
    "2d": (4, dict(tensor=dict(size=4, mode="2d")), "1f1b"),
    "2": (2, dict(pipeline=2), "1f1b"),
    "2 zbv": (2, dict(pipeline=2), "zbv"),
    "2 x 1d": (4, dict(pipeline=2, tensor=dict(size=2, mode="1d")), "interleaved"),
    "2 x 2 all": (4, dict(pipeline=2, data=dict(size=2, shard="all")), "1f1b"),
    "3 x 1d": (6, dict(pipeline=3, tensor=dict(size=2, mode="1d")), "gpipe"),
    "2 x 2 x 2": (8, dict(pipeline=2, data=2, tensor=dict(size=2, mode="1d")), "zero_bubble"),
    "2 x 2d": (8, dict(pipeline=2, tensor=dict(size=4, mode="2d")), "dual"),
}
QUICK = [("2 x 1d", "serial"), ("serial", "2 zbv"), ("2", "2 x 1d")]
MATRIX = [
    ("2 x 2 x 2", "2 x 2d"), ("2 x 2d", "3 x 1d"), ("3 x 1d", "2 x 2 all"), ("2 x 2 all", "2 x 2 x 2"), ("2 zbv", "2"), ("2d", "2 x 1d"),
    ("2 x 2d", "2d"), ("2 x 1d", "one"), ("one", "3 x 1d"), ("3 x 1d", "serial"), ("2 x 2 x 2", "serial"), ("2", "2 x 2 x 2"),
]  # fmt: skip


def batch(kind: str, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, targets = sample(8, step)
    return (ids % 64, torch.where(targets < 0, targets, targets % 64)) if kind == "tied" else (ids, targets)


def stepped(model: Any, optimizer: Any, kind: str, step: int, serial: bool) -> float:
    optimizer.zero_grad()
    ids, targets = batch(kind, step)
    if not serial:
        loss = model.step(ids, targets).item()
    else:
        loss = 0.0
        for x, target in zip(ids.tensor_split(4), targets.tensor_split(4), strict=True):
            part = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), target.flatten(), reduction="sum") / (targets != -100).sum()
            part.backward()
            loss += part.item()
    optimizer.step()
    return loss


def run(rank: int, name: str, kind: str, folder: str, load: bool) -> Any:
    """The state that was saved or loaded, by key, and the loss of the step after it."""
    _, config, schedule = HYBRIDS[name]
    serial = name == "serial"
    mesh = None if serial else gingham.init(parallel=config, timeout=30.0)
    model = (gpt if kind == "gpt" else tied)(mesh, torch.float64)
    if load:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.5)
    if not serial:
        model = gingham.pipeline(model, mesh, 4, schedule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if load:
        assert gingham.load(model, optimizer, folder) == 3
    else:
        stepped(model, optimizer, kind, 0, serial)
        gingham.save(model, optimizer, folder, step=3)

    def full(x: Any) -> torch.Tensor:
        return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()

    held = {name: full(weight) for name, weight in model.named_parameters()}
    held |= {f"{name} moment": full(optimizer.state[weight]["exp_avg"]) for name, weight in model.named_parameters()}
    return held, stepped(model, optimizer, kind, 1, serial)


@pytest.mark.parametrize("kind", ["gpt", "tied"])
@pytest.mark.parametrize(
    ("source", "target"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.matrix) for pair in MATRIX)], ids=lambda name: str(name)
)
def test_from_any_hybrid_to_any_other(ranks, tmp_path: Path, source: str, target: str, kind: str) -> None:
    def on(name: str, load: bool) -> list[Any]:
        arguments = name, kind, str(tmp_path / "run"), load
        return [run(0, *arguments)] if name == "serial" else ranks(HYBRIDS[name][0])(run, *arguments)

    saved, loaded = on(source, False), on(target, True)
    whole = {key: tensor for held, _ in saved for key, tensor in held.items()}
    seen: set[str] = set()
    for held, loss in loaded:
        assert loss == pytest.approx(saved[0][1], rel=1e-12)
        for key, tensor in held.items():
            key = key if key in whole else key.replace("head.weight", "table.weight")  # tied: held under its later key by a stage alone
            assert torch.equal(tensor, whole[key]), key
            seen.add(key)
    assert seen | {"head.weight", "head.weight moment"} >= whole.keys()


def refused(rank: int, folder: str) -> Any:
    mesh = gingham.init(parallel=dict(pipeline=2), timeout=30.0)
    model = gingham.pipeline(gpt(mesh, torch.float32), mesh, 2)
    with pytest.raises(NotImplementedError, match="ckpt convert"):
        gingham.export_safetensors(model, folder)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gingham.save(model, optimizer, folder)
    other = gingham.pipeline(tied(mesh, torch.float32), mesh, 2)
    with pytest.raises(gingham.CheckpointError) as error:
        gingham.load(other, torch.optim.SGD(other.parameters(), 0.1), folder)
    return str(error.value)


def test_other_models_keys_are_told(ranks, tmp_path: Path) -> None:
    for text in ranks(2)(refused, str(tmp_path / "run")):
        assert "table.weight" in text or "token.weight" in text
