"""What the core raises, beside Python's own errors; each names the rank that it is about."""

from . import _C

MeshError, PeerDied, PeerStalled, ShapeError = _C.MeshError, _C.PeerDied, _C.PeerStalled, _C.ShapeError


class LayoutError(_C.MeshError):
    """An operation that is wrong on a block of a tensor, found in the first step: the line, how the block is cut, what to write."""
