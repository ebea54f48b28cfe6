#include "ops/input.h"

#include <algorithm>

#include "kernels/cast.h"

namespace gingham {
namespace {

int hops(const Axis& axis, int owner) { return ((axis.rank() - owner) % axis.size() + axis.size()) % axis.size(); }

class WholeInput : public Input {
 public:
  explicit WholeInput(const Matrix& block) : block_(block) {}
  bool stands() const override { return true; }
  Matrix at(int, int) override { return block_; }

 private:
  Matrix block_;
};

class LocalInput : public Input {
 public:
  LocalInput(const Matrix& block, int dim, const Slices& slices) : block_(block), dim_(dim), slices_(slices) {}
  bool stands() const override { return true; }
  Matrix at(int slice, int interval) override {
    const auto piece = slices_.piece(slice, interval);
    return block_.slice(dim_, piece.begin, piece.end);
  }

 private:
  Matrix block_;
  int dim_;
  const Slices& slices_;
};

// Its panels count as though they moved: their order decides the bits of sums.
class PartsInput : public Input {
 public:
  PartsInput(const Cut& cut, const std::vector<Matrix>& parts) : cut_(cut), parts_(parts) {}
  bool stands() const override { return true; }
  int distance(int interval) const override { return hops(cut_.axis(), cut_.owner(interval)); }
  Matrix at(int slice, int interval) override { return cut_.piece_of(parts_[static_cast<size_t>(cut_.owner(interval))], slice, interval); }

 private:
  Cut cut_;
  const std::vector<Matrix>& parts_;
};

class WindowInput : public Input {
 public:
  WindowInput(const Cut& cut, int panel)
      : cut_(cut), axis_(cut.axis()), window_(*cut.axis().window()), panel_(panel), requests_(static_cast<size_t>(cut.slices().slices)) {}

  void begin(int slice) override {
    for (int hop = 1; hop < axis_.size(); hop++) {
      const int peer = axis_.next(-hop);
      requests_[static_cast<size_t>(slice)] = window_.begin_get(peer, cut_.share_bytes(peer, slice));
      axis_.count_sent(cut_.share_bytes(axis_.rank(), slice));
    }
  }
  void acquire(int slice, int) override { window_.wait_get(requests_[static_cast<size_t>(slice)]); }
  int distance(int interval) const override { return hops(axis_, cut_.owner(interval)); }
  Matrix at(int slice, int interval) override {
    const int rank = cut_.owner(interval);
    return cut_.piece_of(rank == axis_.rank() ? cut_.own() : window_.panel(rank, panel_), slice, interval);
  }

 private:
  Cut cut_;
  Axis& axis_;
  Window& window_;
  int panel_;
  std::vector<Request> requests_;
};

// Message (s, h) of a rank carries, of slice s, the share of the rank h - 1 before it: its own for h = 1, else what came as (s, h - 1). All
// ranks send theirs in one order, so that each knows what comes next; with two slices ahead
//   (0, 1) (1, 1) | (0, 2) .. (0, g-1) (2, 1) | (1, 2) .. (1, g-1) (3, 1) | ..
class RingInput : public Input {
 public:
  RingInput(const Cut& cut, int lane, const Stream& stream)
      : cut_(cut),
        axis_(cut.axis()),
        ring_(cut.axis().ring()),
        stream_(stream),
        lane_(lane),
        ahead_(axis_.crosses_any() ? 2 : 1),
        own_stands_(slices() == 1 && cut.is_one_message() && axis_.holds(cut.own().data)) {
    for (int s = 0; s < slices(); s++) {
      size_t bytes = 0;
      for (int rank = 0; rank < axis_.size(); rank++) bytes += bytes_in_buffer(rank, s);
      room_ = std::max(room_, bytes);
    }
    buffers_ = Scratch(stream, room_ * static_cast<size_t>(std::min(slices(), ahead_ + 1)));
    last_sent_.resize(static_cast<size_t>(ahead_ + 1));
    for (int s = 0; s < std::min(ahead_, slices()); s++) order_.push_back({s, 1});
    for (int s = 0; s < slices(); s++) {
      for (int hop = 2; hop < axis_.size(); hop++) order_.push_back({s, hop});
      if (s + ahead_ < slices()) order_.push_back({s + ahead_, 1});
    }
    received_.resize(static_cast<size_t>(slices()));
    groups_.resize(static_cast<size_t>(slices() * axis_.size()));
  }

