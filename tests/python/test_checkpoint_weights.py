"""safetensors in Hugging Face's file layout, and the ckpt command: any grid, both directions, one tensor at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gingham
from gingham.checkpoint import weights
from gingham.commands.cli import main

GRIDS: list[Any] = [
    dict(mode="2.5d", size=8, depth=2),
    dict(mode="3d", size=8),
    pytest.param(dict(mode="1d", size=4), marks=pytest.mark.matrix),
    pytest.param(dict(grid=(1, 3, 2), size=6), marks=pytest.mark.matrix),
]
SHAPE = dict(layers=1, width=36, heads=12, context=8, dropout=0.0)
Bits = dict[str, torch.Tensor]


def serial(seed: int = 3, **changed: Any) -> torch.nn.Module:
    from gingham.commands.gpt import GPT, Shape, serial_kit

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(serial_kit(), Shape(**(SHAPE | changed)))
    model.register_buffer("count", torch.tensor(seed))
    model.register_buffer("flags", torch.tensor([True, False, bool(seed % 2)]))
    return model


def parallel(grid: dict[str, Any], seed: int, **changed: Any) -> torch.nn.Module:
    from gingham.commands.gpt import GPT, Shape, parallel_kit

    mesh = gingham.init(**grid)
    torch.manual_seed(seed)
    model = GPT(parallel_kit(mesh), Shape(**(SHAPE | changed)))
    model.register_buffer("count", torch.tensor(seed))
    model.register_buffer("flags", torch.tensor([True, False, bool(seed % 2)]))
    return model


def equal(one: Bits, other: Bits) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def stored(path: Path) -> Bits:
    if (path / weights.SINGLE).exists():
        return load_file(path / weights.SINGLE)
    places = json.loads((path / weights.INDEX).read_text())["weight_map"]
    found = {key: value for file in sorted(set(places.values())) for key, value in load_file(path / file).items()}
    assert set(places) == found.keys()
    return found


def there_and_back(rank: int, grid: dict[str, Any], source: Path, target: Path) -> tuple[int, int]:
    """Imports, exports; bytes that this rank read, and bytes of its blocks."""
    model = parallel(grid, seed=8)
    count, read = [0], weights.Stored.read

    def counting(self: Any, key: str, place: Any, lengths: Any) -> torch.Tensor:
        found = read(self, key, place, lengths)
        count[0] += found.numel() * found.element_size()
        return found

    weights.Stored.read = counting  # type: ignore[method-assign]
    try:
        gingham.import_safetensors(model, source)
    finally:
        weights.Stored.read = read  # type: ignore[method-assign]
    mesh = gingham.mesh.current()
    mesh.traffic(reset=True)
    gingham.export_safetensors(model, target, shard_size="20KB")
    assert not any(count for axis in mesh.traffic().values() for count in axis.values())
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in model.state_dict().values()]
    return count[0], sum(tensor.numel() * tensor.element_size() for tensor in local)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.get("mode", "1x3x2"))
@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.matrix), True])
def test_import_reads_only_my_blocks_and_export_gives_the_same_file(ranks: Any, grid: Any, sharded: bool, tmp_path: Path) -> None:
    model = serial()
    gingham.export_safetensors(model, tmp_path / "source", shard_size="9 KB" if sharded else "5GB")
    files = [load_file(file) for file in (tmp_path / "source").glob("*.safetensors")]
    assert (len(files) > 4) == sharded
    assert not sharded or all(len(held) == 1 or sum(t.numel() * t.element_size() for t in held.values()) <= 9_000 for held in files)
    assert equal(stored(tmp_path / "source"), model.state_dict())
    for read, held in ranks(grid["size"])(there_and_back, grid, tmp_path / "source", tmp_path / "target"):
        assert read == held
    assert equal(stored(tmp_path / "target"), model.state_dict())
    other = serial(seed=4)
    gingham.import_safetensors(other, tmp_path / "target")
    assert equal(other.state_dict(), model.state_dict())


def test_an_export_replaces_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for seed, size in ((1, "9KB"), (2, "1GB"), (3, 9_000)):
        model = serial(seed)
        gingham.export_safetensors(model, tmp_path, shard_size=size)
        assert equal(stored(tmp_path), model.state_dict())
        assert (tmp_path / weights.SINGLE).exists() != (tmp_path / weights.INDEX).exists() and (tmp_path / "config.json").exists()
    gingham.export_safetensors(model, tmp_path / "one.safetensors", shard_size=9_000)
    assert equal(load_file(tmp_path / "one.safetensors"), model.state_dict())
    with pytest.raises(ValueError, match="shard_size"):
        gingham.export_safetensors(model, tmp_path, shard_size="many")
    model.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(gingham.CheckpointError, match="odd: is torch.complex128, which safetensors files cannot hold"):
        gingham.export_safetensors(model, tmp_path)


def refused(rank: int, grid: dict[str, Any], path: Path) -> list[str]:
    said = []
    model = parallel(grid, seed=8, width=48)
    for change in ("shapes", "keys", "dtype"):
        if change == "keys":
            gingham.destroy()
            model = parallel(grid, seed=8, layers=2)
            del model.count
        if change == "dtype":
            gingham.destroy()
            model = parallel(grid, seed=8)
            model.norm.bfloat16() if rank == 2 else None
        with pytest.raises(gingham.CheckpointError) as caught:
            gingham.import_safetensors(model, path)
        said.append(str(caught.value))
    gingham.import_safetensors(model, path, strict=False)
    return said


def test_files_that_do_not_fit(ranks: Any, tmp_path: Path) -> None:
    save_file(serial().state_dict(), tmp_path / weights.SINGLE)
    answers = ranks(8)(refused, GRIDS[0], tmp_path)
    assert all(said == answers[0] for said in answers)
    shapes, keys, dtype = answers[0]
    assert "token.weight: got shape (256, 36) in the file, expected (256, 48), the model's" in shapes
    assert "blocks.1.norm1.weight: got nothing" in keys and "more)" in keys
    assert "rank 2: norm.weight: got torch.float32, expected torch.bfloat16" in dtype and "rank 0" not in dtype
    with pytest.raises(gingham.CheckpointError, match="there is neither"):
        gingham.import_safetensors(serial(), tmp_path / "nothing")


class Tied(torch.nn.Module):
    """What a Hugging Face model says of its keys."""

    base_model_prefix = "transformer"
    _keys_to_ignore_on_load_unexpected = [r"\.masked_bias$"]

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.head = torch.nn.Module(), torch.nn.Module()
        self.transformer.wte = torch.nn.Embedding(7, 4)
        self.head.weight = self.transformer.wte.weight


def test_prefixes_ties_and_ignored_keys(tmp_path: Path) -> None:
    table, model = torch.randn(7, 4), Tied()
    for names in ({"wte.weight"}, {"transformer.wte.weight"}, {"head.weight", "h.0.masked_bias"}):
        model.head.weight.data.zero_()
        save_file({name: table.clone() for name in names}, tmp_path / "x.safetensors")
        gingham.import_safetensors(model, tmp_path / "x.safetensors")
        assert torch.equal(model.head.weight.detach(), table)
    save_file({"wte.weight": table, "more": table + 1}, tmp_path / "x.safetensors")
    with pytest.raises(gingham.CheckpointError, match="more: is in the files, expected nothing"):
        gingham.import_safetensors(model, tmp_path / "x.safetensors")
    gingham.export_safetensors(model, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == {"transformer.wte.weight"}


def test_a_wider_dtype_takes_a_narrower_file(tmp_path: Path) -> None:
    model, narrow = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3).bfloat16()
    save_file(narrow.state_dict(), tmp_path / weights.SINGLE)
    gingham.import_safetensors(model, tmp_path)
    assert model.weight.dtype == torch.float32 and torch.equal(model.weight.bfloat16(), narrow.weight)


def train_and_save(rank: int, path: Path) -> None:
    model = parallel(GRIDS[0], seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    for step in (16, 17, 18):
        gingham.save(model, optimizer, path, step=step)


def test_inspect_and_convert(ranks: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    ranks(8)(train_and_save, tmp_path / "run")
    (tmp_path / "run" / ".writing-00000004").mkdir()
    assert main(["ckpt", "inspect", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for part in ("complete, step 18", "depth 2 x row 2 x col 2", "00000002: complete, older", ".writing-00000004: not complete"):
        assert part in " ".join(out.split()), out
    assert "model.token.weight" in out and "256 x 36" in out and "36.9 KB" in out and "exp_avg_sq" in out and "int64" in out
    model = serial()
    assert main(["ckpt", "convert", str(tmp_path / "run"), str(tmp_path / "hub"), "--shard-size", "20KB"]) == 0
    out = capsys.readouterr().out
    assert "left out" in out and "optimizer" in out and "rng" in out
    assert equal(stored(tmp_path / "hub"), model.state_dict())
    assert main(["ckpt", "inspect", str(tmp_path / "hub")]) == 0
    assert "token.weight" in capsys.readouterr().out
    assert main(["ckpt", "convert", str(tmp_path / "hub"), str(tmp_path / "again")]) == 0
    other = serial(seed=4)
    assert gingham.load(other, None, tmp_path / "again") is None
    assert equal(other.state_dict(), model.state_dict())
    with pytest.raises(gingham.CheckpointError, match="pass optimizer=None"):
        gingham.load(other, torch.optim.AdamW(other.parameters()), tmp_path / "again")
    victim = sorted((tmp_path / "run" / "00000003").glob("*.distcp"))[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    assert main(["ckpt", "inspect", str(tmp_path / "run")]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    assert main(["ckpt", "inspect", str(tmp_path / "nothing")]) == 2
    assert main(["ckpt", "convert", str(tmp_path / "nothing"), str(tmp_path / "x")]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_convert_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """A checkpoint of 24 tensors of 4 MB: neither direction may take memory for more than a few of them."""
    import resource
    import subprocess
    import sys

    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(24)])
    gingham.save(model, None, tmp_path / "run")
    script = (
        "import resource, sys\nfrom gingham.commands.cli import main\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert main(['ckpt', 'convert', *sys.argv[1:]]) == 0\n"
        "print('grew', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    for source, target in (("run", "hub"), ("hub", "again")):
        command = [sys.executable, "-c", script, str(tmp_path / source), str(tmp_path / target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        grew = int(done.stdout.split("grew")[1])
        # mapped pages of the source file count too, hence the second bound below the whole model's 96 MB
        assert grew < (40_000 if source == "run" else 80_000), (source, grew)
