// Indices (ids, targets) that are none: which lie outside of 0 .. classes - 1 and are not `ignored`.
#pragma once
#include "base/stream.h"

namespace gingham {

// found: the smallest and the largest of them and how many there are; of none, the first two say nothing.
void find_wrong(const int64_t* ids, int64_t count, int64_t classes, int64_t ignored, int64_t* found, const Stream& stream);

namespace cuda {
void find_wrong(const int64_t* ids, int64_t count, int64_t classes, int64_t ignored, int64_t* found, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
