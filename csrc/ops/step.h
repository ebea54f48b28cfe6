// The fused step of one linear map, or of several that share X (q, k, v):  gather X, gather W, multiply, reduce-scatter Y, and its
// mirror images for the gradients. The same operands X, W, Y take part in all three products; only their roles change:
//   Y = X W         gathers X over n, W over m     sums Y over k
//   dX = dY W^T     gathers dY over k, W over m    sums dX over n
//   dW = X^T dY     gathers X over n, dY over k    sums dW over m       (dY is gathered once for both)
// Bytes received per rank, averaged: Y: [x(pn-1) + w(pm-1) + y(pk-1)] / P, likewise for the other two; messages: S x (g-1) per operand that
// has the slice dim, g-1 for the one that lacks it. Workspace: <= 2 slices of each streamed operand (ring; none in a window) and one
// gathered block of the operand that lacks the slice dim where it is cut.
//
// Words of this folder, with Y[8, 12] = X[8, 6] W[6, 12] on 2 x 2 x 1 ranks (pm = pn = 2), S = 3 slices, as an example:
//   Operand     X, W or Y and the axis along which a rank's block is cut once more: X [4, 6] over n, along K, into 2 of [4, 3]
//   Cut         one such operand of one call: who owns which interval of the slice dim
//   slice dim   what the loop runs over: K here; interval: between cut points of X and W, [0, 3) and [3, 6); slice s: the s-th third
//               of every interval, columns 0 and 3 of X first
//   panel       (slice, interval) of an operand, what one gemm takes
//   Input       gives an operand's panels: whole | local | window | ring        Output   takes a result's: the same and queued
//   round       one owner's panels in an Output that is summed over an axis: as many rounds as the axis has ranks
//   Projection  one W and its Y of several that share X; Pipeline: what is posted and the loop over slices; StepCall: one call of a
//               Step: its record, cut points and pipeline
// A call is seven acts, forward and backward: begin (the record is published), declare (who moves what on which axis), post, compose
// (inputs, outputs and products), run, close, finish (bias, activation, sums over depth).
#pragma once
#include <array>
#include <functional>
#include <string>
#include <vector>

#include "base/stream.h"
#include "control/program.h"
#include "kernels/epilogue.h"
#include "ops/early.h"
#include "ops/grid.h"

namespace gingham {

// One W and its Y; n: the global number of output features, for the key.
struct Projection {
  Operand w, y;
  int64_t n = 0;
};

class Step {
 public:
  // An operand travels through the window of its axis where there is one, else along the ring.
  struct Config {
    std::string name;
    Operand x;
    std::vector<Projection> maps;
    Axis* depth = nullptr;  // the axis over which W is replicated: dW and db are summed over it
    Dim slice_dim = Dim::K;
    int64_t k = 0;  // global
    int slices = 1;
    Storage storage = Storage::row_major;  // of W and dW in memory: column_major is nn.Linear's [out, in]
    std::array<int, 3> grid{1, 1, 1};
  };
  // Result tensors are made by the caller, in the shared heap, row-major.
  using Allocate = std::function<Matrix(int64_t rows, int64_t cols)>;

  // early: with these weights, gathered.
  struct Forward {
    Matrix x;
    std::vector<Matrix> w, bias;  // w as [K, N]; bias [1, N] or empty, which a rank's block of a bias may be too
    int64_t lead = 0;             // size of x's dim 0: a Y cut along M is cut at torch.chunk's points of it
    Epilogue epilogue = Epilogue::none;
    Allocate allocate;
    std::vector<char> has_bias = {};
    EarlyWeights* early = nullptr;
    int64_t inner = 1;  // product of x's dims between the first and the last
  };
  struct Backward {
    Matrix x;  // empty data where dW is not asked for
    std::vector<Matrix> w, dy;
    bool need_x = true, need_w = true;
    std::vector<char> need_bias;
    bool reduce_depth = true, reduce_bias = true;
    Allocate allocate;
    EarlyWeights* early = nullptr;
    Allocate allocate_w = {};  // of dW, which may be its accumulator's type; empty: allocate
  };
  struct Gradients {
    Matrix dx;
    std::vector<Matrix> dw, db;
  };

  Step(Program& program, const Stream& stream, Config config);

  // Returns Y of every map; with an epilogue other than none also Z (before it), after the Ys.
  std::vector<Matrix> forward(const Forward& call);
  Gradients backward(const Backward& call);
  // Whether W can be gathered before a call: it is cut over an axis whose ranks share a host and whose ring queues, and has the slice dim.
  bool gathers_early() const;
  // Room for the weights of a later call, which gather() fills: a call of its own, that all ranks make. `allocate` makes peers' parts.
  std::unique_ptr<EarlyWeights> early(const std::vector<Matrix>& w, const Allocate& allocate);
  void gather(EarlyWeights& weights);

 private:
  Program& program_;
  const Stream& stream_;
  Config config_;
};

}  // namespace gingham
