// out = the sum of terms, each of which is itself the sum over some places of an axis, in one order that follows from the places alone: the
// sums over 2 places beside each other first, from the first place on, then over 4, over 8 and so on. (x0 + x1) + (x2 + x3) is made of
// x0, x1, x2, x3 as of x0 + x1 and x2 + x3, so that a host may sum what its own ranks hold and the bits of the whole stay the same.
#pragma once
#include <bit>
#include <span>

#include "base/matrix.h"
#include "base/stream.h"

namespace gingham {

// The sum over the places [begin, end).
struct Term {
  int begin, end;
  Matrix sum;
  bool spare;  // the memory may be overwritten
};

// Where the tree over places [begin, end) parts: the sum of [begin, middle) is added to that of [middle, end).
inline int middle_of(int begin, int end) { return begin + static_cast<int>(std::bit_floor(static_cast<unsigned>(end - begin - 1))); }

// terms: whole branches of the tree over [terms.front().begin, terms.back().end), in order, of one shape, in fp32 or fp64. out may be one of
// them, or in 16 bits where they are fp32: the sum, rounded once. On the CPU one pass over memory, which leaves the terms as they are; on a GPU a sum
// of two at a time, in the spare ones: all but one.
void tree_sum(std::span<const Term> terms, const Matrix& out, const Stream& stream);

}  // namespace gingham
