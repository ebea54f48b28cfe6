#include "transport/copy.h"

#include <algorithm>

namespace gingham {
namespace {

// A cudaEvent_t on its way through the slot.
uint64_t number_of(const Event& event) { return reinterpret_cast<uint64_t>(event.get()); }
cudaEvent_t event_of(uint64_t number) { return reinterpret_cast<cudaEvent_t>(number); }

}  // namespace

Copy::Copy(std::unique_ptr<Axis> shared, GroupOrder& order, Program& program, AxisMemory memory, std::vector<int> members)
    : Queued(std::move(shared), order), program_(program), memory_(memory), members_(std::move(members)) {
  const size_t events = static_cast<size_t>(size_) * kLanes * kSlots;
  ready_ = std::vector<Event>(events);
  taken_ = std::vector<Event>(events);
}

Channel& Copy::channel(int from, int to, int lane) { return memory_.channel(members_[static_cast<size_t>(from)], to, lane); }

Event& Copy::event(std::vector<Event>& events, int peer, int lane, uint32_t slot) {
  return events[(static_cast<size_t>(peer) * kLanes + static_cast<size_t>(lane)) * kSlots + slot % kSlots];
}

void Copy::allow_capture() {
  throw DeviceError(
      concat("rank ", program_.member(program_.rank()), ": a step of ", program_.size(),
             " ranks in one process cannot be captured in a CUDA graph, got a capturing stream, expected an eager one: run it outside of "
             "the capture, or start a process and a GPU for every rank"));
}

void Copy::carry(int line, std::span<const Message> group) {
  const cudaStream_t stream = lines_[static_cast<size_t>(line)].stream;
  for (const Message& m : group)
    if (m.way == Message::Way::send) publish(m, stream);
  for (const Message& m : group)
    if (m.way == Message::Way::recv) take(m, stream);
}

void Copy::publish(const Message& m, cudaStream_t stream) {
  Channel& channel = this->channel(rank_, m.peer, m.lane);
  const uint32_t n = channel.sent.load();
  if (n - channel.consumed.load() >= kSlots) program_.wait(channel.consumed, n - kSlots + 1, members_[static_cast<size_t>(m.peer)]);
  Event& ready = event(ready_, m.peer, m.lane, n);
  ready.record(stream);
  channel.slots[n % kSlots] = {reinterpret_cast<uint64_t>(m.data), m.bytes, 0, number_of(ready), 0};
  channel.sent.store(n + 1);
}

void Copy::take(const Message& m, cudaStream_t stream) {
  Channel& channel = this->channel(m.peer, rank_, m.lane);
  const uint32_t n = channel.consumed.load();
  program_.wait(channel.sent, n + 1, members_[static_cast<size_t>(m.peer)]);
  auto& slot = channel.slots[n % kSlots];
  CHECK(ShapeError, slot.bytes == m.bytes, "rank ", program_.member(program_.rank()), " expected a message of ", m.bytes, " bytes from rank ",
        program_.member(members_[static_cast<size_t>(m.peer)]), ", got ", slot.bytes);
  CUDA_CHECK(cudaStreamWaitEvent(stream, event_of(slot.ready), 0));
  if (m.bytes) CUDA_CHECK(cudaMemcpyAsync(m.data, reinterpret_cast<const void*>(slot.offset), m.bytes, cudaMemcpyDeviceToDevice, stream));
  Event& taken = event(taken_, m.peer, m.lane, n);
  taken.record(stream);
  slot.taken = number_of(taken);
  channel.consumed.store(n + 1);
}

void Copy::finish() {
  for (int hop = 1; hop < size_; hop++) rows(next(hop));
}

void Copy::retire() {
  Queued::finish();
  Queued::retire();
}

void Copy::await_taken(int peer, int lane, uint32_t left) {
  Channel& channel = this->channel(rank_, peer, lane);
  const uint32_t sent = channel.sent.load();
  left = std::min<uint32_t>(left, kSlots - 1);  // older slots are in use again: a later message of the same lane is taken later
  if (sent <= left) return;
  if (capture_of(native(compute()))) allow_capture();
  const uint32_t wanted = sent - left;
  program_.wait(channel.consumed, wanted, members_[static_cast<size_t>(peer)]);
  CUDA_CHECK(cudaStreamWaitEvent(native(compute()), event_of(channel.slots[(wanted - 1) % kSlots].taken), 0));
}

}  // namespace gingham
