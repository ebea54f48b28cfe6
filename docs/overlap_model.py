"""The expected overlap of one Linear, forward and backward, on 8 H100s of one NVLink host at 2.5D (q = 2, depth 2).

docs/theory.md section 3 gives T = max(comp, comm) + min(comp, comm) / S + S (g - 1) alpha;
this prints the table of docs/cuda.md. Nothing in it was measured.

    python docs/overlap_model.py
"""

NVLINK = 380e9  # bytes a second and direction that rings reach of 450
ALPHA = 8e-6  # seconds a group of messages: launch and first byte
RATES = {"mma.sync": 440e12, "wgmma": 650e12}  # flops a second of bf16 products that docs/cuda_kernels.md expects
Q, DEPTH = 2, 2
RANKS = Q * Q * DEPTH


def step(m: int, k: int, n: int, rate: float, slices: int) -> tuple[float, float, float]:
    """Seconds of computation, of communication that slices can hide, and in all."""
    x, w = m * k, k * n
    flops = 6 * x * n / RANKS
    gathers = 2 * (2 * x * (Q - 1) / RANKS + 2 * w * (Q - 1) / Q**2)  # bf16: X and W, for Y and again for the gradients
    sums = 4 * (x * (Q - 1) / RANKS + w * (Q - 1) / Q**2)  # fp32: dX and dW
    depth = 4 * 2 * w * (DEPTH - 1) / (DEPTH * Q**2)  # the all-reduce of dW, after the last slice: not hidden inside the step
    compute, hidden, after = flops / rate, (gathers + sums) / NVLINK, depth / NVLINK
    messages = 6 * slices * (Q - 1) * ALPHA
    total = max(compute, hidden) + min(compute, hidden) / slices + messages + after
    return compute, hidden + after, total


def main() -> None:
    print("| tokens x in x out | gemm | S | computation | communication | step, overlapped | in sequence | gain | of computation alone |")
    print("|---|---|---|---|---|---|---|---|---|")
    for m, k, n in ((8192, 4096, 16384), (16384, 8192, 8192), (32768, 8192, 28672)):
        for name, rate in RATES.items():
            for slices in (1, 4):
                compute, comm, total = step(m, k, n, rate, slices)
                alone = compute + comm + 6 * ALPHA
                print(
                    f"| {m} x {k} x {n} | {name} | {slices} | {compute * 1e3:.2f} ms | {comm * 1e3:.2f} ms | {total * 1e3:.2f} ms |"
                    f" {alone * 1e3:.2f} ms | {alone / total:.2f} x | {compute / total:.0%} |"
                )


if __name__ == "__main__":
    main()
