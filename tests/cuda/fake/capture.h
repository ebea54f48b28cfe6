// Graph captures of the fake runtime, by CUDA's rules for streams and events. What a capture records runs when it ends without an error, once.
//   905  a stream of a capture waits for an event from outside of it    907  anything waits for or asks after an event of an ended capture
//   906  the default stream and a capture of a stream that it would wait for    904  a stream of the capture was not joined
//   900  the host waits for or asks after what is captured, or makes a call that may not be made while something is   901  after any of them
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fake {

class Stream;

struct Capture {
  Capture(Stream& of, cudaStreamCaptureMode in) : id(++begun), origin(&of), mode(in), thread(std::this_thread::get_id()) {}
  unsigned long long id;
  Stream* origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  std::vector<Stream*> members;  // guarded by captures_mutex
  std::atomic<bool> broken{false}, ended{false};
  static inline std::atomic<unsigned long long> begun{0};
  // The call that reports the error breaks the capture with it.
  cudaError_t fail(cudaError_t error) {
    broken.store(true);
    return error;
  }
};

inline std::mutex captures_mutex;
inline std::vector<std::shared_ptr<Capture>> captures;  // those that are going on
inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

// Calls that CUDA refuses beside a capture, unless the thread said that it knows: cudaMalloc, cudaEventQuery and the like.
inline cudaError_t refused_beside_capture() {
  const std::lock_guard lock(captures_mutex);
  for (const auto& each : captures) {
    const bool own = each->thread == std::this_thread::get_id();
    const bool everywhere = each->mode == cudaStreamCaptureModeGlobal && capture_mode == cudaStreamCaptureModeGlobal;
    if (everywhere || (own && each->mode != cudaStreamCaptureModeRelaxed && capture_mode != cudaStreamCaptureModeRelaxed))
      return each->fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

}  // namespace fake
