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
