"""What a checkpoint of strangers, or one that a disk has damaged, can do: nothing. It is refused before a model is touched."""

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

import gingham
from gingham.checkpoint import blocks
from gingham.commands.cli import main

Files = dict[str, bytes]


class Net(torch.nn.Module):
    def __init__(self, value: float = 0.0, layers: Any = torch.nn) -> None:
        super().__init__()
        self.first, self.second = layers.Linear(6, 10), layers.Linear(10, 4)
        for parameter in self.parameters():
            parameter.data.fill_(value)


def run_of(value: float, layers: Any = torch.nn) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = Net(value, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=value / 8)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.5
    optimizer.step()
    return model, optimizer


def save_two(rank: int, path: Path) -> None:
    gingham.init(mode="2d", size=4)
    for value in (1.0, 2.0):
        gingham.save(*run_of(value, gingham.nn), path, step=int(value))


@pytest.fixture(scope="module")
def pair(pools: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, Files]:
    """The files of two checkpoints of one model that four ranks wrote."""
    from pool import Pool

    path = tmp_path_factory.mktemp("pair")
    pools.setdefault(4, Pool(4))(save_two, path)
    return bytes_of(path / "00000001"), bytes_of(path / "00000002")


def bytes_of(folder: Path) -> Files:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def put(folder: Path, files: Files) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def everything(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [
        tensor.clone() for tensor in [*model.parameters(), *states, torch.get_rng_state(), torch.tensor(optimizer.param_groups[0]["lr"])]
    ]


def refused(folder: Path) -> str:
    """The words with which load refuses it; nothing may have changed."""
    with torch.random.fork_rng():
        model, optimizer = run_of(5.0)
        before = everything(model, optimizer)
        with pytest.raises(gingham.CheckpointError) as caught:
            gingham.load(model, optimizer, folder)
        after = everything(model, optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True)), "a refused load changed the model"
    assert "half loaded" not in str(caught.value)
    return str(caught.value)


def flipped(files: Files, draw: random.Random) -> Files:
    name = draw.choice(sorted(files))
    at = draw.randrange(len(files[name]))
    changed = bytearray(files[name])
    changed[at] ^= 1 << draw.randrange(8)
    return {**files, name: bytes(changed)}


