"""Commands that need no ranks: what they print at several widths, their exit codes, and Ctrl-C of train."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import gingham
from gingham.commands.cli import main
from gingham.plan import tables


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The status, and what went to the error stream."""
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = int(str(ended.code))
    return status, capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "cores" in out and "BLAS" in out


def test_doctor_multiplies_and_says_right(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--test"]) == 0
    said = capsys.readouterr().out
    assert "between hosts" in said and "4 ranks as 2 x 2 on host " in said and said.splitlines()[-1] == "right"
    monkeypatch.setattr(gingham, "spawn", lambda *_: [{"right": rank != 2, "said": []} for rank in range(4)])
    assert main(["doctor", "--test"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("WRONG")


WRONG = [
    (["train", "--mode", "2.5d", "--ranks", "6"], "nearest valid"),
    (["train", "--mode", "2d", "--ranks", "6"], "nearest valid"),
    (["train", "--mode", "2.5d", "--ranks", "8", "--depth", "3"], "depth=2 or 8"),
    (["train", "--mode", "2d", "--grid", "2,2,1"], "exclude each other"),
    (["train", "--grid", "2,2,1", "--ranks", "3"], "needs 4 ranks"),
    (["train", "--grid", "2x2"], "three numbers"),
    (["train", "--grid", "2,2,0"], "at least 1"),
    (["train", "--text", "no such file"], "does not exist"),
    (["train", "--heads", "7"], "must divide"),
    (["train", "--heads", "4", "--mode", "1d"], "multiple of 8"),
    (["train", "--lr", "nan"], "above 0"),
    (["train", "--lr", "0"], "above 0"),
    (["train", "--lr", "fast"], "above 0"),
    (["train", "--dropout", "2"], "below 1"),
    (["train", "--steps", "0"], "at least 1"),
    (["train", "--batch", "0"], "at least 1"),
    (["train", "--width", "-8"], "at least 1"),
    (["train", "--mode", "4d"], "invalid choice"),
    (["train", "--plot", "no/such/folder/loss.png"], "does not exist"),
    (["train", "--depth", "2", "--mode", "2d"], "belongs to mode"),
    (["plan", "--ranks", "0"], "at least 1"),
    (["plan", "--ranks", "8", "--bandwidth", "0"], "above 0"),
    (["plan", "--ranks", "8", "--memory", "inf"], "above 0"),
    (["plan", "--ranks", "8", "--heads", "7"], "must divide"),
    (["plan"], "--ranks"),
    (["bench", "matmul", "--sizes", "abc"], "expected numbers"),
    (["bench", "matmul", "--grid", "2,2,0"], "expected numbers"),
    (["ckpt", "inspect", "no such folder"], "no such folder"),
    (["trace"], "invalid choice"),
    ([], "required"),
    (["train", "--grid", "2,2,1", "--depth", "2"], "--depth belongs to a mode"),
    (["train", "--grid", "1,2,1", "--sequence"], "--sequence belongs to a mode"),
    (["train", "--zero", "3"], "--zero 3 cuts what --data replicates"),
    (["train", "--zero", "4", "--data", "2"], "invalid choice"),
    (["train", "--data", "3", "--ranks", "4"], "--data 3 must divide the 4 ranks"),
    (["train", "--grid", "1,2,1", "--data", "2", "--ranks", "2"], "with --data 2 needs 4 ranks, got 2"),
    (["train", "--mode", "2d", "--data", "2", "--ranks", "6"], "nearest valid"),
    (["train", "--schedule", "zbv"], "--schedule zbv orders the passes of stages"),
    (["train", "--pipeline", "2", "--schedule", "pipedream"], "invalid choice"),
    (["train", "--pipeline", "3", "--ranks", "4"], "--data 1 x --pipeline 3 must divide the 4 ranks"),
    (["train", "--microbatches", "9"], "--microbatches 9 cut --batch 8"),
    (["train", "--pipeline", "8", "--ranks", "8"], "more than --batch 8: give --microbatches"),
    (["train", "--grid", "1,2,1", "--pipeline", "2", "--ranks", "2"], "and --pipeline 2 needs 4 ranks, got 2"),
    (["train", "--resume", "no such folder"], "--resume 'no such folder': no such folder"),
    (["train", "--save", ""], "--save '': expected a folder"),
    (["train", "--save", __file__], "no folder, and none can be made"),
    (["train", "--save", "/proc/gingham"], "no folder, and none can be made"),
    (["train", "--plot", "x.foo"], "matplotlib writes no .foo"),
    (["train", "--plot", "/tmp"], "expected a file in a folder"),
    (["train", "--mode", "1d", "--ranks", "65", "--heads", "65", "--width", "130"], "a host has at most 64 ranks"),
    (["plan", "--ranks", "100000"], "at most 4096"),
    (["plan", "--ranks", "8", "--data", "3"], "no data x pipeline x tensor ranks of these numbers"),
    (["plan", "--ranks", "8", "--zero", "3"], "--zero cuts what --data replicates"),
    (["plan", "--ranks", "8", "--schedule", "zbv"], "--schedule orders the passes of stages"),
    (["bench"], "expected one of matmul"),
    (["bench", "nosuch"], "expected one of matmul"),
    (["bench", "matmul", "--rounds", "0"], "--rounds '0'"),
    (["bench", "matmul", "--dtype", "foo"], "expected one of float32"),
    (["bench", "matmul", "--grid", "2,2"], "three such as 2,2,1"),
    (["bench", "overlap", "--bandwidth", "0"], "above 0"),
    (["bench", "matmul", "--foo"], "unknown option --foo"),
    (["bench", "matmul", "--sizes"], "--sizes '': expected numbers"),
    (["bench", "matmul", "--ranks", "99999999999"], "at most"),
    (["bench", "matmul", "--latency", "soon"], "at least 0"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_d_a_wrong_option_is_one_line_and_status_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(arguments, capsys)
    assert status == 2 and message in text and text.count("\n") == 1, text


@pytest.mark.parametrize("command", ["train", "plan", "ckpt convert"])
def test_d_every_option_says_its_default(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    lines = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    silent = ("-h", "--grid", "--sequence", "--compare-serial", "--ranks RANKS  ", "--latency-only")
    for line in lines:
        if not line.startswith(silent) and not ("--ranks" in line and command == "plan"):
            assert "default" in line, line


@pytest.mark.parametrize("width", [80, 200])
def test_d_plan_fits_the_terminal_and_shows_every_mode_once(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["plan", "--ranks", "8", "--width", "1024", "--layers", "12"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width and "…" not in out
    for mode in ("1d", "2.5d depth=2", "3d"):
        found = " ".join(line[:30].strip() for line in out.splitlines())
        assert mode.split()[0] in found
    grids = re.findall(r"\d+ x \d+ x \d+", out)
    assert len(grids) >= len(set(grids)) >= 8
    assert re.search(r"\d (MB|GB|KB)", out) and "received a rank" in re.sub(r"\s+", " ", out) or width == 80


def test_d_plan_has_one_line_a_grid_and_its_reasons_below(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--ranks", "8", "--heads", "2", "--memory", "0.02"]) == 0
    out = capsys.readouterr().out
    table, below = out.split("mode='auto' takes the first line")
    lines = table.split("\u2500")[-1].strip().splitlines()
    assert all("MB" in line or line.strip() == "shard_depth" for line in lines), out
    assert "needs" not in table and "divide" not in table
    assert "not possible (1d" in below and "2 heads do not divide" in below and "allowed 0.02" in below


def test_d_output_that_cannot_be_written_is_one_line() -> None:
    for where, status, words in (("/dev/full", 1, "No space left"), ("/dev/null", 0, "")):
        with open(where, "w") as out:
            command = [sys.executable, "-m", "gingham", "plan", "--ranks", "2"]
            done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        assert done.returncode == status and words in done.stderr and done.stderr.count("\n") == bool(status), done.stderr


def test_d_convert_writes_no_safetensors_among_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    gingham.save(torch.nn.Linear(3, 2), None, str(tmp_path / "runs"))
    for target in (tmp_path / "runs", tmp_path / "runs" / "00000001"):
        status, text = said(["ckpt", "convert", str(tmp_path / "runs"), str(target)], capsys)
        assert status == 2 and "holds checkpoints" in text and text.count("\n") == 1
    assert main(["ckpt", "convert", str(tmp_path / "runs"), str(tmp_path / "out")]) == 0


def rendered(width: int, rows: list[tuple[str, ...]], **more: Any) -> str:
    console = Console(file=io.StringIO(), width=width)
    tables.show(console, "a model", ("layer", "kind", "here", "bytes"), rows, ("bytes",), **more)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_d_tables_fold_equal_blocks_and_never_cut_a_number() -> None:
    rows = [(f"transformer.blocks.{i}.{name}", "linear, swapped", "123456 x 654321", "3.34 MB") for i in range(12) for name in ("q", "fc")]
    folded = tables.fold([*rows, ("head", "linear", "8 x 8", "1 B"), ("transformer.blocks.13.q", *rows[0][1:])])
    assert [row[0] for row in folded] == ["transformer.blocks.0-11.q", "transformer.blocks.13.q", "transformer.blocks.0-11.fc", "head"]
    assert tables.fold([("a.0.x", "1"), ("a.1.x", "2")]) == [("a.0.x", "1"), ("a.1.x", "2")]
    for width in (40, 60, 80, 200):
        text = rendered(width, folded, total=("all", "", "", "40.1 MB"))
        assert "…" not in text and "123456" in text and "654321" in text and "40.1" in text
        assert max(map(len, text.splitlines())) <= max(width, 56)
    assert "transformer.blocks.0-11.q" in rendered(200, folded)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (999_600, "1.00 MB"), (33_500_000, "33.5 MB"), (2.15e9, "2.15 GB"), (123e12, "123 TB")],
)
def test_d_bytes_have_units(size: float, text: str) -> None:
    assert tables.amount(size) == text


def printed(rank: int, width: int) -> str:
    """The plan of a converted model, as rank 0 prints it at a width."""
    import contextlib

    import torch

    from gingham.convert import _parallelize, table

    mesh = gingham.init(mode="2d", size=4)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        table.show(_parallelize(model, mesh, "full", None, ()), 1024, width)
    return out.getvalue()


def test_d_the_plan_of_a_model_fits_80_and_200_columns(ranks) -> None:
    for width in (80, 200):
        text, *others = ranks(4)(printed, width)
        assert others == [""] * 3
        assert "0-5" in text and "…" not in text and max(map(len, text.splitlines())) <= width, text
        assert re.search(r"all +.*\d (KB|MB)", text)


def sizes_that_do_not_fit(rank: int) -> list[str]:
    found = []
    for arguments in (dict(), dict(mode="2d", size=9), dict(mode="2.5d", size=8), dict(mode="2.5d", size=8, depth=4)):
        with pytest.raises(gingham.MeshError) as raised:
            gingham.init(**arguments)
        found.append(str(raised.value))
    return found


def test_d_init_says_what_to_start_and_which_depths_there_are(ranks) -> None:
    for alone, other, *depths in ranks(4)(sizes_that_do_not_fit):
        assert "gingham.init(grid=(1, 4, 1))" in alone and "the job has 4" in alone
        assert "torchrun --nproc-per-node 9" in other
        assert all("depth=2 or 8" in message for message in depths)


def interrupted(command: list[str], folder: Path, early: bool = False) -> tuple[int, str]:
    """Status and error stream of a run that gets Ctrl-C in the middle of its steps, or early: before there is a rank."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {"COLUMNS": "100"}
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + 60
            while not ready(process.pid, folder, early) and time.monotonic() < deadline:
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)
            status = process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return status, (folder / "err").read_text()


def ready(pid: int, folder: Path, early: bool) -> bool:
    """Whether the run notes Ctrl-C itself (its children are there, no rank has said a word), or is in its steps."""
    ignored = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
    notes = not int(ignored.split()[1], 16) & 1 << (signal.SIGINT - 1)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return notes and len(children) > 1 if early else "AdamW at" in (folder / "out").read_text()


@pytest.mark.parametrize("early", [True, False])
def test_d_ctrl_c_of_train_is_one_line_a_checkpoint_and_status_130(tmp_path: Path, early: bool) -> None:
    size = ["--layers", "1", "--width", "32", "--heads", "4", "--context", "16", "--batch", "4", "--steps", "1000000", "--plot", ""]
    command = [sys.executable, "-m", "gingham", "train", "--mode", "2d", "--ranks", "4", "--save", str(tmp_path / "runs"), *size]
    status, err = interrupted(command, tmp_path, early)
    assert status == 130
    assert re.fullmatch(r"gingham train: interrupted after step \d+; checkpoint in \S+\n", err), err
    assert main(["ckpt", "verify", str(tmp_path / "runs")]) == 0
