"""The expected overlap of one Linear of a deep stack, forward and backward, on 8 H100s of one NVLink host at 2.5D (q = 2, depth 2).

A step takes   products + additions + multiprocessors lent to messages + what nothing hides,   or its messages where those take longer.
This prints the table of docs/cuda.md. It is a model: several GPUs were never seen. What it assumes:

  links            380 GB/s a direction of 450, whatever travels; 8 us until a group's first byte
  products         R / (1 + 265 / K), R = 808 TFLOP/s: through 759 at K = 4096 and 642 at K = 1024, both measured on one H100 with results in 16
                   bits; K = k / (q S) for all three products; one that is added to C is assumed as fast (C is added in L2, not measured)
  additions        a partial sum that arrives is added by a kernel behind the product: 12 bytes a number at 3.0 TB/s
  multiprocessors  NCCL's blocks hold 16 of 132 while messages are under way (maxCTAs is not set: NCCL may take more)
  not hidden       forward the first slice of X and W, backward that of dY and W and the last sum of dW. The sum of dW over depth is queued beside
                   the rest of the backward pass: its time on the links counts, its wait does not
"""

from dataclasses import dataclass

NVLINK, ALPHA, HBM = 380e9, 8e-6, 3.0e12
BEST, HALF = 808e12, 265.0
BLOCKS, MULTIPROCESSORS = 16, 132
Q, DEPTH = 2, 2
RANKS = Q * Q * DEPTH
SHAPES = ((8192, 4096, 16384), (16384, 8192, 8192), (32768, 8192, 28672))


@dataclass
class Variant:
    name: str
    w_early: bool = False  # W's slices are gathered before the layer begins
    added_in_place: bool = False  # the product adds to what has arrived
    copy_engines: bool = False  # messages take no multiprocessor


VARIANTS = (
    Variant("as built"),
    Variant("and W gathered early", True),
    Variant("and products that add to what arrived", True, True),
    Variant("and messages by copy engines", True, True, True),
)


def step(m: int, k: int, n: int, slices: int, variant: Variant) -> tuple[float, float, float]:
    """Seconds of the products alone, of the messages, and in all."""
    x, w, y = m * k, k * n, m * n
    block = {"x": x * (Q - 1) / RANKS, "w": w * (Q - 1) / Q**2, "y": y * (Q - 1) / RANKS}  # numbers that a rank receives
    compute = 6 * m * k * n / RANKS * (1 + HALF / (k / Q / slices)) / BEST
    gathered, summed = 2 * (block["x"] + block["y"] + 2 * block["w"]), 4 * (block["x"] + block["w"])  # 16 bits, and fp32
    deep = 4 * 2 * w * (DEPTH - 1) / (DEPTH * Q**2)
    messages = (gathered + summed + deep) / NVLINK
    early = 0 if variant.w_early else 2 * block["w"]
    first = (2 * block["x"] + early + 2 * block["y"] + early) / slices / NVLINK
    last = 4 * block["w"] / slices / NVLINK
    additions = 0 if variant.added_in_place else 12 * (block["x"] + block["w"]) / HBM
    lent = 0 if variant.copy_engines else messages * BLOCKS / MULTIPROCESSORS
    return compute, messages, max(compute + additions + lent, messages) + first + last + 3 * ALPHA


def main() -> None:
    print("| tokens x in x out | schedule | S | products | messages | step | in sequence | of the products alone |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for variant in VARIANTS:
            slices = min((1, 2, 4, 8), key=lambda s: step(*shape, s, variant)[2])
            _, messages, total = step(*shape, slices, variant)
            compute = step(*shape, 1, variant)[0]
            print(
                f"| {shape[0]} x {shape[1]} x {shape[2]} | {variant.name} | {slices} | {compute * 1e3:.2f} ms | {messages * 1e3:.2f} ms"
                f" | {total * 1e3:.2f} ms | {(compute + messages) * 1e3:.2f} ms | {compute / total:.0%} |"
            )


if __name__ == "__main__":
    main()
