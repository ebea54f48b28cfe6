// W of a later call of a step, on its way beside what is computed meanwhile: every rank's part, gathered over W's axis. This rank's own is read
// where it stands, peers' come into memory of the caller's, which must last until settle() after a begin(); over device copies between threads
// (transport/copy) what was sent must, until the peers have settled too.
#pragma once
#include <memory>
#include <vector>

#include "base/stream.h"
#include "transport/axis.h"

namespace gingham {

class EarlyWeights {
 public:
  // own: of each map, as messages carry it; parts: of each map, by rank of the axis. The messages that begin() queues come after the kernels queued
  // so far, not after those queued since: they write into memory that nothing queued since may use.
  EarlyWeights(Axis& axis, std::vector<Matrix> own, std::vector<std::vector<Matrix>> parts, std::vector<Scratch> packed)
      : axis_(axis), own_(std::move(own)), parts_(std::move(parts)), packed_(std::move(packed)), point_(axis.ring().point()) {}
  // Queues the messages. The axis has a session open.
  void begin();
  bool begun() const { return group_ > 0; }
  const std::vector<Matrix>& parts(size_t i) const { return parts_[i]; }
  // Kernels queued from here on come after the messages.
  void settle() { axis_.ring().settle(0, group_); }

 private:
  Axis& axis_;
  std::vector<Matrix> own_;
  std::vector<std::vector<Matrix>> parts_;
  std::vector<Scratch> packed_;  // of own parts that are not dense
  std::unique_ptr<Point> point_;
  uint64_t group_ = 0;
};

}  // namespace gingham
