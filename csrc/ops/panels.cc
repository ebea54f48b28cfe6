#include "ops/panels.h"

#include <algorithm>

#include "collectives/resident.h"
#include "kernels/accumulate.h"
#include "kernels/cast.h"

namespace gingham {
namespace {

constexpr int kPanelLane = 1, kSumLane = kLanes - 1;

size_t bytes_of(const std::vector<Run>& runs, const Pair& panels) {
  size_t bytes = 0;
  for (const Run& run : runs) bytes += panels.of(run).bytes();
  return bytes;
}

Pair pair_in(char* data, int64_t rows, const Pair& like) {
  const Matrix k = dense(data, rows, like.k.cols, like.k.dtype);
  return {k, dense(data + k.bytes(), rows, like.v.cols, like.v.dtype)};
}

class WindowPanels : public Panels {
 public:
  WindowPanels(const PanelCall& call, int panel)
      : call_(call), window_(*call.axis.window()), panel_(panel), requests_(static_cast<size_t>(call.axis.size())) {}

  void begin() override {
    const Pair own = theirs(0);
    for (int hop = 1; hop < call_.axis.size(); hop++) call_.axis.count_sent(bytes_of(call_.looked_at(call_.axis.next(hop), call_.axis.rank()), own));
    // what is read in place needs no room: all of it may be on its way at once
    for (int hop = 1; hop < call_.axis.size(); hop++)
      if (const size_t bytes = bytes_of(call_.of(hop), theirs(hop)))
        requests_[static_cast<size_t>(hop)] = window_.begin_get(call_.axis.next(-hop), bytes);
  }
  Pair at(int hop) override {
    window_.wait_get(requests_[static_cast<size_t>(hop)]);
    return theirs(hop);
  }

 private:
  Pair theirs(int hop) {
    const int peer = call_.axis.next(-hop);
    return {window_.panel(peer, panel_), window_.panel(peer, panel_ + 1)};
  }

  const PanelCall& call_;
  Window& window_;
  int panel_;
  std::vector<Request> requests_;
};

// Two messages a hop, k and v. Hop h comes into buffer h mod the number of buffers, once the next rank has taken what was sent from there. To
// other hosts it is said beforehand where the next hop shall be put, for which a third buffer is free.
class RingPanels : public Panels {
 public:
  RingPanels(const PanelCall& call, const Pair& own)
      : call_(call), axis_(call.axis), ring_(call.axis.ring()), like_(own), count_(call.axis.crosses_any() ? 3 : 2) {
    own_[0] = Resident(packed(own.k, copies_[0]), axis_, call.stream);
    own_[1] = Resident(packed(own.v, copies_[1]), axis_, call.stream);
    const int64_t longest = *std::max_element(call.lengths.begin(), call.lengths.end());
    room_ = pair_in(nullptr, longest, own).bytes();
    buffers_ = Scratch(call.stream, room_ * static_cast<size_t>(std::min(count_, axis_.size() - 1)));
  }

  void begin() override {
    send({own_[0].view(), own_[1].view()});
    expect(1);
  }
  Pair at(int hop) override {
    while (received_ < hop) receive();
    consumed_ = hop - 1;
    return in_buffer(hop);
  }
  void pump() override {
    // the buffer of the hop before the one that is computed is free
    if (received_ + 1 < axis_.size() && received_ <= consumed_ + 1 && ring_.ready(axis_.next(-1), kPanelLane)) receive();
  }
  void end() override {
    while (received_ + 1 < axis_.size()) receive();
    ring_.drain(axis_.next(), kPanelLane);
  }

 private:
  Matrix packed(const Matrix& m, Scratch& copy) {
    if (m.empty() || m.flat()) return m;
    copy = Scratch(call_.stream, m.bytes());
    const Matrix out = dense(copy.data(), m.rows, m.cols, m.dtype);
    cast(m, out, call_.stream);
    return out;
  }
  Pair in_buffer(int hop) const { return pair_in(buffers_.data() + static_cast<size_t>((hop - 1) % count_) * room_, call_.length(hop), like_); }
  void send(const Pair& panels) {
    for (const Matrix& m : {panels.k, panels.v}) ring_.send(axis_.next(), m.data, m.bytes(), kPanelLane);
  }
  // Room for a hop: what was sent from its buffer has been taken, all but what was sent since.
  void make_room(int hop) {
    const int since = std::min(received_, axis_.size() - 2) - (hop - count_);
    if (hop > count_) ring_.drain(axis_.next(), kPanelLane, static_cast<uint32_t>(2 * since));
  }
  void expect(int hop) {
    if (count_ < 3 || hop >= axis_.size()) return;
    make_room(hop);
    const Pair to = in_buffer(hop);
    for (const Matrix& m : {to.k, to.v}) ring_.expect(axis_.next(-1), m.data, m.bytes(), kPanelLane);
  }
  void receive() {
    const int hop = received_ + 1;
    if (count_ < 3) make_room(hop);
    const Pair to = in_buffer(hop);
    for (const Matrix& m : {to.k, to.v}) ring_.recv(axis_.next(-1), m.data, m.bytes(), kPanelLane);
    received_ = hop;
    if (hop + 1 < axis_.size()) send(to);
    expect(hop + 1);
  }

