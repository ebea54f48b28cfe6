// y = x keep / (1 - p), keep drawn by Philox4x32-10 (Salmon et al. 2011) keyed by (seed, name, call number) and counted by the element's
// index in the GLOBAL tensor: every grid draws the same mask, and the backward pass draws it again instead of storing it.
//   counter = (index / 4, call), key = mix(seed, name); word index % 4; keep where word >= p 2^32
#pragma once
#include <cstdint>
#include <vector>

#include "base/dtype.h"
#include "base/stream.h"

namespace gingham {

struct DropoutKey {
  uint64_t seed, name, call;
  double p;
};

// x, y: contiguous tensors of `local` sizes whose element (0, .., 0) stands at `offset` in a tensor of `global` sizes.
void dropout(const void* x, void* y, DType dtype, const std::vector<int64_t>& local, const std::vector<int64_t>& global,
             const std::vector<int64_t>& offset, const DropoutKey& key, const Stream& stream);

namespace cuda {
void dropout(const void* x, void* y, DType dtype, const std::vector<int64_t>& local, const std::vector<int64_t>& global,
             const std::vector<int64_t>& offset, const DropoutKey& key, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
