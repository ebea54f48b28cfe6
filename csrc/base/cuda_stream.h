// The CUDA half of base/stream.h: work is queued on the stream that the caller computes on, memory comes from the caller's allocator.
//   order   events between streams, never a wait of the host: a step may run while the host is far ahead, and may be captured in a graph
//   memory  freed at once on the host; it is used again in the order of the compute stream, which by then waits for all other streams: a call
//           sees to that before it ends, and where an error leaves it on the way, `broken_off` does
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "base/cuda.h"

namespace gingham {

// A point on a stream. Recording it again moves it; who waits for it waits for where it stood at that moment.
class Event {
 public:
  explicit Event(unsigned flags = cudaEventDisableTiming) { CUDA_CHECK(cudaEventCreateWithFlags(&event_, flags)); }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&&) = delete;
  ~Event() {
    if (event_) cudaEventDestroy(event_);
  }
  void record(cudaStream_t stream) const { CUDA_CHECK(cudaEventRecord(event_, stream)); }
  void hold_back(cudaStream_t stream) const { CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0)); }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// The number of the graph capture that the stream is part of, 0 outside of one. No two captures of a process share a number.
inline unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

// Of the highest priority, ordered with no other stream; the caller destroys it.
cudaStream_t urgent_stream();

class CudaStream : public Stream {
 public:
  // Starts on a stream of its own with CUDA's stream-ordered pool; the binding replaces both by torch's.
  explicit CudaStream(int ordinal);
  ~CudaStream() override;
  Device device() const override { return Device::cuda; }
  void* native() const override { return stream_; }
  void* allocate(size_t bytes, Heap::Kind kind) const override;
  void free(void* p) const override;

  int ordinal() const { return ordinal_; }
  void enter() const { CUDA_CHECK(cudaSetDevice(ordinal_)); }  // makes the device the calling thread's
  void follow(cudaStream_t stream) { stream_ = stream; }
  void take_memory_from(std::shared_ptr<DeviceMemory> memory) { memory_ = std::move(memory); }
  std::function<void()> broken_off;                 // told of memory that is freed while an error is on its way; throws nothing
  std::function<void(const std::string&)> refused;  // told of an allocation for which there is no memory, before it throws
  void fail_next() { fails_ = true; }               // the next allocation is refused, as though the device had no memory
  void refuse_injected() const;                     // throws where that is this one
  Heap::Usage usage() const;
  void reset_peak();

 private:
  int ordinal_;
  cudaStream_t own_ = nullptr, stream_ = nullptr;
  std::shared_ptr<DeviceMemory> memory_;
  mutable std::mutex mutex_;
  mutable std::unordered_map<void*, std::pair<size_t, Heap::Kind>> blocks_;
  mutable Heap::Usage usage_;
  mutable std::atomic<bool> fails_{false};
};

}  // namespace gingham