def truncated(files: Files, draw: random.Random) -> Files:
    name = draw.choice(sorted(files))
    cut = draw.choice([0, 1, len(files[name]) // 2, len(files[name]) - 1, draw.randrange(len(files[name])), -1])
    return {**files, name: files[name] + b"\0" if cut < 0 else files[name][:cut]}


def mixed(one: Files, other: Files, draw: random.Random) -> Files:
    while True:
        found = {name: draw.choice([one, other])[name] for name in one}
        if found not in (one, other):
            return found


def damaged(pair: tuple[Files, Files], count: int) -> list[Files]:
    draw = random.Random(count)
    makers: list[Callable[[], Files]] = [
        lambda: flipped(pair[0], draw),
        lambda: flipped(pair[1], draw),
        lambda: truncated(pair[0], draw),
        lambda: mixed(*pair, draw),
    ]
    return [makers[index % len(makers)]() for index in range(count)]


@pytest.mark.parametrize("count", [500, pytest.param(4000, marks=pytest.mark.matrix)])
def test_a25_damage_is_refused_before_the_model_is_touched(pair: tuple[Files, Files], tmp_path: Path, count: int) -> None:
    """Flipped bits, truncations and files of two checkpoints: all refused, in every file, by load and by `ckpt verify`."""
    model, optimizer = run_of(5.0)
    with torch.random.fork_rng():
        assert gingham.load(model, optimizer, put(tmp_path / "whole", pair[0])) == 1
    for index, files in enumerate(damaged(pair, count)):
        folder = put(tmp_path / "damaged", files)
        refused(folder)
        assert index % 8 or main(["ckpt", "verify", str(folder)]) == 1


def test_a25_large_blocks_are_summed_as_they_arrive(tmp_path: Path) -> None:
    """A block beyond the small ones: flips in its head, its numbers and its end; and a view that is not contiguous."""
    model = torch.nn.Linear(300, 300)
    model.weight = torch.nn.Parameter(torch.randn(300, 300).t())
    gingham.save(model, None, tmp_path / "run")
    files, other = bytes_of(tmp_path / "run" / "00000001"), torch.nn.Linear(300, 300)
    assert gingham.load(other, None, tmp_path / "run") is None and torch.equal(other.weight, model.weight)
    draw, size = random.Random(1), len(files["__0_0.distcp"])
    for at in [*range(1500, 4000, 97), *(draw.randrange(size) for _ in range(60)), *range(size - 3000, size, 97)]:
        changed = bytearray(files["__0_0.distcp"])
        changed[at] ^= 1 << draw.randrange(8)
        before = other.weight.detach().clone()
        with pytest.raises(gingham.CheckpointError):
            gingham.load(other, None, put(tmp_path / "x", {**files, "__0_0.distcp": bytes(changed)}))
        assert torch.equal(other.weight, before)


def test_a25_verify_and_lost_or_missing_checksums(pair: tuple[Files, Files], tmp_path: Path, capsys: Any) -> None:
    whole = put(tmp_path / "whole", pair[0])
    assert main(["ckpt", "verify", str(whole)]) == 0
    assert "all as written" in " ".join(capsys.readouterr().out.split())
    assert "has lost its checksums.json" in refused(put(tmp_path / "x", {k: v for k, v in pair[0].items() if k != "checksums.json"}))
    hidden = {**pair[0], "__2_0.distcp": b""}
    hidden.pop("__2_0.distcp")
    assert "__2_0.distcp: got 0 bytes" in refused(put(tmp_path / "x", hidden))
    # what torch itself wrote has none: loaded with a word, nothing to verify
    from torch.distributed.checkpoint import save

    model = Net(3.0)
    with pytest.warns(UserWarning):
        save({f"model.{name}": value for name, value in model.state_dict().items()}, checkpoint_id=tmp_path / "torch", no_dist=True)
    other = Net()
    with pytest.warns(UserWarning, match=r"has no checksums\.json"):
        gingham.load(other, None, tmp_path / "torch")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert main(["ckpt", "verify", str(tmp_path / "torch")]) == 2


def test_a25_a_folder_of_format_1_loads_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gingham wrote before there were checksums; the next save has them."""
    model, other = Net(3.0), Net()
    monkeypatch.setattr("gingham.checkpoint.state.FORMAT", 1)
    gingham.save(model, None, tmp_path, step=4)
    monkeypatch.undo()
    (tmp_path / "00000001" / "checksums.json").unlink()
    with pytest.warns(UserWarning, match=r"has no checksums\.json"):
        assert gingham.load(other, None, tmp_path) == 4
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    gingham.save(model, None, tmp_path, step=5, keep=1)
    assert gingham.load(other, None, tmp_path) == 5 and len(list(tmp_path.iterdir())) == 1


def test_b3_metadata_of_torch_itself_is_read(tmp_path: Path, capsys: Any) -> None:
    """Nested dicts and lists, bytes, 16-bit and whole numbers, a scalar, an empty tensor."""
    from torch.distributed.checkpoint import save

    state = {
        "a": torch.zeros(3, dtype=torch.bfloat16),
        "n": {"b": 5, "l": [torch.ones(2, 2), "x"]},
        "s": torch.tensor(1),
        "e": torch.empty(0, 4),
    }
    with pytest.warns(UserWarning):
        save(state, checkpoint_id=tmp_path / "torch", no_dist=True)
    assert main(["ckpt", "inspect", str(tmp_path / "torch")]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert main(["ckpt", "convert", str(tmp_path / "torch"), str(tmp_path / "out")]) == 0


def load_damaged(rank: int, path: Path) -> str:
    gingham.init(mode="2d", size=4)
    model = Net(7.0, gingham.nn)
    with pytest.raises(gingham.CheckpointError) as caught:
        gingham.load(model, None, path)
    assert all(bool((parameter.to_local() == 7.0).all()) for parameter in model.parameters())
    return str(caught.value)


def test_a25_damage_that_one_rank_finds_is_told_to_all(pair: tuple[Files, Files], ranks: Any, tmp_path: Path) -> None:
    changed = bytearray(pair[0]["__3_0.distcp"])
    changed[len(changed) // 2] ^= 4
    said = ranks(4)(load_damaged, put(tmp_path / "x", {**pair[0], "__3_0.distcp": bytes(changed)}))
    assert len(set(said)) == 1 and "__3_0.distcp" in said[0] and "got checksum" in said[0]


def with_metadata(files: Files, packed: bytes) -> Files:
    """The files with another .metadata and checksums that fit it: who can write the one can write the others."""
    table = json.loads(files["checksums.json"])
    del table["crc32c"]
    table["metadata"] = [len(packed), blocks.crc32c(packed)]
    body = json.dumps(table, separators=(",", ":"))[1:].encode()
    return {**files, ".metadata": packed, "checksums.json": blocks._head(body) + body}


def signed(files: Files, metadata: Any) -> Files:
    """The files with other metadata and checksums of all blocks that it names."""
    table: dict[str, list[Any]] = {}
    for info in metadata.storage_data.values():
        data = files[info.relative_path][info.offset : info.offset + info.length]
        table.setdefault(info.relative_path, []).append([info.offset, info.length, blocks.crc32c(data), -1])
    body = json.dumps({"format": 2, "metadata": [0, 0], "files": table})[1:].encode()
    return with_metadata({**files, "checksums.json": blocks._head(body) + body}, pickle.dumps(metadata))


class Run:
    """Pickled, it is a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def harmful(files: Files, folder: Path, flag: Path) -> list[bytes]:
    """Pickles that would make the file `flag`, alone or within metadata that is otherwise whole."""
    call = Run(os.mkdir, str(flag))
    found = [pickle.dumps(call), pickle.dumps(Run(eval, f"__import__('os').mkdir({str(flag)!r})"), protocol=0)]
    for place in ("planner_data", "storage_meta", "version", "storage_data"):
        metadata = FileSystemReader(folder).read_metadata()
        setattr(metadata, place, {"x": call})
        found.append(pickle.dumps(metadata))
    metadata = FileSystemReader(folder).read_metadata()
    metadata.state_dict_metadata["model.first.weight"].properties = call
    found.append(pickle.dumps(metadata))
    # a class that is known, and by its dotted name what stands behind it: Metadata.__init__.__globals__ ..
    known = b"\x8c&torch.distributed.checkpoint.metadata"
    found.append(b"\x80\x04" + known + b"\x8c\x11Metadata.__init__\x93)R.")
    return found


def test_b3_code_in_metadata_never_runs(pair: tuple[Files, Files], tmp_path: Path) -> None:
    """load, `ckpt inspect`, `ckpt verify` and `ckpt convert` refuse it by name."""
    flag, whole = tmp_path / "flag", put(tmp_path / "whole", pair[0])
    for packed in harmful(pair[0], whole, flag):
        for files in (with_metadata(pair[0], packed), {".metadata": packed}):
            folder = put(tmp_path / "x", files)
            assert "metadata of a checkpoint" in refused(folder)
            assert main(["ckpt", "inspect", str(folder)]) == 1
            assert main(["ckpt", "verify", str(folder)]) == 1
            assert main(["ckpt", "convert", str(folder), str(tmp_path / "out")]) == 2
        assert not flag.exists()


def test_b3_code_in_blocks_never_runs(pair: tuple[Files, Files], tmp_path: Path) -> None:
    """A block and the extra state are read by torch.load(weights_only=True), whatever their checksums say."""
    flag, file = tmp_path / "flag", io.BytesIO()
    torch.save(Run(os.mkdir, str(flag)), file)
    for name, word in (("extra", "extra cannot be read"), ("model.second.bias", "cannot be read")):
        folder = put(tmp_path / "x", files := dict(pair[0]))
        metadata = FileSystemReader(folder).read_metadata()
        for number, (index, info) in enumerate(metadata.storage_data.items(), 10):
            data = files[info.relative_path][info.offset : info.offset + info.length]
            info.relative_path, info.offset = f"__{number}_0.distcp", 0
            files[info.relative_path] = file.getvalue() if index.fqn == name else data
            info.length = len(files[info.relative_path])
        put(folder, signed(files, metadata))
        assert main(["ckpt", "verify", str(folder)]) == (1 if name == "extra" else 0)
        with pytest.raises(gingham.CheckpointError, match=word):
            gingham.load(Net(), None, folder)
        assert main(["ckpt", "convert", str(folder), str(tmp_path / "out")]) == 2
    assert not flag.exists()


def test_a25_blocks_without_checksums_are_tried_before_the_model_is_touched(tmp_path: Path) -> None:
    """A folder of torch's own: a block that is no tensor of its shape is found while the model is whole."""
    from torch.distributed.checkpoint import save

    state = {f"model.{name}": value for name, value in Net(3.0).state_dict().items()}
    with pytest.warns(UserWarning):
        save(state, checkpoint_id=tmp_path / "torch", no_dist=True)
    files = bytes_of(tmp_path / "torch")
    name = next(name for name in files if name.endswith("distcp"))
    for keep in (len(files[name]) // 2, len(files[name]) * 9 // 10):
        assert "the checkpoint is damaged" in refused_alone(
            put(tmp_path / "x", {**files, name: files[name][:keep].ljust(len(files[name]), b"x")})
        )


def refused_alone(folder: Path) -> str:
    model = Net(5.0)
    with pytest.raises(gingham.CheckpointError) as caught:
        gingham.load(model, None, folder)
    assert all(bool((parameter == 5.0).all()) for parameter in model.parameters())
    return str(caught.value)


def moved(name: str) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == "model.first.weight":
                info.relative_path = name

    return change


def dropped(metadata: Any) -> None:
    metadata.state_dict_metadata["model.first.weight"].chunks.pop()


def doubled(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata["model.first.weight"].chunks
    chunks[-1].offsets = chunks[0].offsets


def outside(metadata: Any) -> None:
    metadata.state_dict_metadata["model.first.weight"].size = torch.Size([9, 6])


def nowhere(metadata: Any) -> None:
    del metadata.storage_data[MetadataIndex("extra")]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        *[(moved(name), "without folders") for name in ("../secret", "/etc/hostname", "sub/x", "..", "", "a\\b")],
        *((dropped, "elements of shape"), (doubled, "overlap"), (outside, "block"), (nowhere, "stored nowhere")),
    ],
)
def test_b3_a24_paths_that_leave_and_tensors_that_are_not_covered(
    pair: tuple[Files, Files], tmp_path: Path, change: Callable[[Any], None], word: str
) -> None:
    whole = put(tmp_path / "whole", pair[0])
    (tmp_path / "secret").write_bytes(pair[0]["__0_0.distcp"])
    metadata = FileSystemReader(whole).read_metadata()
    change(metadata)
    folder = put(tmp_path / "x", with_metadata(pair[0], pickle.dumps(metadata)))
    assert word in refused(folder)
    assert main(["ckpt", "inspect", str(folder)]) == 1
    assert main(["ckpt", "convert", str(folder), str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "checksums.json"])
def test_b3_links_that_leave_the_folder(pair: tuple[Files, Files], tmp_path: Path, name: str) -> None:
    folder = put(tmp_path / "x", pair[0])
    os.rename(folder / name, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / name)
    assert "is a link to" in refused(folder)
    assert main(["ckpt", "inspect", str(folder)]) in (1, 2)
    assert main(["ckpt", "convert", str(folder), str(tmp_path / "out")]) == 2
    os.symlink(folder, tmp_path / "latest")
    os.unlink(folder / name)
    os.rename(tmp_path / "elsewhere", folder / name)
    assert gingham.load(Net(), None, tmp_path / "latest") == 1  # a link to a checkpoint is one


def test_b9_a_later_format_names_both(pair: tuple[Files, Files], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    for module in ("state", "blocks"):
        monkeypatch.setattr(f"gingham.checkpoint.{module}.FORMAT", 7)
    gingham.save(model, None, tmp_path)
    monkeypatch.undo()
    assert "has format 7, this gingham reads formats 1 to 2" in refused(tmp_path)
    monkeypatch.setattr("gingham.checkpoint.state.FORMAT", 7)
    gingham.save(model, None, tmp_path)
    monkeypatch.undo()
    assert "has format 7, this gingham reads formats 1 to 2" in refused(tmp_path)
    assert main(["ckpt", "inspect", str(tmp_path)]) == 1
    assert main(["ckpt", "convert", str(tmp_path), str(tmp_path / "out")]) == 2
