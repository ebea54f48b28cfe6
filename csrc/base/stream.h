// Order and memory of one rank's work, and the one place that tells devices apart.
//   cpu   a stream is the calling thread: work is done when the call returns, and overlap comes from transports that move data by
//         themselves. Workspace comes from the rank's shared heap, so that any buffer may be sent in place.
//   cuda  work is queued on the caller's stream and done in its order (base/cuda.h); workspace comes from the caller's allocator.
#pragma once
#include <cstddef>
#include <utility>

#include "base/heap.h"
#include "base/matrix.h"

namespace gingham {

enum class Device { cpu, cuda };
// How fp32 products are computed on cuda: in fp32, or rounded to tf32 for the tensor cores (torch.backends.cuda.matmul.allow_tf32).
enum class Math { exact, tf32 };

class Stream {
 public:
  virtual ~Stream() = default;
  virtual Device device() const { return Device::cpu; }
  virtual void* native() const { return nullptr; }  // cudaStream_t
  virtual void* allocate(size_t bytes, Heap::Kind kind) const = 0;
  virtual void free(void* p) const = 0;
  Math math = Math::exact;
};

// Every kernel's public function starts with this line: on cuda the call goes to its twin in namespace gingham::cuda.
#ifdef GINGHAM_CUDA
#define DISPATCH_DEVICE(stream, call) \
  if ((stream).device() == ::gingham::Device::cuda) return ::gingham::cuda::call
#define IF_CUDA(call, otherwise) ::gingham::cuda::call  // what needs no stream
#else
#define DISPATCH_DEVICE(stream, call)
#define IF_CUDA(call, otherwise) otherwise
#endif

class CpuStream : public Stream {
 public:
  CpuStream() = default;  // for kernels that take no workspace
  explicit CpuStream(Heap& heap) : heap_(&heap) {}
  void* allocate(size_t bytes, Heap::Kind kind) const override { return heap_->allocate(bytes, kind); }
  void free(void* p) const override { heap_->free(p); }

 private:
  Heap* heap_ = nullptr;
};

// Where a cuda stream's workspace comes from; both calls are ordered on `stream` (a cudaStream_t).
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual void* allocate(size_t bytes, int device, void* stream) = 0;
  virtual void free(void* p, void* stream) = 0;
};

// Workspace that is returned at the end of its scope.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Stream& stream, size_t bytes) : stream_(&stream), data_(bytes ? stream.allocate(bytes, Heap::Kind::workspace) : nullptr) {}
  Scratch(Scratch&& other) noexcept : stream_(other.stream_), data_(std::exchange(other.data_, nullptr)) {}
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(stream_, other.stream_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Scratch() {
    if (data_) stream_->free(data_);
  }
  char* data() const { return static_cast<char*>(data_); }

 private:
  const Stream* stream_ = nullptr;
  void* data_ = nullptr;
};

}  // namespace gingham
