// Attention over a sequence that the ranks of an axis cut: each keeps its own queries, and every rank's keys and values come by. Softmax sums
// go on from block to block (kernels/attention.h), own block first, then those of the ranks before it, one hop after the other:
//   window    a peer's k and v are read where they stand; what no query here may see is left out and not counted
//   ring      k and v are forwarded hop by hop, block h + 1 on its way while block h is computed
// Backward does the same with dk, dv: those of rank j's keys are summed by ranks j + 1, j + 2, .., j - 1, and rank j adds them to its own:
// one order, hence the same bits, on window and ring. A rank makes its product first and adds it to the sum afterwards, so that the sum
// travels meanwhile. Words received a rank, kv = 2 batch time kv_heads width: forward kv (r-1)/r, backward 2 kv (r-1)/r, through windows only
// what is looked at (docs/theory.md section 5); sums of 16-bit operands in fp32. Memory: one block of sums, and on a ring two or three of k and v.
//
// Order of the sequence's pieces, r = 2, zigzag: the pieces a0 a1 b1 b0 of the sequence lie as (a0, b0) and (a1, b1) on the ranks, so that
// under a causal mask all have the same work. A piece of n has n - n/2 of them in its first half.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "control/program.h"
#include "kernels/attention.h"
#include "transport/axis.h"

namespace gingham {

struct AttentionCall {
  Attention block;               // its mask: rows this rank's queries, columns the keys, those of the cache and then piece by piece
  std::vector<int64_t> lengths;  // of all pieces of the sequence
  int place = 0;                 // of this rank's queries among the pieces
  bool zigzag = false;
  bool masked = false;  // some mask is given, though it may be empty here
  int64_t past = 0;     // keys and values before the sequence (a cache), which lie first; only where they are whole here
  // Tensors are made by the caller, in the shared heap, row-major; accumulated: in the accumulator of the operands.
  std::function<Matrix(int64_t rows, int64_t cols, bool accumulated)> allocate;
  std::function<Matrix(int64_t rows, int64_t cols)> allocate_lse;
};

// The runs of one piece, row 0 being its first: one, or with zigzag two.
std::vector<Run> runs_of(const std::vector<int64_t>& lengths, int place, bool zigzag);

// axis: whose ranks have a piece each; none: k and v are whole here, piece after piece.
class RingAttention {
 public:
  RingAttention(Program& program, Axis* axis, const Stream& stream, AttentionCall call);

  struct Result {
    Matrix out, lse;  // [time, batch heads width], [batch heads, time] in the accumulator
  };
  Result forward(const Matrix& q, const Matrix& k, const Matrix& v);
  struct Gradients {
    Matrix dq, dk, dv;
  };
  Gradients backward(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& dout, const Result& kept);

 private:
  void begin(const char* name, const Matrix& q, const Matrix& k, const Matrix& v);
  void check(const Matrix& q, const Matrix& k, const Matrix& v) const;
  std::vector<Run> keys_of(int place) const;
  std::vector<Run> keys_here() const;
  std::vector<Run> looked_at(int reader, int owner) const;  // of a rank's keys, those that a query of another one may see

  Program& program_;
  Axis* axis_;
  const Stream& stream_;
  AttentionCall call_;
  std::vector<Run> queries_;
};

}  // namespace gingham
