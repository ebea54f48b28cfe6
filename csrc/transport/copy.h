// GPUs of one process: ranks are threads, a message is a device-to-device copy on the receiver's line, ordered behind the sender's by an
// event. It needs neither NCCL nor a second GPU, so that one GPU runs the real step in every mode.
// A channel's slot carries the sender's address and two events: `ready` (recorded by the sender) and `taken` (by the receiver). The host
// of a receiver waits until the sender's host has queued the message, never for data. A capture belongs to one rank's stream and cannot hold
// another rank's events, so that steps of several ranks are refused in one.
#pragma once
#include "transport/queued.h"

namespace gingham {

class Copy : public Queued {
 public:
  Copy(std::unique_ptr<Axis> shared, GroupOrder& order, Program& program, AxisMemory memory, std::vector<int> members);

  // A call ends when all its ranks have queued it: until then they may still name this rank's events.
  void finish() override;
  void retire() override;

 protected:
  void allow_capture() override;
  void carry(int line, std::span<const Message> group) override;
  void await_taken(int peer, int lane, uint32_t left) override;

 private:
  Channel& channel(int from, int to, int lane);
  void publish(const Message& m, cudaStream_t stream);
  void take(const Message& m, cudaStream_t stream);
  Event& event(std::vector<Event>& events, int peer, int lane, uint32_t slot);

  Program& program_;
  AxisMemory memory_;
  std::vector<int> members_;
  std::vector<Event> ready_, taken_;  // [peer][lane][slot]
};

}  // namespace gingham
