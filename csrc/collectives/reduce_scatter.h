// x is cut among the ranks; out = the sum over ranks of their shares of this one. x and out in fp32 or fp64.
//   bytes received per rank: (g - 1) of its own share, messages g - 1. On g ranks of several hosts, equally many on each and beside each other:
//   as many bytes and messages in all, of which no more than one share per other host crosses into a host for each of its ranks.
// The sums are taken in the order of a tree over the places (kernels/tree_sum.h) on every source and any hosts: the bits are the same.
//   window: each rank reads its share in the others' x where they stand.
//   ring: every rank sends each other one its share; on several hosts the ranks of a host first sum what they have for another one.
#pragma once
#include "base/stream.h"
#include "collectives/resident.h"
#include "transport/axis.h"

namespace gingham {

// out may be this rank's share of x itself.
void reduce_scatter(Axis& axis, const Shares& x, const Matrix& out, const Stream& stream);

}  // namespace gingham
