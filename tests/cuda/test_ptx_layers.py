"""Rung 4 for the kernels of layers: layer norm, cross-entropy and embedding in the interpreter, against float64."""

import numpy as np
import pytest

from cuda import nvcc
from cuda.ptx import layers
from cuda.ptx.host import Host
from cuda.ptx.report import Report

pytestmark = [pytest.mark.skipif(nvcc.toolkit() is None, reason="needs nvcc"), pytest.mark.timeout(900)]
DTYPES = ["f32", "f64", "bf16", "f16"]
STEP = {"bf16": 2.0**-8, "f16": 2.0**-10, "f32": 2.0**-20, "f64": 2.0**-45}


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(report: Report, dtype: str) -> None:
    for rows, cols, centred in ((5, 70, True), (3, 256, True), (3, 70, False)):
        for name, got, expected in layers.layer_norm(Host(seed=rows, groups=3), rows, cols, dtype, centred):
            limit = STEP[dtype] if name in ("y", "dx") else max(STEP["f32"], 1e-15) if dtype != "f64" else STEP["f64"]
            report.check(f"{'layer' if centred else 'RMS'} norm {dtype} {rows}x{cols}: {name}", got, expected, limit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_of_whole_rows(report: Report, dtype: str) -> None:
    """Rows of single elements, of packs, and those that are too long for a block's registers."""
    for rows, cols, centred in ((5, 70, True), (3, 2056, True), (3, 264, False), (2, 2053, True)):
        for name, got, expected in layers.layer_norm(Host(seed=rows, groups=3), rows, cols, dtype, centred, whole=True):
            limit = STEP[dtype] if name in ("y", "dx") else max(STEP["f32"], 1e-15) if dtype != "f64" else STEP["f64"]
            report.check(f"whole {'layer' if centred else 'RMS'} norm {dtype} {rows}x{cols}: {name}", got, expected, limit)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_bytes_of_layer_norm(dtype: str) -> None:
    """Whole rows are read once and written once, forward and backward, and x and dy once more for both gradients of the weights: in 16 bits
    4, 6 and 4 bytes an element. gamma and beta, read for every row here, come from cache."""
    rows, cols, item = 300, 136, {"f32": 4, "bf16": 2}[dtype]
    threads, slabs, across = {"f32": 32, "bf16": 32}[dtype], 2, -(-cols * item // 512)
    host = Host(seed=1)
    for _ in layers.layer_norm(host, rows, cols, dtype, whole=True):
        pass
    moved = {each.name: (each.counts.read, each.counts.written) for each in host.launches}

    def of(kernel: str) -> tuple[int, int]:
        return next(got for name, got in moved.items() if kernel in name)

    row = cols * item
    assert len(moved) == 4, moved
    assert of("12whole_kernel") == (rows * (row + 2 * row), rows * (row + 16))
    assert of("whole_backward_kernel") == (rows * (2 * row + 2 * row + 16 * threads), rows * row)
    assert of("11slab_kernel") == (rows * (2 * row + 16 * across), 2 * slabs * cols * 8)
    assert of("slabs_kernel") == (2 * slabs * cols * 8, 2 * cols * 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(report: Report, dtype: str, smoothing: float) -> None:
    for rows, cols in ((5, 77), (4, 512), (2, 8321)):
        for name, got, expected in layers.cross_entropy(Host(seed=rows, groups=3), rows, cols, dtype, smoothing):
            limit = STEP[dtype] if name == "gradient" else (STEP["f64"] if dtype == "f64" else 1e-6)
            report.check(f"cross-entropy {dtype} {rows}x{cols} smoothing {smoothing}: {name}", got, expected, limit)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_bytes_of_cross_entropy(dtype: str) -> None:
    """Logits are read once forward and once backward, where the row counts, and the gradient is written once: 6 bytes an element in 16
    bits."""
    rows, cols, item = 4, 1283, {"f32": 4, "bf16": 2}[dtype]
    threads = min(256, 32 * -(-cols * item // (16 * 32)))
    host = Host(seed=1)
    for _ in layers.cross_entropy(host, rows, cols, dtype, 0.0):
        pass
    moved = {each.name: (each.counts.read, each.counts.written) for each in host.launches}
    forward = next(got for name, got in moved.items() if "parts_kernel" in name)
    backward = next(got for name, got in moved.items() if "gradient_kernel" in name)
    counted = rows - 1  # one is ignored; every thread asks for its row's target, and the others for their four numbers
    assert forward == (item * (rows * cols + counted) + 8 * rows, rows * 4 * 8)
    assert backward == (item * counted * cols + 8 * threads * (rows + 3 * counted), item * rows * cols)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(report: Report, dtype: str) -> None:
    for rows, cols, count in ((20, 33, 50), (9, 64, 330)):
        for name, got, expected in layers.embedding(Host(seed=rows, groups=3), rows, cols, count, dtype):
            limit = 0 if name == "gather" else STEP["f64" if dtype == "f64" else "f32"]
            report.check(f"embedding {dtype} {rows}x{cols} of {count}: {name}", got, expected, limit)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_bytes_of_embedding(dtype: str) -> None:
    """A row that is looked up is read once and written once; one that is summed is read once, and what is written beside the table is a
    sum for each 32 rows that an id goes through: 2 bytes an element and a little in 16 bits, whatever the ids."""
    rows, cols, count, item = 9, 64, 330, {"f32": 4, "bf16": 2}[dtype]
    host = Host(seed=1)
    for _ in layers.embedding(host, rows, cols, count, dtype):
        pass
    ids = np.random.default_rng(3).integers(-2, rows + 10, count)
    ids[: 2 * count // 3] = 7
    ids.sort()
    there, groups = int(((ids >= 0) & (ids < rows)).sum()), cols * item // 16
    summed = ids[(ids >= 5) & (ids < 5 + rows) & (ids != 9)]
    entered = sum(at in summed and ids[border - 1] == at for border, at in ((border, ids[border]) for border in range(32, count, 32)))
    moved = {each.name: (each.counts.read, each.counts.written) for each in host.launches}

    def of(kernel: str) -> tuple[int, int]:
        return next(got for name, got in moved.items() if kernel in name)

    assert of("6Gather") == (there * cols * item + count * groups * 8, count * cols * item)
    read, written = of("8SumPiece")
    assert written == (len(set(summed)) + entered) * cols * 4
    assert summed.size * cols * item <= read <= summed.size * cols * item + 6 * 8 * count * groups
    read, written = of("9JoinParts")
    runs = sum(np.any((ids[31:-1:32] == at) & (ids[32::32] == at)) for at in set(summed))  # that cross a border
    assert written == runs * cols * 4


def test_indices(report: Report) -> None:
    for count in (7, 1024, 2500):
        for name, got, expected in layers.indices(Host(seed=count, groups=3), count):
            report.check(f"wrong {name} of {count}", got, expected, 0)
