// One block, so that one launch has the answer: 1024 threads read 8192 ids in a microsecond or two, a million in a tenth of a millisecond.
#include "kernels/indices.h"
#include "kernels/reduce.cuh"

namespace gingham::cuda {
namespace {

constexpr int kThreads = 1024;

__device__ inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

__global__ void __launch_bounds__(kThreads) find_kernel(const int64_t* ids, int64_t count, int64_t classes, int64_t ignored, int64_t* found) {
  int64_t ends[2] = {INT64_MIN, INT64_MIN}, wrong[1] = {0};  // ~smallest, so that both are maxima
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const int64_t id = ids[i];
    const bool right = (id >= 0 && id < classes) || id == ignored;
    ends[0] = right ? ends[0] : larger(ends[0], ~id);
    ends[1] = right ? ends[1] : larger(ends[1], id);
    wrong[0] += right ? 0 : 1;
  }
  block_join(ends, larger);
  block_join(wrong, [](int64_t a, int64_t b) { return a + b; });
  if (threadIdx.x != 0) return;
  found[0] = ~ends[0];
  found[1] = ends[1];
  found[2] = wrong[0];
}

}  // namespace

void find_wrong(const int64_t* ids, int64_t count, int64_t classes, int64_t ignored, int64_t* found, const Stream& stream) {
  launch(stream, find_kernel, dim3(1), kThreads, kRowShared, ids, count, classes, ignored, found);
}

}  // namespace gingham::cuda
