"""The C++ core. Tensors are plain, contiguous CPU tensors; results live in the heap that the ranks share."""

from collections.abc import Sequence

from torch import Tensor

class ShapeError(ValueError): ...
class MeshError(ValueError): ...

class PeerDied(RuntimeError):
    rank: int

class PeerStalled(RuntimeError):
    rank: int

class Job:
    path: str
    rank: int
    size: int
    def __init__(self, rank: int, size: int, path: str = "", timeout: float = 60.0) -> None: ...
    def ready(self) -> None: ...
    def fail(self, rank: int, message: str) -> None: ...
    def close(self) -> None: ...
    def empty(self, shape: Sequence[int], dtype: str) -> Tensor: ...
    def memory(self) -> dict[str, int]: ...
    def reset_peak(self) -> None: ...

class Axis:
    rank: int
    size: int
    def __init__(self, job: Job, index: int, members: Sequence[int], latency: float = 0.0, bandwidth: float = 0.0) -> None: ...
    def traffic(self, reset: bool = False) -> dict[str, int]: ...
    def all_gather(self, x: Tensor, source: str = "window", counted: bool = True, rows: int = -1) -> list[Tensor]: ...
    def all_reduce_(self, x: Tensor, source: str = "window", counted: bool = True) -> None: ...
    def reduce_scatter(self, x: Tensor, sizes: Sequence[int], source: str = "window", counted: bool = True) -> Tensor: ...
    def broadcast_(self, x: Tensor, root: int, counted: bool = True) -> None: ...
    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        recvs: Sequence[tuple[int, Sequence[int]]],
        dtype: str,
        counted: bool = True,
        rows: int = -1,
        features: int = 0,
    ) -> list[Tensor]: ...

class Operand:
    def __init__(self, axis: Axis | None, dim: int, offsets: Sequence[int], replicated: bool = False) -> None: ...

class Step:
    def __init__(
        self,
        job: Job,
        name: str,
        x: Operand,
        w: Sequence[Operand],
        y: Sequence[Operand],
        depth: Axis | None,
        slice_dim: str,
        k: int,
        n: Sequence[int],
        slices: int = 1,
        source: str = "window",
        out_in: bool = True,
    ) -> None: ...
    def forward(self, x: Tensor, ws: Sequence[Tensor], biases: Sequence[Tensor | None], epilogue: str = "none") -> list[Tensor]: ...
    def backward(
        self,
        x: Tensor | None,
        ws: Sequence[Tensor | None],
        dys: Sequence[Tensor],
        need_x: bool,
        need_w: bool,
        need_b: Sequence[bool],
        reduce_depth: bool = True,
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]: ...

def gelu_backward(dy: Tensor, x: Tensor) -> Tensor: ...
def dropout(
    x: Tensor, p: float, seed: int, name: int, call: int, global_shape: Sequence[int], offsets: Sequence[int], job: Job | None = None
) -> Tensor: ...
def version() -> str: ...
def blas() -> str: ...
def set_num_threads(n: int) -> None: ...
