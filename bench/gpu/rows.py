"""What the parts of bench/gpu.sh print: one row a check or measurement, as a line of JSON that bench/gpu/run.py gathers."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

import gingham

# GINGHAM_PLACE=cpu: to try these scripts over the fake runtime of tests/cuda. Never by itself: a machine whose torch sees no GPU must fail
PLACE = os.environ.get("GINGHAM_PLACE", "cuda")
RATES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"}


def row(name: str, value: float | str, bound: float | None = None, unit: str = "", **more: Any) -> None:
    """A check where there is a bound: right if value <= bound. NaN is wrong."""
    right = None if bound is None else bool(isinstance(value, float | int) and value <= bound)
    print("ROW " + json.dumps({"name": name, "value": value, "bound": bound, "unit": unit, "right": right, **more}), flush=True)


def error_of(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth||, truth in float64."""
    got = got.detach().to(torch.float64)
    if got.shape != truth.shape:
        return float("nan")
    return float((got - truth).norm() / truth.norm().clamp_min(1e-300))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextlib.contextmanager
def aside() -> Iterator[torch.cuda.Stream]:
    """What is queued in it lies on a stream of its own, behind what came before, before what comes after: to warm a capture up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield side
    torch.cuda.current_stream().wait_stream(side)


def milliseconds(run: Callable[[], object], rounds: int = 20, warmup: int = 3) -> float:
    """The median of `rounds` calls, by events around each."""
    for _ in range(warmup):
        run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def main(parts: dict[str, Callable[[], None]]) -> None:
    """Runs the parts named on the command line, all without a name; one that raises is a row, and the next still runs."""
    failed = 0
    for name in sys.argv[1:] or list(parts):
        try:
            parts[name]()
        except BaseException as error:
            failed += 1
            text = "".join(traceback.format_exception(error))  # with what it hides, such as the first error in a capture
            text = text if len(text) < 6000 else text[:3000] + "\n...\n" + text[-3000:]
            row(name, f"{type(error).__name__}: {error}"[:300], 0.0)
            print(text, flush=True)
            if isinstance(error, KeyboardInterrupt | SystemExit) or "CUDA error" in str(error) or "cuda" in type(error).__name__:
                break
        gingham.destroy()
    sys.stdout.flush()
    os._exit(1 if failed else 0)  # a dead context must not keep the process
