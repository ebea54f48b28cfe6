// The calls that begin, end and ask for graph captures; the rules stand in capture.h.
#include "capture.h"

#include "stream.h"

using fake::stream_of;

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (!stream) return cudaErrorStreamCaptureUnsupported;
  if (stream_of(stream).capture()) return cudaErrorIllegalState;
  const std::lock_guard lock(fake::captures_mutex);
  auto made = std::make_shared<fake::Capture>(stream_of(stream), mode);
  stream_of(stream).join(made);
  fake::captures.push_back(made);
  return cudaSuccess;
}
// The graph is only a sign that there is one: what was captured has been queued.
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const auto capture = stream_of(stream).capture();
  if (!capture) return cudaErrorIllegalState;
  if (capture->origin != &stream_of(stream)) return capture->fail(cudaErrorStreamCaptureUnmatched);
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
    return capture->fail(cudaErrorStreamCaptureWrongThread);
  const std::lock_guard lock(fake::captures_mutex);
  const bool joined = capture->origin->has_joined(capture->members), runs = joined && !capture->broken;
  capture->ended.store(true);
  fake::captures.erase(std::find(fake::captures.begin(), fake::captures.end(), capture));
  for (fake::Stream* member : capture->members) member->leave(runs);
  *graph = runs ? reinterpret_cast<cudaGraph_t>(capture->id) : nullptr;
  return runs ? cudaSuccess : joined ? cudaErrorStreamCaptureInvalidated : cudaErrorStreamCaptureUnjoined;
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  const auto capture = stream ? stream_of(stream).capture() : nullptr;
  *status = !capture ? cudaStreamCaptureStatusNone : capture->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  if (id && *status == cudaStreamCaptureStatusActive) *id = capture->id;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, fake::capture_mode);
  return cudaSuccess;
}

}  // extern "C"
