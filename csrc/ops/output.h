// An operand that a step writes: for every slice its owners' panels in rounds. accumulates() tells whether at(slice, interval) is added to or
// overwritten.
//   whole   lacks the slice dim: one block that every slice adds to
//   local   has the slice dim and stands here uncut: each panel is written once
//   window  summed over an axis: the ranks take turns at the owner's matrix, gemm with beta = 1 straight into it
//   ring    summed over an axis: the partial panel travels, every rank adds its product to it
//   queued  the same where messages are queued on streams: the product is made beside while the partial panel is on its way, then both
//           are added into what is sent on (one panel more of workspace, one more pass over it)
//   adding  queued, where other products are made while the partial panel is on its way: each is added to what has arrived, by the gemm
// Owner j's panels are summed by ranks j + 1, j + 2, .., j: the same order, hence the same bits, on window and ring.
#pragma once
#include <memory>

#include "base/stream.h"
#include "kernels/epilogue.h"
#include "ops/grid.h"

namespace gingham {

class Output {
 public:
  virtual ~Output() = default;
  virtual int rounds() const { return 1; }
  virtual bool holds_all() const { return false; }     // has room for the sums of all slices at once: a round may go over all of them
  virtual bool yields() const { return false; }        // a round's sums travel best while other products are made
  virtual void begin(int, int) {}                      // (slice, round)
  virtual bool holds(int, int) const { return true; }  // (round, interval): the interval is this round's
  virtual Matrix at(int slice, int interval) = 0;
  virtual bool accumulates() const = 0;
  virtual Tail tail(int, int) const { return {}; }  // (slice, interval) what the last product into the panel stores instead of the sum
  virtual void written() {}                         // the panel at() has been stored
  virtual void end(int, int) {}
};

std::unique_ptr<Output> whole_output(const Matrix& block);
std::unique_ptr<Output> local_output(const Matrix& block, int dim, const Slices& slices);
// cut.own(): this rank's part of the sum, in its accumulator; panel: its place among the axis' posted panels.
std::unique_ptr<Output> window_output(const Cut& cut, int panel);
std::unique_ptr<Output> ring_output(const Cut& cut, int lane, const Stream& stream);
// rounded: this rank's part in 16 bits, which the last product stores in place of its sum; empty: the sum itself is stored.
std::unique_ptr<Output> adding_output(const Cut& cut, int lane, const Stream& stream, const Matrix& rounded);

}  // namespace gingham
