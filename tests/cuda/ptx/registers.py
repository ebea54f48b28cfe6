"""The registers of all threads of a wave, by name."""

import numpy as np

from .memory import Array

NUMPY = {"pred": "?", **{f"b{n}": f"u{n // 8}" for n in (8, 16, 32, 64)}, "f16": "u2", "f32": "u4", "f64": "u8"}
NUMPY |= {f"{kind}{n}": f"u{n // 8}" for kind in "us" for n in (8, 16, 32, 64)}


class Registers(dict[str, Array]):
    """Made when they are first met; before they are written they hold a pattern that is NaN in every width."""

    def __init__(self, kinds: dict[str, str], threads: int) -> None:
        super().__init__()
        self.kinds, self.threads = kinds, threads

    def __missing__(self, name: str) -> Array:
        values = np.empty(self.threads, NUMPY.get(self.kinds[name], "u4"))
        self.fill(values)
        self[name] = values
        return values

    def fill(self, values: Array) -> None:
        values[:] = True if values.dtype.kind == "b" else np.array(0x7FF7DEAD7FF7DEAD & ((1 << 8 * values.itemsize) - 1), values.dtype)

    def poison(self) -> None:
        for values in self.values():
            self.fill(values)
