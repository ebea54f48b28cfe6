#include "transport/queued.h"

#include <algorithm>

namespace gingham {

Queued::Queued(std::unique_ptr<Axis> shared, GroupOrder& order) : Axis(shared->rank(), shared->size()), shared_(std::move(shared)), order_(order) {
  compute().enter();
  int least = 0, greatest = 0;
  CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  // Above the compute stream's priority: the few blocks of a message must not wait for a product's last wave.
  for (Line& line : lines_) CUDA_CHECK(cudaStreamCreateWithPriority(&line.stream, cudaStreamNonBlocking, greatest));
}

Queued::~Queued() {
  for (Line& line : lines_) {
    if (order_.last_stream == line.stream) order_.last = nullptr;  // it ends here; its calls have joined it to the compute stream
    if (line.stream) cudaStreamDestroy(line.stream);
  }
}

void Queued::post(std::span<const Matrix> panels, int64_t rows, bool uneven, const Shape& shape) {
  CHECK(MeshError, panels.empty(), "GPUs do not read each other's panels in place");
  shared_->board().post({}, rows, uneven, shape);
}

void Queued::finish() {
  for (Line& line : lines_) flush(line);
  shared_->board().finish();
}

void Queued::send(int peer, const void* data, size_t bytes, int lane) {
  Line& line = lines_[static_cast<size_t>(line_of(lane))];
  if (open_groups_ == 0 && !line.waiting.empty()) flush(line);
  line.waiting.push_back({Way::send, peer, const_cast<void*>(data), bytes, lane});
  count_sent(bytes);
}

void Queued::recv(int peer, void* data, size_t bytes, int lane) {
  Line& line = lines_[static_cast<size_t>(line_of(lane))];
  line.waiting.push_back({Way::recv, peer, data, bytes, lane});
  count_received(bytes, crosses(peer));
  if (open_groups_ == 0) flush(line);
}

void Queued::group_end() {
  if (--open_groups_ == 0)
    for (Line& line : lines_) flush(line);
}

void Queued::flush(Line& line) {
  if (line.waiting.empty() || open_groups_ > 0) return;
  const unsigned long long capture = capture_of(native(order_.compute));
  if (capture) allow_capture();
  order_.entry.record(native(order_.compute));
  order_.entry.hold_back(line.stream);
  if (order_.last && order_.last_stream != line.stream) order_.last->hold_back(line.stream, capture);
  carry(static_cast<int>(&line - lines_.data()), line.waiting);
  line.groups++;
  if (line.ends.empty()) line.ends.reserve(kRemembered);
  if (line.ends.size() < kRemembered) line.ends.emplace_back();
  GroupEnd& end = line.ends[(line.groups - 1) % kRemembered];
  end.record(line.stream, capture);
  order_.last = &end;
  order_.last_stream = line.stream;
  for (const Message& m : line.waiting) {
    LaneState& lane = lanes_[static_cast<size_t>(m.lane)];
    if (m.way == Way::recv) {
      lane.received = line.groups;
    } else {
      lane.sends.push_back(line.groups);
      if (lane.sends.size() > kRemembered) lane.sends.pop_front();
    }
  }
  line.waiting.clear();
  if (!capture && probe_.since.load() == 0) {
    probe_.event.record(line.stream);
    probe_.since.store(now());
  }
}

// An end that has been recorded anew since stands later on the same stream: the wait is longer, never too short.
void Queued::await_group(const Line& line, uint64_t group) {
  if (group > 0) line.ends[(group - 1) % kRemembered].hold_back(native(order_.compute), capture_of(native(order_.compute)));
}

void Queued::arrived(int lane) {
  Line& line = lines_[static_cast<size_t>(line_of(lane))];
  flush(line);
  await_group(line, lanes_[static_cast<size_t>(lane)].received);
}

void Queued::drain(int peer, int lane, uint32_t left) {
  Line& line = lines_[static_cast<size_t>(line_of(lane))];
  const uint32_t waiting = static_cast<uint32_t>(
      std::count_if(line.waiting.begin(), line.waiting.end(), [lane](const Message& m) { return m.way == Way::send && m.lane == lane; }));
  // A send that need not have been taken yet goes on waiting for the receive that shall leave with it.
  if (waiting > left) flush(line);
  await_taken(peer, lane, waiting > left ? left : left - waiting);
}

void Queued::await_taken(int, int lane, uint32_t left) {
  const Line& line = lines_[static_cast<size_t>(line_of(lane))];
  const std::deque<uint64_t>& sends = lanes_[static_cast<size_t>(lane)].sends;
  if (sends.size() > left) await_group(line, sends[sends.size() - 1 - left]);
}

}  // namespace gingham
