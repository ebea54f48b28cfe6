"""Rung 2: the machine code of every kernel instance, against pins. It shows what the compiler made, not how fast it runs."""

import functools
from typing import Any

import pytest

from cuda import nvcc, sass

pytestmark = [
    pytest.mark.skipif(nvcc.toolkit() is None, reason="no nvcc"),
    pytest.mark.skipif(sass.cuobjdump() is None, reason="no cuobjdump: pip install -r tests/cuda/requirements.txt"),
    pytest.mark.timeout(900),
]
measured = functools.cache(sass.measure_all)
# sm_90a has all kernels of sm_80 and Hopper's own
ARCHITECTURES = [pytest.param("sm_80", marks=pytest.mark.matrix), "sm_90a"]


def instances(arch: str) -> dict[str, Any]:
    rows: dict[str, Any] = measured((arch,))[arch]
    return rows


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_stack_and_no_spills(arch: str) -> None:
    wrong = {name: row for name, row in instances(arch).items() if row["stack"] or row["spills"]}
    assert not wrong, wrong


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensor_cores_and_asynchronous_copies_are_used(arch: str) -> None:
    tiles = {name: row for name, row in instances(arch).items() if name.startswith("tile_kernel")}
    assert len(tiles) == 36, sorted(tiles)
    for name, row in tiles.items():
        m, n, warp_m, warp_n, _, _ = sass.tile_of(name) or [0] * 6
        steps = 4  # of k in a line of 128 bytes: 16 elements of 16 bits or 8 of 32
        assert row["HMMA"] == steps * (warp_m // 16) * (warp_n // 8), (name, row)
        if name.endswith("true>"):
            threads, _ = sass.block_of(name) or (0, 0)
            # 16-byte copies of a stage, once in each of the prologue's two stages and once in the loop
            assert row["LDGSTS"] == 3 * (m + n) * 128 // 16 // threads, (name, row)
            assert row["STG.128"] > 0 and row["LDS.128"] > 0, (name, row)


def test_hopper_kernels_use_warpgroup_products_and_the_tensor_memory_accelerator() -> None:
    hopper = {name: row for name, row in instances("sm_90a").items() if row["source"] == "gemm_sm90.cu"}
    assert hopper
    assert all(row["HGMMA"] > 0 and row["UTMALDG"] > 0 and row["HMMA"] == 0 for row in hopper.values()), hopper
    # the last argument: of results that leave in boxes nothing is stored by hand, and what is added to is not fetched
    ways = {way: {name: row for name, row in hopper.items() if name.endswith(f" {way}>")} for way in range(3)}
    assert [len(rows) for rows in ways.values()] == [16, 16, 16], sorted(hopper)
    for way, rows in ways.items():
        for name, row in rows.items():
            assert (row["STG.128"] > 0) == (row["LDG.128"] > 0) == (way == 0), (name, row)
            assert (row["UTMASTG"] > 0) == (way > 0) and (row["UTMAREDG"] > 0) == (way == 2), (name, row)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_uses_tensor_cores_in_16_bits(arch: str) -> None:
    """Three kernels of three widths in bf16, fp16 and fp32, of two in fp64; copies are asynchronous, results leave in 16-byte words."""
    rows = {name: row for name, row in instances(arch).items() if name.startswith("attention_")}
    assert len(rows) == 33, sorted(rows)
    for name, row in rows.items():
        tensor = "Bf16" in name or "F16" in name
        assert (row["HMMA"] > 0) == (row["LDSM"] > 0) == tensor and row["LDGSTS"] > 0 and row["LDG.128"] > 0 and row["STG.128"] > 0, (
            name,
            row,
        )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_memory_kernels_move_16_bytes_at_a_time(arch: str) -> None:
    kinds = ("sweep_kernel<", "parts_kernel<", "gradient_kernel<", "whole_kernel<", "whole_backward_kernel<", "dropout_kernel<")
    wide = {name: row for name, row in instances(arch).items() if name.startswith(kinds) and "kernel<1, " not in name}
    assert wide
    writing = ("Zero<", "Nothing<")  # they read nothing
    narrow = {
        name: row
        for name, row in wide.items()
        if (row["STG.128"] == 0 and not name.startswith("parts_kernel<"))
        or (row["LDG.128"] == 0 and not any(each in name for each in writing))
    }
    assert not narrow, narrow


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_pins_hold(arch: str) -> None:
    """Pins belong to one nvcc; another may choose other registers, and is held to the rules above only."""
    pinned = sass.budget()
    version = measured((arch,))["nvcc"]
    if pinned["nvcc"] != version:
        pytest.skip(f"pinned with nvcc {pinned['nvcc']}, this is {version}")
    found = instances(arch)
    assert found.keys() == pinned[arch].keys(), found.keys() ^ pinned[arch].keys()
    changed = {name: (pinned[arch][name], row) for name, row in found.items() if row != pinned[arch][name]}
    assert not changed, f"if wanted: PYTHONPATH=tests python -m cuda.sass --write\n{changed}"


def test_the_documentation_shows_the_pins() -> None:
    text = sass.DOCS.read_text()
    assert text.split(sass.BEGIN)[1].split(sass.END)[0].strip() == sass.table(sass.budget()).strip()
