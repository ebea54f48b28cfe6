#include "ops/output.h"

#include <algorithm>

#include "collectives/resident.h"
#include "kernels/accumulate.h"
#include "kernels/cast.h"

namespace gingham {
namespace {

class WholeOutput : public Output {
 public:
  explicit WholeOutput(const Matrix& block) : block_(block) {}
  Matrix at(int, int) override { return block_; }
  bool accumulates() const override { return written_; }
  void written() override { written_ = true; }

 private:
  Matrix block_;
  bool written_ = false;
};

class LocalOutput : public Output {
 public:
  LocalOutput(const Matrix& block, int dim, const Slices& slices) : block_(block), dim_(dim), slices_(slices) {}
  Matrix at(int slice, int interval) override {
    const auto piece = slices_.piece(slice, interval);
    return block_.slice(dim_, piece.begin, piece.end);
  }
  bool accumulates() const override { return false; }

 private:
  Matrix block_;
  int dim_;
  const Slices& slices_;
};

// In round r this rank works at the panels of rank (own - 1 - r); the last round is its own.
class Rounds : public Output {
 public:
  explicit Rounds(const Cut& cut) : cut_(cut), axis_(cut.axis()) {}
  int rounds() const override { return axis_.size(); }
  bool holds(int round, int interval) const override { return cut_.owner(interval) == target(round); }
  bool accumulates() const override { return round_ > 0; }

 protected:
  int target(int round) const { return axis_.next(-1 - round); }
  bool last() const { return round_ + 1 == axis_.size(); }
  size_t share_bytes(int slice) const { return cut_.share_bytes(target(round_), slice); }
  // The last round's sums, from where they were made into this rank's own part.
  void keep(int slice, const Stream& stream) {
    for (int t = 0; t < cut_.slices().intervals(); t++)
      if (holds(round_, t)) cast(at(slice, t), cut_.piece_of(cut_.own(), slice, t), stream);
  }

  Cut cut_;
  Axis& axis_;
  int round_ = 0;
};

class WindowOutput : public Rounds {
 public:
  WindowOutput(const Cut& cut, int panel) : Rounds(cut), window_(*cut.axis().window()), panel_(panel) {}

  void begin(int slice, int round) override {
    round_ = round;
    const int owner = target(round);
    part_ = owner == axis_.rank() ? cut_.own() : window_.panel(owner, panel_);
    if (round == 0) return;
    window_.await_turn();
    window_.wait_get(window_.begin_get(axis_.next(-1), share_bytes(slice)));
  }
  Matrix at(int slice, int interval) override { return cut_.piece_of(part_, slice, interval); }
  void end(int slice, int) override {
    if (!last()) axis_.count_sent(share_bytes(slice));
    window_.advance();
  }

 private:
  Window& window_;
  int panel_;
  Matrix part_;
};

class RingOutput : public Rounds {
 public:
  RingOutput(const Cut& cut, int lane, const Stream& stream)
      : Rounds(cut), stream_(stream), lane_(lane), relay_(cut.axis(), stream, cut.largest_share(), lane) {}

  void begin(int slice, int round) override {
    round_ = round;
    char* buffer = relay_.next();
    if (round > 0) axis_.ring().take(axis_.next(-1), buffer, share_bytes(slice), lane_);
  }
  Matrix at(int slice, int interval) override { return cut_.piece_in(relay_.data(), slice, interval); }
  void end(int slice, int) override {
    if (!last()) return relay_.send(share_bytes(slice));
    keep(slice, stream_);
    if (slice + 1 == cut_.slices().slices) relay_.drain();
  }

 private:
  const Stream& stream_;
  int lane_;
  Relay relay_;
};

// To other hosts: a sum has two buffers for each slice, and where the next one goes is said before it is asked for.
class FarRingOutput : public Rounds {
 public:
  FarRingOutput(const Cut& cut, int lane, const Stream& stream)
      : Rounds(cut), ring_(cut.axis().ring()), stream_(stream), lane_(lane), room_(cut.largest_share()) {
    const size_t buffers = 2 * static_cast<size_t>(cut_.slices().slices);
    memory_ = Scratch(stream, buffers * room_);
    last_sent_.resize(buffers);
  }

  bool holds_all() const override { return true; }
  void begin(int slice, int round) override {
    round_ = round;
    if (round > 0)
      ring_.take(axis_.next(-1), buffer(slice, round), share_bytes(slice), lane_);
    else
      drain(slice, round);
  }
  Matrix at(int slice, int interval) override { return cut_.piece_in(buffer(slice, round_), slice, interval); }
  void end(int slice, int round) override {
    if (!last()) {
      ring_.send(axis_.next(), buffer(slice, round), share_bytes(slice), lane_);
      last_sent_[index(slice, round)] = ++sent_;
      drain(slice, round + 1);
      ring_.expect(axis_.next(-1), buffer(slice, round + 1), cut_.share_bytes(target(round + 1), slice), lane_);
      return;
    }
    keep(slice, stream_);
    if (slice + 1 == cut_.slices().slices) ring_.drain(axis_.next(), lane_);
  }

