#include "ops/output.h"

#include <algorithm>

#include "collectives/resident.h"
#include "kernels/accumulate.h"
#include "kernels/cast.h"

namespace gingham {
namespace {

class Whole : public Output {
 public:
  explicit Whole(const Matrix& block) : block_(block) {}
  Matrix at(int, int) override { return block_; }
  bool add() override { return std::exchange(written_, true); }

 private:
  Matrix block_;
  bool written_ = false;
};

class Local : public Output {
 public:
  Local(const Matrix& block, int dim, const Slices& slices) : block_(block), dim_(dim), slices_(slices) {}
  Matrix at(int slice, int interval) override {
    const auto piece = slices_.piece(slice, interval);
    return block_.slice(dim_, piece.begin, piece.end);
  }
  bool add() override { return false; }

 private:
  Matrix block_;
  int dim_;
  const Slices& slices_;
};

// In turn r this rank works at the panels of rank (own - 1 - r); the last turn is its own.
class Turns : public Output {
 public:
  explicit Turns(const Cut& cut) : cut_(cut), axis_(cut.axis()) {}
  int turns() const override { return axis_.size(); }
  bool holds(int turn, int interval) const override { return cut_.owner(interval) == target(turn); }
  bool add() override { return turn_ > 0; }

 protected:
  int target(int turn) const { return axis_.next(-1 - turn); }
  bool last() const { return turn_ + 1 == axis_.size(); }
  size_t share_bytes(int slice) const { return cut_.share_bytes(target(turn_), slice); }

  Cut cut_;
  Transport& axis_;
  int turn_ = 0;
};

class Window : public Turns {
 public:
  Window(const Cut& cut, int index) : Turns(cut), index_(index) {}

  void begin(int slice, int turn) override {
    turn_ = turn;
    const int owner = target(turn);
    part_ = owner == axis_.rank() ? cut_.own() : axis_.panel(owner, index_);
    if (turn == 0) return;
    axis_.await_turn();
    axis_.arrive(axis_.fetch(axis_.next(-1), share_bytes(slice)));
  }
  Matrix at(int slice, int interval) override { return cut_.piece_of(part_, slice, interval); }
  void end(int slice, int) override {
    if (!last()) axis_.offered(share_bytes(slice));
    axis_.advance();
  }

 private:
  int index_;
  Matrix part_;
};

class Ring : public Turns {
 public:
  Ring(const Cut& cut, int lane, const Stream& stream)
      : Turns(cut), stream_(stream), lane_(lane), relay_(cut.axis(), stream, cut.largest_share(), lane) {}

  void begin(int slice, int turn) override {
    turn_ = turn;
    char* buffer = relay_.next();
    if (turn > 0) axis_.take(axis_.next(-1), buffer, share_bytes(slice), lane_);
  }
  Matrix at(int slice, int interval) override { return cut_.piece_in(relay_.data(), slice, interval); }
  void end(int slice, int) override {
    if (!last()) return relay_.send(share_bytes(slice));
    for (int t = 0; t < cut_.slices().intervals(); t++)
      if (holds(turn_, t)) cast(at(slice, t), cut_.piece_of(cut_.own(), slice, t), stream_);
    if (slice + 1 == cut_.slices().slices) relay_.drain();
  }

 private:
  const Stream& stream_;
  int lane_;
  Relay relay_;
};

class QueuedRing : public Turns {
 public:
  QueuedRing(const Cut& cut, int lane, const Stream& stream)
      : Turns(cut), stream_(stream), lane_(lane), relay_(cut.axis(), stream, cut.largest_share(), lane), product_(stream, cut.largest_share()) {}

  void begin(int slice, int turn) override {
    turn_ = turn;
    char* buffer = relay_.next();
    if (turn > 0) axis_.recv(axis_.next(-1), buffer, share_bytes(slice), lane_);
  }
  // The first product goes straight into the message, the last into this rank's own part.
  Matrix at(int slice, int interval) override {
    if (last()) return cut_.piece_of(cut_.own(), slice, interval);
    return cut_.piece_in(turn_ == 0 ? relay_.data() : product_.data(), slice, interval);
  }
  bool add() override { return false; }
  void end(int slice, int) override {
    if (turn_ > 0) axis_.arrived(lane_);
    for (int t = 0; t < cut_.slices().intervals() && turn_ > 0; t++) {
      if (!holds(turn_, t)) continue;
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

}  // namespace

std::unique_ptr<Output> whole_output(const Matrix& block) { return std::make_unique<Whole>(block); }
std::unique_ptr<Output> local_output(const Matrix& block, int dim, const Slices& slices) { return std::make_unique<Local>(block, dim, slices); }
std::unique_ptr<Output> window_output(const Cut& cut, int index) { return std::make_unique<Window>(cut, index); }
std::unique_ptr<Output> ring_output(const Cut& cut, int lane, const Stream& stream) {
  if (cut.axis().queues()) return std::make_unique<QueuedRing>(cut, lane, stream);
  return std::make_unique<Ring>(cut, lane, stream);
}

}  // namespace gingham