  const PanelCall& call_;
  Axis& axis_;
  Ring& ring_;
  Pair like_;
  int count_;
  Scratch copies_[2];
  Resident own_[2];
  size_t room_ = 0;
  Scratch buffers_;
  int received_ = 0, consumed_ = 0;
};

// On a ring that queues (GPUs): hop h + 1 is queued before the kernels of hop h, beside which it travels. What comes into a buffer waits for the
// kernels queued before, among them the last that read it. All four messages of a hop are one group: no rank waits for another's second.
class QueuedPanels : public Panels {
 public:
  QueuedPanels(const PanelCall& call, const Pair& own)
      : call_(call), axis_(call.axis), ring_(call.axis.ring()), own_{packed(own.k, 0), packed(own.v, 1)} {
    room_ = pair_in(nullptr, *std::max_element(call.lengths.begin(), call.lengths.end()), own).bytes();
    buffers_ = Scratch(call.stream, room_ * static_cast<size_t>(std::min(kBuffers, axis_.size() - 1)));
  }

  void begin() override { exchange(1); }
  Pair at(int hop) override {
    ring_.arrived(kPanelLane);
    if (hop + 1 < axis_.size()) exchange(hop + 1);
    return in_buffer(hop);
  }
  void end() override { ring_.drain(axis_.next(), kPanelLane); }

 private:
  static constexpr int kBuffers = 2;
  Matrix packed(const Matrix& m, int which) {
    if (m.empty() || m.flat()) return m;
    copies_[which] = Scratch(call_.stream, m.bytes());
    const Matrix out = dense(copies_[which].data(), m.rows, m.cols, m.dtype);
    cast(m, out, call_.stream);
    return out;
  }
  Pair in_buffer(int hop) const { return pair_in(buffers_.data() + static_cast<size_t>((hop - 1) % kBuffers) * room_, call_.length(hop), own_); }
  void exchange(int hop) {
    const Pair from = hop == 1 ? own_ : in_buffer(hop - 1), to = in_buffer(hop);
    if (hop > kBuffers) ring_.drain(axis_.next(), kPanelLane);  // what was sent from the buffer, in the last group, has been taken
    ring_.group_start();
    for (const Matrix& m : {from.k, from.v}) ring_.send(axis_.next(), m.data, m.bytes(), kPanelLane);
    for (const Matrix& m : {to.k, to.v}) ring_.recv(axis_.next(-1), m.data, m.bytes(), kPanelLane);
    ring_.group_end();
  }

  const PanelCall& call_;
  Axis& axis_;
  Ring& ring_;
  Scratch copies_[2];
  Pair own_;
  size_t room_ = 0;
  Scratch buffers_;
};

// A run's sums begin with the first rank, in the order of hops, that looks at it, and come home if any did: as few receptions as there are
// ranks that add to them.
class WindowSums : public Sums {
 public:
  WindowSums(const PanelCall& call, const Pair& room, int panel) : call_(call), window_(*call.axis.window()), room_(room), panel_(panel) {}

  void add(int hop, const Pair& product) override {
    const int owner = call_.axis.next(-hop);
    const Pair sums{window_.panel(owner, panel_), window_.panel(owner, panel_ + 1)};
    const bool last = hop + 1 == call_.axis.size();
    call_.axis.count_sent(bytes_of(last ? begun_before(owner, hop + 1) : gone_on(owner, hop + 1), sums));
    if (hop > 1) {
      window_.await_turn();
      if (const size_t bytes = bytes_of(gone_on(owner, hop), sums)) window_.wait_get(window_.begin_get(call_.axis.next(-1), bytes));
    }
    for (const Run& run : call_.of(hop)) {
      const Pair from = product.of(run), to = sums.of(run);
      if (begins(owner, hop, run)) {
        cast(from.k, to.k, call_.stream);
        cast(from.v, to.v, call_.stream);
      } else {
        accumulate(from.k, to.k, call_.stream);
        accumulate(from.v, to.v, call_.stream);
      }
    }
    window_.advance();
  }
  void take(const Pair& own) override {
    window_.await_turn();
    const std::vector<Run> home = begun_before(call_.axis.rank(), call_.axis.size());
    if (const size_t bytes = bytes_of(home, room_)) window_.wait_get(window_.begin_get(call_.axis.next(-1), bytes));
    for (const Run& run : home) {
      accumulate(room_.of(run).k, own.of(run).k, call_.stream);
      accumulate(room_.of(run).v, own.of(run).v, call_.stream);
    }
  }

