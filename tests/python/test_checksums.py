"""Checksums of tensors (A4, A6): every bit counts, the form in memory does not."""

from zlib import crc32

import pytest
import torch

from gingham.mesh.checksums import checksum, digest_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_one_bit_and_the_order_are_seen(dtype: torch.dtype) -> None:
    x = (torch.arange(35) % 2).to(dtype).view(5, 7)
    swapped = x.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    changed = x.clone()
    changed.view(-1)[17] = 0 if bool(changed.view(-1)[17]) else 1
    for function in (checksum, digest_of):
        values = [function(each) for each in (x, swapped, changed)]
        assert len(set(values)) == 3, (function, values)
        assert function(x.t().contiguous().t()) == function(x) == function(torch.nn.Parameter(x, requires_grad=False))


def test_bytes_are_those_of_zlib_and_go_on_from_a_start() -> None:
    x = torch.randn(3, 4)
    assert checksum(x) == crc32(x.numpy().tobytes()) and checksum(x, 7) == crc32(x.numpy().tobytes(), 7)
    assert checksum(torch.zeros(0), 7) == 7 and checksum(torch.tensor(0.5)) == crc32(torch.tensor([0.5]).numpy().tobytes())
    assert digest_of(torch.empty(3, device="meta")) == digest_of(torch.zeros(0)) == 0
