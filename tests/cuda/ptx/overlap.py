"""What a block of the Hopper gemm that computes two tiles has under way at one time.

Read from the order in which it gives work to the tensor cores and the accelerator, with one warpgroup held back: what does not wait for
it happens before it moves.
"""

import numpy as np

from .host import Host
from .parse import PtxError

STAGES = {128: 6, 256: 4}
PRODUCER, FIRST, SECOND = range(3)  # warpgroups


def events(host: Host, steps: int, wide: int, halves: bool) -> list[tuple[str, int]]:
    """Of the first block: "load", "product" or "store", and by which warpgroup."""
    host.trace = []
    random = np.random.default_rng(steps)
    a = host.matrix(random.standard_normal((128, 64 * steps)), "bf16")
    b = host.matrix(random.standard_normal((64 * steps, 3 * wide)), "bf16", True)
    out = host.empty(128, 3 * wide, "bf16" if halves else "f32")
    host.sm90(a, b, None if halves else out, tail=host.tail("none", z=out) if halves else None, wide=wide, chunks=(1, 2))
    product = host.read(a) @ host.read(b)
    if not np.abs(host.read(out) - product).max() <= 2.0**-7 * np.abs(product).max():
        raise PtxError("a wrong result")
    return [(what, group) for what, block, group in host.trace if block == 0]


def waits_for_a_store(host: Host, wide: int, halves: bool) -> str:
    """Whether anything of the next tile's first ring of stages is loaded only after the second warpgroup began to store."""
    host.order = (PRODUCER, FIRST, SECOND)
    steps = STAGES[wide] + 2
    found = events(host, steps, wide, halves)
    before = found[: found.index(("store", SECOND))]
    loads, products = (
        before.count(("load", PRODUCER)) // 2,
        before.count(("product", SECOND)) // 4,
    )  # boxes of A and B a step, products a step
    if (loads, products) != (steps + STAGES[wide], steps):
        return f"{loads} stages loaded and {products} multiplied before a store, expected {steps + STAGES[wide]} and {steps}"
    return ""


def waits_for_the_other(host: Host, wide: int, halves: bool, ahead: int) -> str:
    """Whether the warpgroup that is ahead does less, before the other's first product, than store a tile and multiply the next as far as
    the ring goes."""
    behind = FIRST + SECOND - ahead
    host.order = (PRODUCER, ahead, behind)
    found = events(host, STAGES[wide] - 1, wide, halves)
    before = found[: found.index(("product", behind))]
    boxes = wide // (64 if halves else 32) * 4  # of a tile, by four warps
    stores, products = before.count(("store", ahead)), before.count(("product", ahead)) // 4
    if (stores, products) != (boxes, STAGES[wide]):
        return (
            f"{stores} boxes stored and {products} stages multiplied before the other's first product, expected {boxes} and {STAGES[wide]}"
        )
    return ""