  int ahead() const override { return ahead_; }
  int distance(int interval) const override { return hops(axis_, cut_.owner(interval)); }
  void begin(int slice) override {
    // The buffer is that of a slice consumed before; what was sent from it may still be on its way.
    ring_.drain(axis_.next(), lane_, sent_ - last_sent_[buffer_of(slice)]);
    for (int t = 0; t < cut_.slices().intervals(); t++)
      if (cut_.owner(t) == axis_.rank() && !own_stands_) cast(cut_.piece_of(cut_.own(), slice, t), at(slice, t), stream_);
    begun_ = slice + 1;
    for (; next_expected_ < order_.size() && order_[next_expected_].slice < begun_; next_expected_++) {
      const Message& m = order_[next_expected_];
      ring_.expect(axis_.next(-1), share_at(m.slice, axis_.next(-m.hop)), cut_.share_bytes(axis_.next(-m.hop), m.slice), lane_);
    }
    send_all();
    if (ring_.queues()) pump();  // all hops at once: they run beside the product of the slice before
  }
  void pump() override {
    while (may_receive() && ring_.ready(axis_.next(-1), lane_)) receive();
  }
  void acquire(int slice, int interval) override {
    const int wanted = distance(interval);
    while (received_[static_cast<size_t>(slice)] < wanted) receive();
    if (wanted > 0) ring_.settle(lane_, group_of(slice, wanted));
  }
  void end(int slice) override {
    while (received_[static_cast<size_t>(slice)] + 1 < axis_.size()) receive();
    if (slice + 1 == slices()) ring_.drain(axis_.next(), lane_);
  }
  Matrix at(int slice, int interval) override { return cut_.piece_in(share_at(slice, cut_.owner(interval)), slice, interval); }

 private:
  struct Message {
    int slice, hop;
  };
  int slices() const { return cut_.slices().slices; }
  size_t buffer_of(int slice) const { return static_cast<size_t>(slice % (ahead_ + 1)); }
  char* share_at(int slice, int rank) const {
    if (own_stands_ && rank == axis_.rank()) return static_cast<char*>(cut_.own().data);
    char* data = buffers_.data() + buffer_of(slice) * room_;
    for (int r = 0; r < rank; r++) data += bytes_in_buffer(r, slice);
    return data;
  }
  size_t bytes_in_buffer(int rank, int slice) const { return own_stands_ && rank == axis_.rank() ? 0 : cut_.share_bytes(rank, slice); }
  uint64_t& group_of(int slice, int hop) { return groups_[static_cast<size_t>(slice * axis_.size() + hop)]; }
  bool may_receive() const { return next_received_ < order_.size() && order_[next_received_].slice < begun_; }
  void receive() {
    const Message& m = order_[next_received_++];
    const int rank = axis_.next(-m.hop);
    ring_.recv(axis_.next(-1), share_at(m.slice, rank), cut_.share_bytes(rank, m.slice), lane_);
    received_[static_cast<size_t>(m.slice)] = m.hop;
    group_of(m.slice, m.hop) = ring_.queued(lane_);
    send_all();
  }
  // What may be sent now, in its order.
  void send_all() {
    for (; next_sent_ < order_.size(); next_sent_++) {
      const Message& m = order_[next_sent_];
      if (m.hop == 1 ? m.slice >= begun_ : received_[static_cast<size_t>(m.slice)] < m.hop - 1) return;
      const int rank = axis_.next(1 - m.hop);
      ring_.send(axis_.next(), share_at(m.slice, rank), cut_.share_bytes(rank, m.slice), lane_);
      last_sent_[buffer_of(m.slice)] = ++sent_;
    }
  }

  Cut cut_;
  Axis& axis_;
  Ring& ring_;
  const Stream& stream_;
  int lane_, ahead_;
  bool own_stands_;  // this rank's share is sent and read where it stands
  size_t room_ = 0;
  Scratch buffers_;
  std::vector<Message> order_;
  size_t next_sent_ = 0, next_received_ = 0, next_expected_ = 0;
  std::vector<int> received_;     // hops of each slice
  std::vector<uint64_t> groups_;  // in which each came, where messages are queued: kernels wait for what they read and no more
  std::vector<uint32_t> last_sent_;
  uint32_t sent_ = 0;
  int begun_ = 0;
};

}  // namespace

std::unique_ptr<Input> whole_input(const Matrix& block) { return std::make_unique<WholeInput>(block); }
std::unique_ptr<Input> local_input(const Matrix& block, int dim, const Slices& slices) { return std::make_unique<LocalInput>(block, dim, slices); }
std::unique_ptr<Input> parts_input(const Cut& cut, const std::vector<Matrix>& parts) { return std::make_unique<PartsInput>(cut, parts); }
std::unique_ptr<Input> window_input(const Cut& cut, int panel) { return std::make_unique<WindowInput>(cut, panel); }
std::unique_ptr<Input> ring_input(const Cut& cut, int lane, const Stream& stream) { return std::make_unique<RingInput>(cut, lane, stream); }

}  // namespace gingham
