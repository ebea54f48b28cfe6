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

// The key as the generator takes it.
struct DropoutDraw {
  uint32_t k0, k1, threshold;
  double keep;  // 1 / (1 - p)
};
DropoutDraw draw_of(const DropoutKey& key);

// Runs of `length` elements that are contiguous here and in the global tensor: dims that lie whole on this rank join the innermost run.
struct DropoutRuns {
  static constexpr int kDims = 8;
  int64_t count = 0, length = 1;
  int dims = 0;
  int64_t local[kDims], offset[kDims], weight[kDims];  // outer dims, innermost first; weight: elements of the global tensor per step
  int64_t first = 0;                                   // global index of element 0 of the innermost run

#ifdef __CUDACC__
  __host__ __device__
#endif
      uint64_t index(int64_t run) const {
    int64_t at = first;
    for (int i = 0; i < dims; i++) {
      at += (offset[i] + run % local[i]) * weight[i];
      run /= local[i];
    }
    return static_cast<uint64_t>(at);
  }
};
DropoutRuns runs_of(const std::vector<int64_t>& local, const std::vector<int64_t>& global, const std::vector<int64_t>& offset);

// x, y: contiguous tensors of `local` sizes whose element (0, .., 0) stands at `offset` in a tensor of `global` sizes.
void dropout(const void* x, void* y, DType dtype, const std::vector<int64_t>& local, const std::vector<int64_t>& global,
             const std::vector<int64_t>& offset, const DropoutKey& key, const Stream& stream);

// The factors of elements [index, index + n) of the global tensor: 1 / (1 - p) where they are kept, 0 where not. On the CPU.
void keep_run(float* factors, uint64_t index, int64_t n, const DropoutKey& key);
void keep_run(double* factors, uint64_t index, int64_t n, const DropoutKey& key);

namespace cuda {
void dropout(const void* x, void* y, DType dtype, const std::vector<int64_t>& local, const std::vector<int64_t>& global,
             const std::vector<int64_t>& offset, const DropoutKey& key, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
