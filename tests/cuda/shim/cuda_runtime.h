// Stands in for the toolkit's header of this name when a .cu file is compiled by a host compiler: the real API declarations, threadIdx and
// its like as the fiber's own, and a launch that runs the kernel in the shim. Compile with
//   -x c++ -std=c++20 -DGINGHAM_SHIM -DGINGHAM_CUDA -Wno-unknown-pragmas -I tests/cuda/shim -I csrc -isystem <toolkit>/include
#pragma once
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <functional>
#include <tuple>

#include "shim.h"

#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  if (!gingham::shim::may_use(reinterpret_cast<const void*>(kernel), config->dynamicSmemBytes)) return cudaErrorInvalidValue;
  const gingham::shim::Launch launch{config->gridDim, config->blockDim, config->dynamicSmemBytes};
  shim_enqueue(config->stream,
               [launch, kernel, pack = std::tuple<Params...>(args...)] { gingham::shim::run(launch, [&] { std::apply(kernel, pack); }); });
  return cudaSuccess;
}
