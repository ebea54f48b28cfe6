"""A table of errors against float64, printed when a test module ends."""

import time

import numpy as np


class Report:
    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float]] = []
        self.began = time.perf_counter()

    def check(self, name: str, got: np.ndarray, expected: np.ndarray, limit: float) -> None:
        """The largest difference over the largest expected element, which may not exceed the limit; NaN does."""
        error = float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-300))
        self.add(name, error)
        assert error <= limit, f"{name}: error {error:.1e}, limit {limit:.1e}"

    def add(self, name: str, error: float) -> None:
        now = time.perf_counter()
        self.rows.append((name, error, now - self.began))
        self.began = now


def print_report(kept: Report) -> None:
    print()
    for name, error, seconds in kept.rows:
        print(f"  {name:<64} error {error:8.1e}  {seconds:6.2f} s")
