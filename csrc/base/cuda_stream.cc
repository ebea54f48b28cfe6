#include "base/cuda_stream.h"

#include <algorithm>
#include <exception>

namespace gingham {
namespace {

class Pool : public DeviceMemory {
 public:
  void* allocate(size_t bytes, int, void* stream) override {
    void* p = nullptr;
    const cudaError_t status = cudaMallocAsync(&p, bytes, static_cast<cudaStream_t>(stream));
    CHECK(OutOfMemory, status == cudaSuccess, "no device memory for ", bytes, " bytes: ", cudaGetErrorString(status));
    return p;
  }
  void free(void* p, void* stream) override { cudaFreeAsync(p, static_cast<cudaStream_t>(stream)); }
};

// CUDA's pool gives all that is free back to the driver whenever a stream is waited for, and the next step maps it again: it is told to keep it.
// No error where a device has no pools: torch's allocator, which takes over in a package, needs none, and the pool's own first allocation throws.
void keep_freed_memory(int ordinal) {
  cudaMemPool_t pool = nullptr;
  uint64_t most = UINT64_MAX;
  if (cudaDeviceGetDefaultMemPool(&pool, ordinal) != cudaSuccess ||
      cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &most) != cudaSuccess)
    cudaGetLastError();  // else the next check of a launch would report it
}

}  // namespace

cudaStream_t urgent_stream() {
  int least = 0, greatest = 0;
  CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  cudaStream_t stream = nullptr;
  CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
  return stream;
}

CudaStream::CudaStream(int ordinal) : ordinal_(ordinal), memory_(std::make_shared<Pool>()) {
  enter();
  keep_freed_memory(ordinal);
  CUDA_CHECK(cudaStreamCreateWithFlags(&own_, cudaStreamNonBlocking));
  stream_ = own_;
}

CudaStream::~CudaStream() {
  if (own_) cudaStreamDestroy(own_);
}

void CudaStream::refuse_injected() const { CHECK(OutOfMemory, !fails_.exchange(false), "GPU ", ordinal_, " has no memory (injected)"); }

void* CudaStream::allocate(size_t bytes, Heap::Kind kind) const {
  void* p = nullptr;
  try {
    refuse_injected();
    p = memory_->allocate(bytes, ordinal_, stream_);
  } catch (const OutOfMemory& error) {
    if (refused) refused(error.what());
    throw;
  }
  const std::lock_guard lock(mutex_);
  blocks_[p] = {bytes, kind};
  usage_.grown++;
  (kind == Heap::Kind::tensor ? usage_.tensors : usage_.workspace) += bytes;
  usage_.workspace_peak = std::max(usage_.workspace_peak, usage_.workspace);
  return p;
}

void CudaStream::free(void* p) const {
  {
    const std::lock_guard lock(mutex_);
    const auto at = blocks_.find(p);
    if (at == blocks_.end()) return;
    (at->second.second == Heap::Kind::tensor ? usage_.tensors : usage_.workspace) -= at->second.first;
    blocks_.erase(at);
  }
  if (broken_off && std::uncaught_exceptions() > 0) broken_off();
  memory_->free(p, stream_);
}

Heap::Usage CudaStream::usage() const {
  const std::lock_guard lock(mutex_);
  return usage_;
}

void CudaStream::reset_peak() {
  const std::lock_guard lock(mutex_);
  usage_.workspace_peak = usage_.workspace;
}

}  // namespace gingham
