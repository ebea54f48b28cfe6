"""save_pretrained of a converted model writes what the original one would; real old files are read as transformers reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gingham
from families import FAMILIES, batch, build

hf = pytest.importorskip("transformers")
GRIDS: dict[str, dict[str, Any]] = {
    "2d": dict(mode="2d", size=4),
    "1d": dict(mode="1d", size=4),
    "2.5d": dict(mode="2.5d", size=8, depth=2),
}
Bits = dict[str, torch.Tensor]


def numbered(family: str) -> Any:
    """A model whose every element is its own."""
    model = build(family)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def stored(folder: Path) -> Bits:
    found: Bits = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(one: Bits, other: Bits) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def save_converted(rank: int, family: str, grid: dict[str, Any], folder: Path) -> list[str]:
    mesh = gingham.init(**grid)
    model = gingham.parallelize(numbered(family), mesh)
    mesh.traffic(reset=True)
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "shards", max_shard_size="6KB")
    model.save_pretrained(folder / "again", state_dict=model.state_dict(), is_main_process=rank == 0)
    model.save_pretrained(folder / "nobody", is_main_process=False)
    assert not any(count for axis in mesh.traffic().values() for count in axis.values())
    said = []
    for options in (dict(safe_serialization=False), dict(distributed_checkpoint=True)):
        with pytest.raises(NotImplementedError) as caught:
            model.save_pretrained(folder / "refused", **options)
        said.append(str(caught.value))
    model(**batch(family)).loss.backward()  # it is usable as before
    if rank == 0:
        (folder / "file").write_text("x")
    with pytest.raises(gingham.CheckpointError) as failed:
        model.save_pretrained(folder / "file" / "in it")
    assert "rank 0: " in str(failed.value) and "save_pretrained to" in str(failed.value)
    gingham.destroy()
    with pytest.raises(gingham.MeshError, match="would write alone"):
        model.save_pretrained(folder / "refused")
    return said


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=[] if (family, name) in (("gpt2", "2d"), ("bert", "2d")) else pytest.mark.matrix)
        for family in FAMILIES
        for name in GRIDS
    ],
)
def test_c1_save_pretrained_of_a_converted_model(ranks: Any, family: str, name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        original = numbered(family)
        original.save_pretrained(tmp_path / "expected")
        original.save_pretrained(tmp_path / "expected shards", max_shard_size="6KB")
    said = ranks(GRIDS[name]["size"])(save_converted, family, GRIDS[name], tmp_path)
    assert all("safe_serialization=False" in first and "distributed_checkpoint" in second for first, second in said)
    for folder in ("one", "again"):
        assert same(stored(tmp_path / folder), stored(tmp_path / "expected"))
        configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in (folder, "expected")]
        assert configs[0] == configs[1]
        assert sorted(file.name for file in (tmp_path / folder).iterdir()) == sorted(
            file.name for file in (tmp_path / "expected").iterdir()
        )
    index, theirs = (json.loads((tmp_path / each / "model.safetensors.index.json").read_text()) for each in ("shards", "expected shards"))
    assert index["weight_map"].keys() == theirs["weight_map"].keys() and len(set(index["weight_map"].values())) > 3
    assert not list((tmp_path / "nobody").glob("*")) and not (tmp_path / "refused").exists()
    expected = dict(original.named_parameters())
    for folder in ("one", "shards"):
        read = dict(type(original).from_pretrained(tmp_path / folder).named_parameters())
        assert read.keys() == expected.keys() and all(torch.equal(read[key], expected[key]) for key in expected)


def read_old(rank: int, folder: Path) -> str:
    model = gingham.parallelize(build("bert"), gingham.init(mode="2d", size=4))
    gingham.import_safetensors(model, folder / "old.safetensors")
    with pytest.raises(gingham.CheckpointError) as caught:
        gingham.import_safetensors(model, folder / "odd.safetensors")
    gingham.import_safetensors(model, folder / "odd.safetensors", strict=False)
    gingham.export_safetensors(model, folder / "out")
    return str(caught.value)


def test_c9_old_files_hold_buffers_that_are_computed_today(ranks: Any, tmp_path: Path) -> None:
    """position_ids and inv_freq were once saved with the weights; transformers passes over them, and so do we. Others are named."""
    with torch.random.fork_rng():
        model = numbered("bert")
        model.save_pretrained(tmp_path / "new")
    held = stored(tmp_path / "new")
    old = {**held, "bert.embeddings.position_ids": torch.arange(32)[None]}
    save_file(old, tmp_path / "old.safetensors")
    save_file({**old, "bert.embeddings.position_idx": torch.arange(32)}, tmp_path / "odd.safetensors")
    said = ranks(4)(read_old, tmp_path)
    assert "bert.embeddings.position_idx: is in the files, expected nothing of that name (strict=False" in said[0]
    assert "position_ids" not in said[0]
    assert all(torch.equal(value, stored(tmp_path / "out")[key]) for key, value in held.items())
    # by the bare model, whose keys have no prefix, and by its buffers' own names
    bare = hf.BertModel(model.config, add_pooling_layer=False)
    inner = {key.removeprefix("bert."): value for key, value in old.items() if key.startswith("bert.")}
    save_file(inner, tmp_path / "bare.safetensors")
    gingham.import_safetensors(bare, tmp_path / "bare.safetensors")
    with torch.random.fork_rng():
        llama = numbered("llama")
    llama.save_pretrained(tmp_path / "llama")
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(2) for layer in range(2)}
    save_file({**stored(tmp_path / "llama"), **frequencies}, tmp_path / "llama.safetensors")
    gingham.import_safetensors(llama, tmp_path / "llama.safetensors")
    # and of a model that is not transformers' at all
    plain = torch.nn.Linear(2, 2)
    plain.register_buffer("scale", torch.ones(2), persistent=False)
    save_file({**plain.state_dict(), "scale": torch.ones(2)}, tmp_path / "plain.safetensors")
    gingham.import_safetensors(plain, tmp_path / "plain.safetensors")
