"""What gingham raises, beside Python's own errors; each names the rank that it is about. The core raises the first five too."""


class ShapeError(ValueError):
    """A tensor that does not fit: got, expected, and on which rank."""


class MeshError(ValueError):
    """A grid, a job or a call that cannot be: sizes, ranks that call different things, use after destroy."""


class PeerDied(RuntimeError):
    """A rank of the job has ended. rank: which."""

    rank: int


class PeerStalled(RuntimeError):
    """A rank has not come to a call in time. rank: which."""

    rank: int


class PeerOutOfMemory(MemoryError):
    """A rank had no memory for a call, which has ended on all ranks; the mesh goes on. rank: which."""

    rank: int


class LayoutError(MeshError):
    """An operation that is wrong on a block of a tensor, found in the first step: the line, how the block is cut, what to write."""
