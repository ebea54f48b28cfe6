// softmax(scale q k^T + mask) v for a block of queries and a block of keys, which may be one of several that a query sees: the sums over
// keys go on from block to block, and what they say in the end does not depend on where the blocks begin, but for rounding.
//   forward    per query the largest score so far (top), sum of e^(score - top) and sum of e^(score - top) v, all in the accumulator of q;
//              finish(): out = the last / sum, lse = top + log sum; a query that has seen nothing gives 0 and -inf
//   backward   with lse of all blocks p = e^(score - lse) and D = rowsum(dout out), which each block takes as they are:
//              dv += p^T dout, ds = p (dout v^T - D) scale, dq += ds k, dk += ds^T q
// q, k, v are matrices whose rows are places of the sequence and whose columns are [batch, heads, width]; k and v may have fewer heads, each
// shared by heads / kv_heads queries. 16-bit operands are widened panel by panel. Dropout falls on p by the element's index in the
// global [batch, heads, time, time], the mask being drawn again in backward. Scores exist for a tile of kQueries x kKeys at a time.
#pragma once
#include "base/matrix.h"
#include "base/stream.h"
#include "kernels/dropout.h"

namespace gingham {

struct Attention {
  int64_t batch = 1, heads = 1, kv_heads = 1, width = 1;
  double scale = 1;
  bool causal = false;  // a query sees the keys up to its own position
  // Element (b, h, i, j), of query row i and key column j, at mask + (b, h, i, j) . strides, in elements, 0 where it is the same for all:
  // bytes1 (1: seen), or added to the scores, in q's accumulator. None: all are seen.
  const void* mask = nullptr;
  DType mask_dtype = DType::bytes1;
  int64_t mask_strides[4] = {0, 0, 0, 0};
  // p > 0: dropout; where this rank's part begins in the global tensor, and that one's heads and time.
  DropoutKey dropout{0, 0, 0, 0.0};
  int64_t first_batch = 0, first_head = 0, all_heads = 1, time = 0;
  int64_t* multiplied = nullptr;  // counts multiply-adds: of a tile of scores 2 rows cols width forward, 5 backward, 7 on GPUs
};

// Rows [row, row + count) that stand at positions [position, position + count) of the sequence; column: of the first of them, as keys, in
// the mask.
struct Run {
  int64_t row = 0, count = 0, position = 0, column = 0;
};

// Of a rank's queries: sums [time, batch heads width], top and sum [batch heads, time].
struct AttentionSums {
  Matrix out, top, sum;
};

// The widest head that this device's kernels take.
int64_t widest_head(DType dtype, const Stream& stream);

// Whether a query of one run may see a key of the other.
bool sees(const Attention& a, const Run& queries, const Run& keys);

void attention_begin(const AttentionSums& sums, const Stream& stream);
void attention_forward(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys,
                       const AttentionSums& sums, const Stream& stream);
// sums.out becomes the result, sums.top lse.
void attention_finish(const Attention& a, const AttentionSums& sums, const Stream& stream);

// D [batch heads, time], in the accumulator.
void attention_delta(const Attention& a, const Matrix& dout, const Matrix& out, const Matrix& delta, const Stream& stream);
struct AttentionGradients {
  Matrix dq, dk, dv;  // in the accumulator; added to
};
void attention_backward(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys,
                        const Matrix& dout, const Matrix& lse, const Matrix& delta, const AttentionGradients& sums, const Stream& stream);

namespace cuda {
int64_t widest_head(DType dtype, const Stream& stream);
void attention_begin(const AttentionSums& sums, const Stream& stream);
void attention_forward(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys,
                       const AttentionSums& sums, const Stream& stream);
void attention_finish(const Attention& a, const AttentionSums& sums, const Stream& stream);
void attention_delta(const Attention& a, const Matrix& dout, const Matrix& out, const Matrix& delta, const Stream& stream);
void attention_backward(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys,
                        const Matrix& dout, const Matrix& lse, const Matrix& delta, const AttentionGradients& sums, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
