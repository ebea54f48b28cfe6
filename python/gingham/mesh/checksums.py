"""Checksums of tensors, by which ranks see that they hold the same values."""

from __future__ import annotations

from zlib import crc32

import torch

SAMPLE = 4096  # elements that a digest reads in their order


def checksum(x: torch.Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's bytes, element by element, going on from `start`; of a contiguous tensor on the CPU nothing is copied."""
    data = x.detach().to("cpu").contiguous().reshape(-1)
    return crc32(data.view(torch.uint8).numpy().data, start) if data.numel() else start


def digest_of(full: torch.Tensor) -> int:
    """Of a tensor's bits: of a sample in their order and, in any order, of all. Several times as fast as its checksum; 0 on meta."""
    if full.is_meta or not full.numel():
        return 0
    flat = full.detach().contiguous().flatten()
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    sample = checksum(bits[:: max(1, len(bits) // SAMPLE)])
    return crc32(int(bits.sum(dtype=torch.int64)).to_bytes(8, "little", signed=True), sample)
