#include "ops/input.h"

#include <algorithm>

#include "kernels/cast.h"

namespace gingham {
namespace {

class WholeInput : public Input {
 public:
  explicit WholeInput(const Matrix& block) : block_(block) {}
  Matrix at(int, int) override { return block_; }

 private:
  Matrix block_;
};

class LocalInput : public Input {
 public:
  LocalInput(const Matrix& block, int dim, const Slices& slices) : block_(block), dim_(dim), slices_(slices) {}
  Matrix at(int slice, int interval) override {
    const auto piece = slices_.piece(slice, interval);
    return block_.slice(dim_, piece.begin, piece.end);
  }

 private:
  Matrix block_;
  int dim_;
  const Slices& slices_;
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
  void acquire(int slice) override { window_.wait_get(requests_[static_cast<size_t>(slice)]); }
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

class RingInput : public Input {
 public:
  RingInput(const Cut& cut, int lane, const Stream& stream) : cut_(cut), axis_(cut.axis()), ring_(cut.axis().ring()), stream_(stream), lane_(lane) {
    for (int s = 0; s < slices(); s++) {
      size_t bytes = 0;
      for (int rank = 0; rank < axis_.size(); rank++) bytes += cut_.share_bytes(rank, s);
      room_ = std::max(room_, bytes);
    }
    buffers_ = Scratch(stream, room_ * static_cast<size_t>(std::min(slices(), 2)));
  }

  void begin(int slice) override {
    // The buffer is slice - 2's; only the g - 1 messages of slice - 1 may still be on their way.
    if (slice >= 2) ring_.drain(axis_.next(), lane_, static_cast<uint32_t>(axis_.size() - 1));
    for (int t = 0; t < cut_.slices().intervals(); t++)
      if (cut_.owner(t) == axis_.rank()) cast(cut_.piece_of(cut_.own(), slice, t), at(slice, t), stream_);
    ring_.send(axis_.next(), share_at(slice, axis_.rank()), cut_.share_bytes(axis_.rank(), slice), lane_);
    moving_ = slice;
    hop_ = 1;
    if (ring_.queues()) pump();  // all hops at once: they run beside the product of the slice before
  }
  void pump() override {
    while (moving_ >= 0 && ring_.ready(axis_.next(-1), lane_)) step();
  }
  void acquire(int slice) override {
    while (moving_ == slice) step();
    ring_.arrived(lane_);
    if (slice + 1 == slices()) ring_.drain(axis_.next(), lane_);
  }
  Matrix at(int slice, int interval) override { return cut_.piece_in(share_at(slice, cut_.owner(interval)), slice, interval); }

 private:
  int slices() const { return cut_.slices().slices; }
  char* share_at(int slice, int rank) const {
    char* data = buffers_.data() + static_cast<size_t>(slice % 2) * room_;
    for (int r = 0; r < rank; r++) data += cut_.share_bytes(r, slice);
    return data;
  }
  // Receives the share of the next rank back and forwards it unless it has come round.
  void step() {
    const int rank = axis_.next(-hop_);
    ring_.recv(axis_.next(-1), share_at(moving_, rank), cut_.share_bytes(rank, moving_), lane_);
    if (++hop_ < axis_.size())
      ring_.send(axis_.next(), share_at(moving_, rank), cut_.share_bytes(rank, moving_), lane_);
    else
      moving_ = -1;
  }

  Cut cut_;
  Axis& axis_;
  Ring& ring_;
  const Stream& stream_;
  int lane_;
  size_t room_ = 0;
  Scratch buffers_;
  int moving_ = -1, hop_ = 0;
};

}  // namespace

std::unique_ptr<Input> whole_input(const Matrix& block) { return std::make_unique<WholeInput>(block); }
std::unique_ptr<Input> local_input(const Matrix& block, int dim, const Slices& slices) { return std::make_unique<LocalInput>(block, dim, slices); }
std::unique_ptr<Input> window_input(const Cut& cut, int panel) { return std::make_unique<WindowInput>(cut, panel); }
std::unique_ptr<Input> ring_input(const Cut& cut, int lane, const Stream& stream) { return std::make_unique<RingInput>(cut, lane, stream); }

}  // namespace gingham
