#include "ops/input.h"

#include <algorithm>

#include "kernels/cast.h"

namespace gingham {
namespace {

class Whole : public Input {
 public:
  explicit Whole(const Matrix& block) : block_(block) {}
  Matrix at(int, int) override { return block_; }

 private:
  Matrix block_;
};

class Local : public Input {
 public:
  Local(const Matrix& block, int dim, const Slices& slices) : block_(block), dim_(dim), slices_(slices) {}
  Matrix at(int slice, int interval) override {
    const auto piece = slices_.piece(slice, interval);
    return block_.slice(dim_, piece.begin, piece.end);
  }

 private:
  Matrix block_;
  int dim_;
  const Slices& slices_;
};

class Window : public Input {
 public:
  Window(const Cut& cut, int index) : cut_(cut), axis_(cut.axis()), index_(index), tickets_(static_cast<size_t>(cut.slices().slices)) {}

  void begin(int slice) override {
    for (int hop = 1; hop < axis_.size(); hop++) {
      const int peer = axis_.next(-hop);
      tickets_[static_cast<size_t>(slice)] = axis_.fetch(peer, cut_.share_bytes(peer, slice));
      axis_.offered(cut_.share_bytes(axis_.rank(), slice));
    }
  }
  void acquire(int slice) override { axis_.arrive(tickets_[static_cast<size_t>(slice)]); }
  Matrix at(int slice, int interval) override {
    const int rank = cut_.owner(interval);
    return cut_.piece_of(rank == axis_.rank() ? cut_.own() : axis_.panel(rank, index_), slice, interval);
  }

 private:
  Cut cut_;
  Transport& axis_;
  int index_;
  std::vector<double> tickets_;
};

class Ring : public Input {
 public:
  Ring(const Cut& cut, int lane, const Stream& stream) : cut_(cut), axis_(cut.axis()), stream_(stream), lane_(lane) {
    for (int s = 0; s < slices(); s++) {
      size_t bytes = 0;
      for (int rank = 0; rank < axis_.size(); rank++) bytes += cut_.share_bytes(rank, s);
      room_ = std::max(room_, bytes);
    }
    buffers_ = Scratch(stream, room_ * static_cast<size_t>(std::min(slices(), 2)));
  }

  void begin(int slice) override {
    // The buffer is slice - 2's; only the g - 1 messages of slice - 1 may still be on their way.
    if (slice >= 2) axis_.drain(axis_.next(), lane_, static_cast<uint32_t>(axis_.size() - 1));
    for (int t = 0; t < cut_.slices().intervals(); t++)
      if (cut_.owner(t) == axis_.rank()) cast(cut_.piece_of(cut_.own(), slice, t), at(slice, t), stream_);
    axis_.send(axis_.next(), share_at(slice, axis_.rank()), cut_.share_bytes(axis_.rank(), slice), lane_);
    moving_ = slice;
    hop_ = 1;
    if (axis_.queues()) pump();  // all hops at once: they run beside the product of the slice before
  }
  void pump() override {
    while (moving_ >= 0 && axis_.ready(axis_.next(-1), lane_)) step();
  }
  void acquire(int slice) override {
    while (moving_ == slice) step();
    axis_.arrived(lane_);
    if (slice + 1 == slices()) axis_.drain(axis_.next(), lane_);
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
    axis_.recv(axis_.next(-1), share_at(moving_, rank), cut_.share_bytes(rank, moving_), lane_);
    if (++hop_ < axis_.size())
      axis_.send(axis_.next(), share_at(moving_, rank), cut_.share_bytes(rank, moving_), lane_);
    else
      moving_ = -1;
  }

  Cut cut_;
  Transport& axis_;
  const Stream& stream_;
  int lane_;
  size_t room_ = 0;
  Scratch buffers_;
  int moving_ = -1, hop_ = 0;
};

}  // namespace

std::unique_ptr<Input> whole_input(const Matrix& block) { return std::make_unique<Whole>(block); }
std::unique_ptr<Input> local_input(const Matrix& block, int dim, const Slices& slices) { return std::make_unique<Local>(block, dim, slices); }
std::unique_ptr<Input> window_input(const Cut& cut, int index) { return std::make_unique<Window>(cut, index); }
std::unique_ptr<Input> ring_input(const Cut& cut, int lane, const Stream& stream) { return std::make_unique<Ring>(cut, lane, stream); }

}  // namespace gingham
