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

Engines::Engines() : in_(urgent_stream()) {
  for (cudaStream_t& each : out_) each = urgent_stream();
}

Engines::~Engines() {
  for (cudaStream_t each : out_) cudaStreamDestroy(each);
  cudaStreamDestroy(in_);
}

void Engines::enter(unsigned long long in_capture) {
  if (capture_ != in_capture) rounds_ = 0;  // see Group
  capture_ = in_capture;
}

cudaStream_t Engines::leaving() {
  if (rounds_ >= kAhead) came_[rounds_ % kAhead].hold_back(out_of_round());
  return out_of_round();
}

cudaStream_t Engines::coming() {
  left_.record(out_of_round());
  left_.hold_back(in_);
  return in_;
}

void Engines::end_round() { came_[rounds_++ % kAhead].record(in_); }

void Engines::join() {
  for (cudaStream_t each : out_) {
    left_.record(each);
    left_.hold_back(in_);
  }
}

void Engines::hold_back_leaving(const Event& event) const {
  for (cudaStream_t each : out_) event.hold_back(each);
}

// Groups end one after the other, so that the end of the last is the end of all.
void GroupOrder::break_off() {
  for (Queued* axis : axes) axis->forget();
  const cudaStream_t stream = native(compute);
  const auto join = [&](cudaStream_t each) {
    if (!each || capture_of(each) != capture_of(stream)) return;
    all.record(each);
    all.hold_back(stream);
  };
  join(last_stream);
  if (engines) std::for_each(engines->out().begin(), engines->out().end(), join);
}

Queued::Queued(std::unique_ptr<Axis> shared, GroupOrder& order) : Axis(shared->rank(), shared->size()), shared_(std::move(shared)), order_(order) {
  compute().enter();
  // Above the compute stream's priority: the few blocks of a message must not wait for a product's last wave.
  for (Line& line : lines_) line.stream = urgent_stream();
  order_.axes.push_back(this);
}

void Queued::take_engines() {
  if (!order_.engines) order_.engines = std::make_unique<Engines>();
  by_engines_ = true;
  for (Line& line : lines_) cudaStreamDestroy(std::exchange(line.stream, order_.engines->in()));
}

Queued::~Queued() {
  std::erase(order_.axes, this);
  // It ends here; its calls have joined it to the compute stream.
  if (order_.last && owns(*order_.last)) order_.last = nullptr;
  std::erase_if(order_.trails, [this](const GroupOrder::Trail& trail) { return owns(*trail.group); });
  for (Line& line : lines_) {
    if (by_engines_) continue;
    if (order_.last_stream == line.stream) order_.last_stream = nullptr;  // a group that was left in part is nobody's last
    cudaStreamDestroy(line.stream);
  }
}

bool Queued::owns(const Group& group) const {
  return std::any_of(lines_.begin(), lines_.end(), [&](const Line& line) {
    return !line.last_groups.empty() && &group >= line.last_groups.data() && &group < line.last_groups.data() + line.last_groups.size();
  });
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
  line.waiting.push_back({Message::Way::send, peer, const_cast<void*>(data), bytes, lane});
  count_sent(bytes);
}

void Queued::recv(int peer, void* data, size_t bytes, int lane) {
  Line& line = lines_[static_cast<size_t>(line_of(lane))];
  line.waiting.push_back({Message::Way::recv, peer, data, bytes, lane});
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
  if (capture) {
    allow_capture();
    captured_ = true;
  }
  if (!after_) order_.entry.record(native(order_.compute));
  follow(line, after_ ? *after_ : order_.entry, capture);
  if (line.last_groups.empty()) line.last_groups.reserve(kRemembered);
  if (line.last_groups.size() < kRemembered) line.last_groups.emplace_back();
  Group& group = this->group(line, line.groups + 1);
  if (!capture) group.begin.record(line.stream);
  order_.last_stream = line.stream;
  carry(static_cast<int>(&line - lines_.data()), line.waiting);
  if (by_engines_ && capture) engines().join();
  {
    const std::lock_guard lock(mutex_);
    group.end.record(line.stream);
    group.capture = capture;
    line.groups++;
  }
  order_.last = &group;
  if (order_.engines) leave_trail(group, line.waiting, capture);
  for (const Message& m : line.waiting) {
    LaneState& lane = lanes_[static_cast<size_t>(m.lane)];
    if (m.way == Message::Way::recv) {
      lane.received = line.groups;
    } else {
      lane.sends.push_back(line.groups);
      if (lane.sends.size() > kRemembered) lane.sends.pop_front();
    }
  }
  line.waiting.clear();
}

void Queued::follow(Line& line, const Event& entry, unsigned long long capture) {
  entry.hold_back(line.stream);
  const bool after_another = order_.last && order_.last_stream != line.stream;
  if (after_another) order_.last->hold_back(line.stream, capture);
  if (!by_engines_) return;
  engines().enter(capture);
  engines().hold_back_leaving(entry);
  if (after_another) hold_back_leaving(*order_.last, capture);
  follow_trails(line.waiting, capture);
}

void Queued::hold_back_leaving(const Group& group, unsigned long long capture) const {
  for (cudaStream_t each : order_.engines->out()) group.hold_back(each, capture);
}

// What leaves comes after the groups that brought it. All else is in order: what comes does after all that has left before (Engines).
void Queued::follow_trails(const std::vector<Message>& leaving, unsigned long long capture) {
  for (const GroupOrder::Trail& trail : order_.trails) {
    const bool brought = std::any_of(leaving.begin(), leaving.end(), [&](const Message& m) {
      return m.way == Message::Way::send && std::any_of(trail.came.begin(), trail.came.end(), [&](const Message& other) { return m.meets(other); });
    });
    if (brought) hold_back_leaving(*trail.group, capture);
  }
}

void Queued::leave_trail(const Group& group, const std::vector<Message>& messages, unsigned long long capture) {
  if (order_.trails.size() == GroupOrder::kTrails) {
    hold_back_leaving(*order_.trails.front().group, capture);
    order_.trails.pop_front();
  }
  GroupOrder::Trail& trail = order_.trails.emplace_back(&group);
  for (const Message& m : messages)
    if (m.way == Message::Way::recv && m.bytes > 0) trail.came.push_back(m);
}

void Queued::forget() {
  open_groups_ = 0;
  after_ = nullptr;
  for (Line& line : lines_) line.waiting.clear();
}

bool Queued::idle() {
  const std::lock_guard lock(mutex_);
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
      std::count_if(line.waiting.begin(), line.waiting.end(), [lane](const Message& m) { return m.way == Message::Way::send && m.lane == lane; }));
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
