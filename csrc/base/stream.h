// Order and memory of one rank's work. On the CPU a stream is the calling thread: work is done when the call returns, and overlap comes
// from transports that move data by themselves. Workspace comes from the rank's shared heap, so that any buffer may be sent in place.
#pragma once
#include <cstddef>
#include <utility>

#include "base/heap.h"
#include "base/matrix.h"

namespace gingham {

class Stream {
 public:
  explicit Stream(Heap& heap) : heap_(&heap) {}
  Heap& heap() const { return *heap_; }
  void* allocate(size_t bytes, Heap::Kind kind) const { return heap_->allocate(bytes, kind); }
  void free(void* p) const { heap_->free(p); }

 private:
  Heap* heap_;
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
