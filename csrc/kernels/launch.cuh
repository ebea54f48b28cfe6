// How every kernel is queued: launch(stream, kernel, grid, block, shared_bytes, arguments...).
#pragma once
#include <map>
#include <mutex>
#include <utility>

#include "base/cuda.h"
#include "kernels/device.cuh"

namespace gingham::cuda {

// What a kernel may use without asking.
constexpr size_t kSharedWithoutAsking = 48 * 1024;
// Shapes the choice of tiles and pieces; a constant rather than the device's count, so that every device sums in the same order.
constexpr int kMultiprocessors = 132;

// Asks that a kernel may use so much on the current device, once: the call takes 4 us on an H200, as long as a launch.
inline void ask_for_shared(const void* kernel, size_t bytes) {
  static std::mutex lock;
  static std::map<std::pair<const void*, int>, size_t> asked;  // the most, by kernel and device
  int device = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard guard(lock);
  size_t& most = asked[{kernel, device}];
  if (bytes <= most) return;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  most = bytes;
}

template <class... Params, class... Args>
void launch(const Stream& stream, void (*kernel)(Params...), dim3 grid, int block, size_t shared_bytes, Args... args) {
  if (shared_bytes > kSharedWithoutAsking) ask_for_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
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
