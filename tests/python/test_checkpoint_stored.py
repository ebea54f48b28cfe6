"""Safetensors folders of strangers: names and links that leave the folder, tables that are none, files of two models."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gingham
from gingham.commands.cli import main


def net(value: float) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 4))
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def index_of(folder: Path, places: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_b3_safetensors_indexes_of_strangers(tmp_path: Path) -> None:
    """Names that leave the folder, links, tables that are none, files of two models; the hub's cache of links is read."""
    model, tensors = net(2.0), {name: value.clone() for name, value in net(3.0).state_dict().items()}
    save_file(tensors, tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "sub/../x", 5, None):
        folder = index_of(tmp_path / "x", dict.fromkeys(tensors, name))
        with pytest.raises(gingham.CheckpointError, match=r"without folders|no table of files"):
            gingham.import_safetensors(model, folder)
        assert main(["ckpt", "inspect", str(folder)]) == 2
        assert main(["ckpt", "convert", str(folder), str(tmp_path / "out")]) == 2
    os.symlink(tmp_path / "secret.safetensors", tmp_path / "x" / "model-a.safetensors")
    with pytest.raises(gingham.CheckpointError, match="is a link to"):
        gingham.import_safetensors(model, index_of(tmp_path / "x", dict.fromkeys(tensors, "model-a.safetensors")))
    for places in ([], "x", {"a": {}}):
        with pytest.raises(gingham.CheckpointError):
            gingham.import_safetensors(model, index_of(tmp_path / "x", places))
    save_file(tensors, tmp_path / "y.safetensors")
    two = tmp_path / "two"
    two.mkdir()
    for name in ("model-a.safetensors", "model-b.safetensors"):
        save_file(tensors, two / name)
    names = sorted(tensors)
    with pytest.raises(gingham.CheckpointError, match="different models"):
        gingham.import_safetensors(model, index_of(two, {key: f"model-{'ab'[key == names[0]]}.safetensors" for key in names}))
    assert all(bool((parameter == 2.0).all()) for parameter in model.parameters())
    cache = tmp_path / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    save_file(tensors, cache / "blobs" / "0f3a")
    os.symlink("../../blobs/0f3a", cache / "snapshots" / "abc" / "model.safetensors")
    gingham.import_safetensors(model, cache / "snapshots" / "abc")
    assert all(bool((parameter == 3.0).all()) for parameter in model.parameters())
