// How every kernel is queued: launch(stream, kernel, grid, block, shared_bytes, arguments...).
#pragma once
#include "base/cuda.h"
#include "kernels/device.cuh"

namespace gingham::cuda {

// What a kernel may use without asking.
constexpr size_t kSharedWithoutAsking = 48 * 1024;
// Shapes the choice of tiles and pieces; a constant rather than the device's count, so that every device sums in the same order.
constexpr int kMultiprocessors = 132;

template <class... Params, class... Args>
void launch(const Stream& stream, void (*kernel)(Params...), dim3 grid, int block, size_t shared_bytes, Args... args) {
  if (shared_bytes > kSharedWithoutAsking)
    CUDA_CHECK(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = native(stream);
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

// A grid's number of blocks, which CUDA counts in 31 bits along x.
inline unsigned blocks(int64_t count) {
  CHECK(ShapeError, count >= 0 && count <= INT32_MAX, "a kernel of ", count, " blocks, at most ", INT32_MAX, ": cut the tensor");
  return static_cast<unsigned>(count);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gingham::cuda
