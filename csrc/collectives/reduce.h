// x of rank `root` = sum of x over the ranks, along the ring from root + 1 to root in chunks; the other ranks' x stay as they are.
//   steps (g - 1) + chunks - 1, bytes received per rank: x (none at root + 1), messages: chunks. x dense, fp32 or fp64.
#pragma once
#include "base/stream.h"
#include "transport/axis.h"

namespace gingham {

void reduce(Axis& axis, const Matrix& x, int root, const Stream& stream);

}  // namespace gingham
