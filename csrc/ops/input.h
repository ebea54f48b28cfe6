// An operand that a step reads, as the panels it consumes: at(slice, interval). Five kinds:
//   whole   lacks the slice dim: one block, the same panel always
//   local   has the slice dim and stands here uncut
//   parts   cut over an axis, with every rank's part here
//   window  cut over an axis: peers' blocks read in place
//   ring    cut over an axis: each slice packed and forwarded hop by hop, later slices on their way while slice s is consumed: one, or two
//           where the axis goes to other hosts
#pragma once
#include <memory>

#include "base/stream.h"
#include "ops/grid.h"

namespace gingham {

class Input {
 public:
  virtual ~Input() = default;
  virtual bool stands() const { return false; }  // nothing of it moves, on any rank: all slices are here at once
  virtual int ahead() const { return 1; }        // slices that move beside the one that is consumed
  virtual void begin(int) {}                     // slice may start to move
  virtual void acquire(int, int) {}              // (slice, interval) is here
  virtual void end(int) {}                       // slice is consumed
  virtual void pump() {}                         // forward what has arrived
  // How far an interval's owner is from this rank, in the direction in which panels travel: they are consumed as they come.
  virtual int distance(int) const { return 0; }
  virtual Matrix at(int slice, int interval) = 0;
};

std::unique_ptr<Input> whole_input(const Matrix& block);
std::unique_ptr<Input> local_input(const Matrix& block, int dim, const Slices& slices);
// parts: by rank of the cut's axis.
std::unique_ptr<Input> parts_input(const Cut& cut, const std::vector<Matrix>& parts);
// cut.own(): this rank's part of the block; panel: its place among the axis' posted panels.
std::unique_ptr<Input> window_input(const Cut& cut, int panel);
std::unique_ptr<Input> ring_input(const Cut& cut, int lane, const Stream& stream);

}  // namespace gingham
