// The CUDA runtime as the rest of the core sees it; included only by files that are built WITH_CUDA.
#pragma once
#include <cuda_runtime_api.h>

#include "base/check.h"
#include "base/stream.h"

#define CUDA_CHECK(call)                                                                                                 \
  do {                                                                                                                   \
    const cudaError_t cuda_check_status = (call);                                                                        \
    CHECK(::gingham::DeviceError, cuda_check_status == cudaSuccess, #call, ": ", cudaGetErrorString(cuda_check_status)); \
  } while (0)

namespace gingham {

inline cudaStream_t native(const Stream& stream) { return static_cast<cudaStream_t>(stream.native()); }

}  // namespace gingham