 private:
  std::vector<Run> looked_at(int owner, int hop) const { return call_.looked_at((owner + hop) % call_.axis.size(), owner); }
  bool begins(int owner, int hop, const Run& run) const {
    for (int earlier = 1; earlier < hop; earlier++)
      for (const Run& each : looked_at(owner, earlier))
        if (each.row == run.row) return false;
    return true;
  }
  // Of an owner's runs, those that the rank `hop` places behind it adds to what others have begun.
  std::vector<Run> gone_on(int owner, int hop) const {
    std::vector<Run> out;
    for (const Run& run : looked_at(owner, hop))
      if (!begins(owner, hop, run)) out.push_back(run);
    return out;
  }
  // Those that ranks less than `hop` places behind it have begun.
  std::vector<Run> begun_before(int owner, int hop) const {
    std::vector<Run> out;
    for (int each = 1; each < hop; each++)
      for (const Run& run : looked_at(owner, each))
        if (begins(owner, each, run)) out.push_back(run);
    return out;
  }

  const PanelCall& call_;
  Window& window_;
  Pair room_;
  int panel_;
};

class RingSums : public Sums {
 public:
  RingSums(const PanelCall& call, const Pair& like)
      : call_(call), ring_(call.axis.ring()), like_(like), relay_(call.axis, call.stream, room_of(call, like), kSumLane) {}

  void expect(int hop) override {
    sums_ = pair_in(relay_.next(), call_.length(hop), like_);
    if (hop == 1) return;
    if (ring_.queues())
      ring_.recv(call_.axis.next(-1), sums_.k.data, sums_.bytes(), kSumLane);  // it travels beside the product
    else
      ring_.expect(call_.axis.next(-1), sums_.k.data, sums_.bytes(), kSumLane);
  }
  void add(int hop, const Pair& product) override {
    if (hop == 1) {
      cast(product.k, sums_.k, call_.stream);
      cast(product.v, sums_.v, call_.stream);
    } else {
      if (ring_.queues())
        ring_.arrived(kSumLane);
      else
        ring_.take(call_.axis.next(-1), sums_.k.data, sums_.bytes(), kSumLane);
      for (const Run& run : call_.of(hop)) {
        accumulate(product.of(run).k, sums_.of(run).k, call_.stream);
        accumulate(product.of(run).v, sums_.of(run).v, call_.stream);
      }
    }
    relay_.send(sums_.bytes());
  }
  void take(const Pair& own) override {
    const Pair sums = pair_in(relay_.next(), call_.length(0), like_);
    ring_.take(call_.axis.next(-1), sums.k.data, sums.bytes(), kSumLane);
    accumulate(sums.k, own.k, call_.stream);
    accumulate(sums.v, own.v, call_.stream);
    relay_.drain();
  }

 private:
  static size_t room_of(const PanelCall& call, const Pair& like) {
    return pair_in(nullptr, *std::max_element(call.lengths.begin(), call.lengths.end()), like).bytes();
  }
  const PanelCall& call_;
  Ring& ring_;
  Pair like_, sums_;
  Relay relay_;
};

}  // namespace

std::unique_ptr<Panels> window_panels(const PanelCall& call, int panel) { return std::make_unique<WindowPanels>(call, panel); }
std::unique_ptr<Panels> ring_panels(const PanelCall& call, const Pair& own) {
  if (call.axis.ring().queues()) return std::make_unique<QueuedPanels>(call, own);
  return std::make_unique<RingPanels>(call, own);
}
std::unique_ptr<Sums> window_sums(const PanelCall& call, const Pair& room, int panel) { return std::make_unique<WindowSums>(call, room, panel); }
std::unique_ptr<Sums> ring_sums(const PanelCall& call, const Pair& like) { return std::make_unique<RingSums>(call, like); }

}  // namespace gingham
