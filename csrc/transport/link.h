// shm behind a link of given latency (seconds a message) and bandwidth (bytes a second and rank), to measure overlap on one host: data
// is due `latency + bytes / bandwidth` after the link was free, and who needs it earlier sleeps. The link moves data while ranks compute.
#pragma once
#include <algorithm>

#include "transport/shm.h"

namespace gingham {

class Link : public Shm {
 public:
  Link(Segment& segment, Program& program, AxisMemory memory, std::vector<int> members, bool windowed, double latency, double bandwidth)
      : Shm(segment, program, memory, std::move(members), windowed), latency_(latency), bandwidth_(bandwidth) {}

  Request begin_get(int peer, size_t bytes) override {
    Shm::begin_get(peer, bytes);
    return {due(free_in_, bytes)};
  }
  void send(int peer, const void* data, size_t bytes, int lane) override { send_due(peer, data, bytes, lane, due(free_out_, bytes)); }

 private:
  double due(double& free, size_t bytes) {
    free = std::max(free, now()) + (bandwidth_ > 0 ? static_cast<double>(bytes) / bandwidth_ : 0);
    return free + latency_;
  }
  double latency_, bandwidth_;
  double free_in_ = 0, free_out_ = 0;
};

}  // namespace gingham
