// x = sum of x over the ranks of the axis, in place, the same bits on every rank: reduce_scatter of torch.chunk pieces, then all_gather.
//   steps 2 (g - 1), bytes received 2 (g - 1) / g of x (exact over the axis when uneven), messages 2 (g - 1). x dense, fp32 or fp64.
#pragma once
#include "base/stream.h"
#include "transport/axis.h"

namespace gingham {

void all_reduce(Axis& axis, const Matrix& x, const Stream& stream);
// The same sum into `rounded`, of as many numbers, dense, in 16 bits where x is fp32: it is rounded before it is gathered, so that half of the way
// takes half of the bytes. x is overwritten.
void all_reduce(Axis& axis, const Matrix& x, const Matrix& rounded, const Stream& stream);

}  // namespace gingham
