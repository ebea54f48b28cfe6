// Every rank's block to every rank. Sizes may differ from rank to rank.
//   steps g - 1, bytes received per rank: all blocks but its own, messages g - 1
//   window: read where they stand.  ring: every rank sends its block to each other one on its host, and to one on each other host, which
//   hands it on to the rest there: a block crosses into a host once.
#pragma once
#include <functional>
#include <span>

#include "base/stream.h"
#include "transport/axis.h"

namespace gingham {

// blocks[i] receives rank i's `mine` (blocks[own] too). Ranks that disagree about the blocks' total size are told, none waits.
void all_gather(Axis& axis, const Matrix& mine, std::span<const Matrix> blocks, const Stream& stream);

// The same where the peers' shapes are not known: `block` is asked once per peer for a place of the shape that the peer posted.
// agreed: a number that must be equal on all ranks of the axis; -1: nothing must.
using BlockFor = std::function<Matrix(int peer, const Shape& shape)>;
void all_gather(Axis& axis, const Matrix& mine, const Shape& shape, int64_t agreed, const BlockFor& block, const Stream& stream);

}  // namespace gingham