 private:
  size_t index(int slice, int round) const { return 2 * static_cast<size_t>(slice) + static_cast<size_t>(round % 2); }
  char* buffer(int slice, int round) const { return memory_.data() + index(slice, round) * room_; }
  // What was sent from the buffer two rounds ago is through.
  void drain(int slice, int round) { ring_.drain(axis_.next(), lane_, sent_ - last_sent_[index(slice, round)]); }

  Ring& ring_;
  const Stream& stream_;
  int lane_;
  size_t room_;
  Scratch memory_;
  std::vector<uint32_t> last_sent_;
  uint32_t sent_ = 0;
};

class QueuedRingOutput : public Rounds {
 public:
  QueuedRingOutput(const Cut& cut, int lane, const Stream& stream)
      : Rounds(cut), stream_(stream), lane_(lane), relay_(cut.axis(), stream, cut.largest_share(), lane), product_(stream, cut.largest_share()) {}

  void begin(int slice, int round) override {
    round_ = round;
    char* buffer = relay_.next();
    if (round > 0) axis_.ring().recv(axis_.next(-1), buffer, share_bytes(slice), lane_);
  }
  // The first product goes straight into the message, the last into this rank's own part.
  Matrix at(int slice, int interval) override {
    if (last()) return cut_.piece_of(cut_.own(), slice, interval);
    return cut_.piece_in(round_ == 0 ? relay_.data() : product_.data(), slice, interval);
  }
  bool accumulates() const override { return false; }
  void end(int slice, int) override {
    if (round_ > 0) axis_.ring().arrived(lane_);
    for (int t = 0; t < cut_.slices().intervals() && round_ > 0; t++) {
      if (!holds(round_, t)) continue;
      const Matrix partial = cut_.piece_in(relay_.data(), slice, t), product = at(slice, t);
      accumulate(last() ? partial : product, last() ? product : partial, stream_);
    }
    if (!last()) return relay_.send(share_bytes(slice));
    if (slice + 1 == cut_.slices().slices) relay_.drain();
  }

 private:
  const Stream& stream_;
  int lane_;
  Relay relay_;
  Scratch product_;
};

// The sum arrives in a message's room, or where it shall stay: its last product is added there, or stored elsewhere in 16 bits.
class AddingOutput : public Rounds {
 public:
  AddingOutput(const Cut& cut, int lane, const Stream& stream, const Matrix& rounded)
      : Rounds(cut),
        ring_(cut.axis().ring()),
        stream_(stream),
        lane_(lane),
        rounded_(rounded),
        stays_(rounded.empty() && cut.slices().slices == 1 && cut.is_one_message()),
        relay_(cut.axis(), stream, cut.largest_share(), lane) {}

  bool yields() const override { return true; }
  void begin(int, int round) override {
    round_ = round;
    if (round > 0)
      ring_.arrived(lane_);
    else
      sums_ = relay_.next();
  }
  Matrix at(int slice, int interval) override { return cut_.piece_in(sums_, slice, interval); }
  Tail tail(int slice, int interval) const override {
    Tail out;
    if (!last() || rounded_.empty()) return out;
    out.z = cut_.piece_of(rounded_, slice, interval);
    out.keeps_sum = false;
    return out;
  }
  // What is sent and what comes for the next round leave as one group.
  void end(int slice, int round) override {
    if (!last()) {
      relay_.send(share_bytes(slice));
      round_ = round + 1;
      sums_ = last() && stays_ ? static_cast<char*>(cut_.own().data) : relay_.next();
      return ring_.recv(axis_.next(-1), sums_, share_bytes(slice), lane_);
    }
    if (!stays_ && rounded_.empty()) keep(slice, stream_);
    if (slice + 1 == cut_.slices().slices) relay_.drain();
  }

 private:
  Ring& ring_;
  const Stream& stream_;
  int lane_;
  Matrix rounded_;
  bool stays_;
  Relay relay_;
  char* sums_ = nullptr;
};

}  // namespace

std::unique_ptr<Output> whole_output(const Matrix& block) { return std::make_unique<WholeOutput>(block); }
std::unique_ptr<Output> local_output(const Matrix& block, int dim, const Slices& slices) { return std::make_unique<LocalOutput>(block, dim, slices); }
std::unique_ptr<Output> window_output(const Cut& cut, int panel) { return std::make_unique<WindowOutput>(cut, panel); }
std::unique_ptr<Output> ring_output(const Cut& cut, int lane, const Stream& stream) {
  if (cut.axis().ring().queues()) return std::make_unique<QueuedRingOutput>(cut, lane, stream);
  if (cut.axis().crosses_any()) return std::make_unique<FarRingOutput>(cut, lane, stream);
  return std::make_unique<RingOutput>(cut, lane, stream);
}
std::unique_ptr<Output> adding_output(const Cut& cut, int lane, const Stream& stream, const Matrix& rounded) {
  return std::make_unique<AddingOutput>(cut, lane, stream, rounded);
}

}  // namespace gingham
