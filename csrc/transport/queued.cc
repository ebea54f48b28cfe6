#include "transport/queued.h"

#include <algorithm>
#include <cstdlib>

namespace gingham {
namespace {

bool reached(const Event& event) { return cudaEventQuery(event.get()) != cudaErrorNotReady; }

struct QueuedPoint : Point {
  Event event;
};

}  // namespace

// Groups run one after the other, so that the end of the last line is the end of all.
void GroupOrder::break_off() {
  for (Queued* axis : axes) axis->forget();
  const cudaStream_t stream = native(compute);
  if (!last_stream || capture_of(last_stream) != capture_of(stream)) return;
  all.record(last_stream);
  all.hold_back(stream);
}

Queued::Queued(std::unique_ptr<Axis> shared, GroupOrder& order) : Axis(shared->rank(), shared->size()), shared_(std::move(shared)), order_(order) {
  compute().enter();
  int least = 0, greatest = 0;
  CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  // Above the compute stream's priority: the few blocks of a message must not wait for a product's last wave.
  for (Line& line : lines_) CUDA_CHECK(cudaStreamCreateWithPriority(&line.stream, cudaStreamNonBlocking, greatest));
  order_.axes.push_back(this);
}

Queued::~Queued() {
  std::erase(order_.axes, this);
  for (Line& line : lines_) {
    // It ends here; its calls have joined it to the compute stream.
    if (order_.last_stream == line.stream) order_.last = nullptr, order_.last_stream = nullptr;
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

size_t Queued::chunk_bytes() const {
  const char* told = getenv("GINGHAM_CHUNK_BYTES");
  return told ? std::max<size_t>(strtoull(told, nullptr, 10), 1) : size_t{4} << 20;
}

std::unique_ptr<Point> Queued::point() {
  auto out = std::make_unique<QueuedPoint>();
  out->event.record(native(order_.compute));
  return out;
}

void Queued::group_start(const Point& after) {
  for (Line& line : lines_) flush(line);
  open_groups_++;
  after_ = &static_cast<const QueuedPoint&>(after).event;
}

void Queued::group_end() {
  if (--open_groups_ > 0) return;
  for (Line& line : lines_) flush(line);
  after_ = nullptr;
}

void Queued::flush(Line& line) {
  if (line.waiting.empty() || open_groups_ > 0) return;
  const unsigned long long capture = capture_of(native(order_.compute));
  if (capture) allow_capture();
  if (!after_) order_.entry.record(native(order_.compute));
  (after_ ? *after_ : order_.entry).hold_back(line.stream);
  if (order_.last && order_.last_stream != line.stream) order_.last->hold_back(line.stream, capture);
  if (line.last_groups.empty()) line.last_groups.reserve(kRemembered);
  if (line.last_groups.size() < kRemembered) line.last_groups.emplace_back();
  Group& group = this->group(line, line.groups + 1);
  if (!capture) group.begin.record(line.stream);
  order_.last_stream = line.stream;
  carry(static_cast<int>(&line - lines_.data()), line.waiting);
  {
    const std::lock_guard lock(mutex_);
    group.end.record(line.stream);
    group.capture = capture;
    line.groups++;
  }
  order_.last = &group;
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
}

void Queued::forget() {
  open_groups_ = 0;
  after_ = nullptr;
  for (Line& line : lines_) line.waiting.clear();
}

bool Queued::idle() {
  return std::all_of(lines_.begin(), lines_.end(), [](Line& line) {
    if (line.groups == 0) return true;
    const Group& newest = group(line, line.groups);
    return newest.capture || reached(newest.end);
  });
}

double Queued::waiting() {
  const std::lock_guard lock(mutex_);
  double longest = 0;
  for (Line& line : lines_) longest = std::max(longest, waiting(line));
  return longest;
}

double Queued::waiting(Line& line) {
  // The place after the newest may be in use already. A group that was forgotten before it was seen to end goes on being waited for.
  const uint64_t forgotten = line.groups > kRemembered - 1 ? line.groups - (kRemembered - 1) : 0;
  const bool lost = line.seen < forgotten;
  line.seen = std::max(line.seen, forgotten);
  for (; line.seen < line.groups; line.seen++, line.since = 0) {
    const Group& oldest = group(line, line.seen + 1);
    if (oldest.capture || reached(oldest.end)) continue;
    if (line.since == 0 && (lost || reached(oldest.begin))) line.since = now();
    return line.since == 0 ? 0 : now() - line.since;
  }
  return line.since = 0;
}

// An end that has been recorded anew since stands later on the same stream: the wait is longer, never too short.
void Queued::await_group(Line& line, uint64_t number) {
  if (number > 0) group(line, number).hold_back(native(order_.compute), capture_of(native(order_.compute)));
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
  Line& line = lines_[static_cast<size_t>(line_of(lane))];
  const std::deque<uint64_t>& sends = lanes_[static_cast<size_t>(lane)].sends;
  if (sends.size() > left) await_group(line, sends[sends.size() - 1 - left]);
}

}  // namespace gingham
