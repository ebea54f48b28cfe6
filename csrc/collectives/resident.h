// A matrix where peers can read it: the caller's own memory when it lies in the shared heap (read in place, no copy), else a packed copy
// in workspace. Must outlive the call it is posted in.
#pragma once
#include <algorithm>
#include <vector>

#include "base/stream.h"
#include "kernels/cast.h"
#include "transport/axis.h"

namespace gingham {

class Resident {
 public:
  Resident() = default;
  Resident(const Matrix& m, const Axis& axis, const Stream& stream) : view_(m) {
    if (m.empty() || axis.holds(m.data)) return;
    copy_ = Scratch(stream, m.bytes());
    const bool transposed = m.col_stride != 1 && m.row_stride == 1;
    view_ = transposed ? dense(copy_.data(), m.cols, m.rows, m.dtype).t() : dense(copy_.data(), m.rows, m.cols, m.dtype);
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
  Relay(Axis& axis, const Stream& stream, size_t bytes, int lane = 0) : axis_(axis), room_(stream, 2 * bytes), bytes_(bytes), lane_(lane) {}
  char* next() {
    buffer_ ^= 1;
    axis_.ring().drain(axis_.next(), lane_, sent_ - sent_from_[buffer_]);
    return data();
  }
  char* data() const { return room_.data() + static_cast<size_t>(buffer_) * bytes_; }
  void send(size_t bytes) {
    axis_.ring().send(axis_.next(), data(), bytes, lane_);
    sent_from_[buffer_] = ++sent_;
  }
  void drain() { axis_.ring().drain(axis_.next(), lane_); }

 private:
  Axis& axis_;
  Scratch room_;
  size_t bytes_;
  int lane_, buffer_ = 1;
  uint32_t sent_ = 0, sent_from_[2] = {0, 0};
};

// Messages of one call, and the memory they are sent from and come into, which stays until drain().
class Outbox {
 public:
  Outbox(Axis& axis, const Stream& stream, int lane = 0) : axis_(axis), stream_(stream), lane_(lane) {}
  // m itself where it is dense and peers can have it from where it stands, else a copy.
  Matrix packed(const Matrix& m) {
    if (m.empty() || (m.flat() && axis_.holds(m.data))) return m;
    const Matrix copy = room_like(m);
    cast(m, copy, stream_);
    return copy;
  }
  Matrix room_like(const Matrix& m) {
    rooms_.emplace_back(stream_, m.bytes());
    return dense(rooms_.back().data(), m.rows, m.cols, m.dtype);
  }
  // m: packed, or a room.
  void send(int peer, const Matrix& m) {
    axis_.ring().send(peer, m.data, m.bytes(), lane_);
    if (std::find(peers_.begin(), peers_.end(), peer) == peers_.end()) peers_.push_back(peer);
  }
  void drain() {
    for (int peer : peers_) axis_.ring().drain(peer, lane_);
    peers_.clear();
    rooms_.clear();
  }

 private:
  Axis& axis_;
  const Stream& stream_;
  int lane_;
  std::vector<Scratch> rooms_;
  std::vector<int> peers_;
};

// A matrix cut along a dim among the ranks of an axis.
struct Shares {
  Matrix whole;
  int dim;
  std::vector<int64_t> cuts;  // one more than ranks
  Matrix of(const Matrix& other, int rank) const { return other.slice(dim, cuts[static_cast<size_t>(rank)], cuts[static_cast<size_t>(rank) + 1]); }
  Matrix operator[](int rank) const { return of(whole, rank); }
  std::vector<Matrix> all() const {
    std::vector<Matrix> out;
    for (size_t rank = 0; rank + 1 < cuts.size(); rank++) out.push_back((*this)[static_cast<int>(rank)]);
    return out;
  }
};

// torch.chunk's cut points of n elements in `parts`: ceil(n / parts) each, the last ones shorter or empty.
inline std::vector<int64_t> chunk(int64_t n, int parts) {
  const int64_t step = (n + parts - 1) / parts;
  std::vector<int64_t> cuts;
  for (int i = 0; i <= parts; i++) cuts.push_back(std::min(n, step * i));
  return cuts;
}

}  // namespace gingham
