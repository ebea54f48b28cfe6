// A matrix where peers can read it: the caller's own memory when it lies in the shared heap (read in place, no copy), else a packed copy
// in workspace. Must outlive the call it is posted in.
#pragma once
#include "base/stream.h"
#include "kernels/cast.h"
#include "transport/transport.h"

namespace gingham {

class Resident {
 public:
  Resident() = default;
  Resident(const Matrix& m, const Transport& transport, const Stream& stream) : view_(m) {
    if (m.empty() || transport.holds(m.data)) return;
    copy_ = Scratch(stream, m.bytes());
    const bool turned = m.col_stride != 1 && m.row_stride == 1;
    view_ = turned ? dense(copy_.data(), m.cols, m.rows, m.dtype).t() : dense(copy_.data(), m.rows, m.cols, m.dtype);
    cast(m, view_, stream);
  }
  const Matrix& view() const { return view_; }

 private:
  Matrix view_;
  Scratch copy_;
};

// Two message buffers to the next rank used in turn: next() returns when the receiver has taken what was last sent from that buffer.
class Relay {
 public:
  Relay(Transport& axis, const Stream& stream, size_t bytes, int lane = 0) : axis_(axis), room_(stream, 2 * bytes), bytes_(bytes), lane_(lane) {}
  char* next() {
    turn_ ^= 1;
    axis_.drain(axis_.next(), lane_, sent_ - sent_from_[turn_]);
    return data();
  }
  char* data() const { return room_.data() + static_cast<size_t>(turn_) * bytes_; }
  void send(size_t bytes) {
    axis_.send(axis_.next(), data(), bytes, lane_);
    sent_from_[turn_] = ++sent_;
  }
  void drain() { axis_.drain(axis_.next(), lane_); }

 private:
  Transport& axis_;
  Scratch room_;
  size_t bytes_;
  int lane_, turn_ = 1;
  uint32_t sent_ = 0, sent_from_[2] = {0, 0};
};

// torch.chunk's cut points of n elements in `parts`: ceil(n / parts) each, the last ones shorter or empty.
inline std::vector<int64_t> chunk(int64_t n, int parts) {
  const int64_t step = (n + parts - 1) / parts;
  std::vector<int64_t> cuts;
  for (int i = 0; i <= parts; i++) cuts.push_back(std::min(n, step * i));
  return cuts;
}

}  // namespace gingham
