"""What checksums cost in gingham.save and gingham.load: runs with and without them, in turns, on the same files.

    python bench/checkpoint_cost.py [--ranks 1] [--megabytes 256] [--repeats 9] [--folder DIR]

"without" leaves out the sums of save and the reading of all blocks in load, everything else is the same. A pair's ratio is
with / without; the median of the pairs is what counts, since disks and neighbours drift. fsync is part of every save.
"""

import argparse
import shutil
import statistics
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch

import gingham
from gingham.checkpoint import blocks

MODES: dict[int, dict[str, Any]] = {1: {}, 4: dict(mode="2d", size=4), 8: dict(mode="2.5d", size=8, depth=2)}


def write_only(file: Any, data: Any) -> int:
    """Summed.write without the sum, of blocks; the small files beside them keep theirs, or nothing could be read back."""
    view = memoryview(data).cast("B")
    file._file.write(view)
    file.sum = file.sum if file.path.suffix == ".distcp" else blocks.crc32c(view, file.sum)
    file.at += len(view)
    return len(view)


def without(what: str) -> Any:
    """Leaves the checksums of a save, or a load's look at them, out; returns what puts them back."""
    kept = blocks.Summed.write, blocks.Opened.verify, blocks.Opened.sum_of
    if what == "save":
        blocks.Summed.write = write_only  # type: ignore[method-assign]
    else:
        blocks.Opened.verify = lambda self, *_: None  # type: ignore[method-assign]
        blocks.Opened.sum_of = lambda self, _: None  # type: ignore[method-assign]

    def back() -> None:
        blocks.Summed.write, blocks.Opened.verify, blocks.Opened.sum_of = kept  # type: ignore[method-assign]

    return back


def measure(rank: int, ranks: int, megabytes: int, repeats: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Pairs (seconds with, seconds without) of save and load, as the slowest rank sees them."""
    torch.set_num_threads(1)
    mesh = gingham.init(**MODES[ranks])
    width = 1024
    layers = max(1, megabytes * 2**20 // (width * width * 4) // 3)  # AdamW keeps two more of each
    model = torch.nn.Sequential(*(gingham.nn.Linear(width, width) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found: dict[str, list[tuple[float, float]]] = {"save": [], "load": []}
    gingham.save(model, optimizer, folder / "loaded")  # apart from those that are written: removing a folder's old one takes time
    for what in found:
        for repeat in range(repeats + 1):
            pair = {}
            for sums in (True, False) if repeat % 2 else (False, True):
                back = (lambda: None) if sums else without(what)
                mesh.world.sizes([0])
                start = time.perf_counter()
                if what == "save":
                    gingham.save(model, optimizer, folder / str(sums), keep=1)
                else:
                    gingham.load(model, optimizer, folder / "loaded")
                mesh.world.sizes([0])
                pair[sums] = time.perf_counter() - start
                back()
            if repeat:  # the first pair warms up
                found[what].append((pair[True], pair[False]))
    gingham.destroy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, choices=sorted(MODES))
    parser.add_argument("--megabytes", type=int, default=256, help="of weights and optimizer state")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the folder for temporary files")
    options = parser.parse_args()
    data = b"x" * (1 << 26)
    for name, function in (("crc32c", blocks.crc32c), ("zlib.crc32", zlib.crc32)):
        start = time.perf_counter()
        function(data)
        print(f"{name}: {len(data) / (time.perf_counter() - start) / 1e9:.1f} GB/s")
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-cost-", dir=options.folder))
    try:
        found = gingham.spawn(measure, options.ranks, options.ranks, options.megabytes, options.repeats, folder)[0]
    finally:
        shutil.rmtree(folder)
    for what, pairs in found.items():
        with_, without_ = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        print(f"{what}: {with_ * 1e3:.0f} ms with, {without_ * 1e3:.0f} ms without, median of pairs {100 * (ratio - 1):+.1f} %")


if __name__ == "__main__":
    main()
