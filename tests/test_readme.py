"""README's programs run as pasted: each block of Python under the command that its first line names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_every_block_says_how_it_is_run() -> None:
    assert len(BLOCKS) >= 2 and all(re.match(r"# \w+\.py: torchrun --nproc-per-node \d+ \w+\.py", block) for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split(":")[0].strip("# "))
def test_runs_as_pasted(tmp_path: Path, block: str) -> None:
    name, ranks = re.match(r"# (\w+\.py): torchrun --nproc-per-node (\d+)", block).groups()
    (tmp_path / name).write_text(block)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if name == "train.py":
        found = re.search(r"loss ([\d.]+), then ([\d.]+); ([\d.]+)% right", done.stdout)
        assert found and float(found[2]) < float(found[1]) < 2.3 and float(found[3]) > 30, done.stdout


CALL = (ROOT / "README.md").read_text().partition("## Follow one call")[2].partition("\n## ")[0]
TRACED = """
import sys, torch, gingham
gingham.init()
layer, x, met = gingham.nn.Linear(8, 8), torch.ones(4, 8).requires_grad_(), set()
layer(x)
sys.setprofile(lambda frame, event, _: met.add(frame.f_code.co_filename))
layer(x)
sys.setprofile(None)
print(*sorted("python/gingham/" + name.partition("/gingham/")[2] for name in met if name.startswith(gingham.__path__[0])))
"""


def test_the_files_of_one_call_are_those_that_it_meets() -> None:
    """All of Python's, found by following a call; and every function that is named stands where it is said to stand."""
    named = re.findall(r"^\d+\. `([\w/.]+)`, `([\w:.]+)`", CALL, re.MULTILINE)
    assert len(named) == 10
    for path, symbol in named:
        owner, _, name = symbol.replace("::", ".").rpartition(".")
        text = (ROOT / path).read_text()
        assert re.search(rf"(def |[\w:>&*] )({owner}::)?{name}\(", text) and re.search(rf"\b{owner or name}\b", text), (path, symbol)
    files = re.findall(r"`((?:python|csrc)/[\w/.]+)`", CALL)
    assert all((ROOT / path).is_file() for path in files)
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == sorted(path for path in files if path.startswith("python/")), done.stdout + done.stderr
