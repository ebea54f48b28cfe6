// The calls that begin, end and ask for graph captures; the rules stand in capture.h.
#include "capture.h"

#include "stream.h"

namespace fake {
namespace {

// The work of a graph in some order that keeps to its dependencies, as a device may choose it.
std::deque<Node> in_one_line(std::vector<std::deque<Node>> branches) {
  static std::minstd_rand engine(static_cast<unsigned>(atoi(getenv("FAKE_CUDA_GRAPHS")) * 31 + current_device + 1));
  std::set<const Ticket*> to_punch;
  for (const auto& branch : branches)
    for (const Node& node : branch)
      if (node.punches) to_punch.insert(node.punches);
  std::deque<Node> out;
  for (;;) {
    std::vector<std::deque<Node>*> ready;
    for (auto& branch : branches)
      if (!branch.empty() && !to_punch.contains(branch.front().waits)) ready.push_back(&branch);
    if (ready.empty()) return out;
    std::deque<Node>& chosen = *ready[engine() % ready.size()];
    to_punch.erase(chosen.front().punches);
    out.push_back(std::move(chosen.front()));
    chosen.pop_front();
  }
}

}  // namespace
}  // namespace fake

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
  std::vector<std::deque<fake::Node>> branches;
  for (fake::Stream* member : capture->members) branches.push_back(member->leave());
  if (runs && getenv("FAKE_CUDA_GRAPHS"))
    capture->origin->launch(fake::in_one_line(std::move(branches)));
  else if (runs)
    for (size_t i = 0; i < branches.size(); i++) capture->members[i]->launch(std::move(branches[i]));
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
