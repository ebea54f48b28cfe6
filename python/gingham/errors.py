"""What the core raises, beside Python's own errors; each names the rank that it is about."""

from . import _C

MeshError, ShapeError = _C.MeshError, _C.ShapeError
PeerDied, PeerOutOfMemory, PeerStalled = _C.PeerDied, _C.PeerOutOfMemory, _C.PeerStalled


class LayoutError(_C.MeshError):
    """An operation that is wrong on a block of a tensor, found in the first step: the line, how the block is cut, what to write."""
