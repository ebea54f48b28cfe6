"""Checkpoints and Hugging Face files of parallelized models: what from_pretrained reads fits them, and theirs fit it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gingham
from families import FAMILIES, build

GRIDS = {"2.5d": dict(mode="2.5d", size=8, depth=2), "3d": dict(mode="3d", size=8)}
Bits = dict[str, torch.Tensor]


def trained(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with state: every gradient half of its weight."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.5
    optimizer.step()
    return optimizer


def through(rank: int, grid: dict[str, Any], family: str, folder: Path) -> None:
    """Imports, exports, loads and saves a parallelized model that began with other weights."""
    mesh = gingham.init(**grid)
    model = build(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model = gingham.parallelize(model, mesh)
    gingham.import_safetensors(model, folder / "pretrained")
    gingham.export_safetensors(model, folder / "exported", shard_size="10KB")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    assert gingham.load(model, optimizer, folder / "run") == 7
    gingham.save(model, optimizer, folder / "back", step=8)


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(f, g, marks=[] if (f, g) == ("gpt2", "2.5d") else pytest.mark.matrix) for f in FAMILIES for g in GRIDS],
)
def test_files_of_pretrained_models(ranks: Any, family: str, name: str, tmp_path: Path) -> None:
    """Its weights (fused ones, tied ones) and AdamW state go through 8 ranks and come back to the bit."""
    pytest.importorskip("transformers")
    with torch.random.fork_rng():
        model = build(family)
        with torch.no_grad():
            for parameter in model.parameters():  # also those that begin as zeros and ones
                parameter.add_(torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "pretrained", max_shard_size="8KB")
        optimizer = trained(model)
        gingham.save(model, optimizer, tmp_path / "run", step=7)
        ranks(8)(through, GRIDS[name], family, tmp_path)
        exported = type(model).from_pretrained(_with_config(tmp_path))
        other = build(family)
        other_optimizer = torch.optim.AdamW(other.parameters(), fused=True)
        assert gingham.load(other, other_optimizer, tmp_path / "back") == 8
    expected = dict(model.named_parameters())
    for found in (dict(exported.named_parameters()), dict(other.named_parameters())):
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    for key, parameter in other.named_parameters():
        states = optimizer.state[expected[key]], other_optimizer.state[parameter]
        assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][part], states[1][part]) for part in states[0]), key


def _with_config(folder: Path) -> Path:
    (folder / "exported" / "config.json").write_bytes((folder / "pretrained" / "config.json").read_bytes())
    return folder / "exported"
