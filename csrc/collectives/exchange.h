// Small and irregular movements: numbers of every rank, and messages between any pairs of ranks.
#pragma once
#include <utility>
#include <vector>

#include "base/stream.h"
#include "transport/axis.h"

namespace gingham {

// Every rank's numbers (at most 8), in axis order: a control message, not counted.
std::vector<std::vector<int64_t>> exchange_sizes(Axis& axis, const std::vector<int64_t>& mine);

using Messages = std::vector<std::pair<int, Matrix>>;  // (peer, what is sent to it or arrives from it)

// Every send of a rank must be a receive of its peer, in the same order. rows: must agree among the ranks; -1: need not.
//   bytes received: of `receives`, a message each
void exchange(Axis& axis, const Messages& sends, const Messages& receives, int64_t rows, const Stream& stream);

}  // namespace gingham
