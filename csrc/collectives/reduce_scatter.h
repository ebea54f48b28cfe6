// parts[j] is this rank's share of what rank j shall own; out = sum over ranks of their parts[own]. parts and out in fp32 or fp64.
//   steps g - 1, bytes received per rank: (g - 1) blocks in flight, one each step, messages g - 1
// Owner j's sum is built by ranks j + 1, j + 2, .., j in this order on every source, so window and ring agree to the bit.
//   window: the ranks add in turn to the owner's matrix.  ring: the partial sum travels from rank to rank.
#pragma once
#include <span>

#include "base/stream.h"
#include "transport/axis.h"

namespace gingham {

void reduce_scatter(Axis& axis, std::span<const Matrix> parts, const Matrix& out, const Stream& stream);

}  // namespace gingham
