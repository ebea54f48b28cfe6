// LayerNorm and RMSNorm over rows whose columns may be cut over ranks: pieces of a row are computed here and merged across the ranks in between.
//   forward   row_statistics -> (mean, M2) of this rank's columns, M2 = sum (x - mean)^2; merge_statistics joins two ranks' (Chan, Golub &
//             LeVeque 1979); layer_norm: y = xhat gamma + beta, xhat = (x - mean) rstd, rstd = 1 / sqrt(M2 / count + eps)
//   backward  with g = dy gamma: layer_norm_pieces -> (sum g, sum g xhat) of these columns, summed over the ranks as they are;
//             layer_norm_backward: dx = rstd (g - (sum g + xhat sum g xhat) / count); layer_norm_weights: dgamma = sum dy xhat and
//             dbeta = sum dy down the columns
//   whole     rows of which no rank has another part: each direction in one call, on the CPU in one pass over memory
//   RMSNorm   centred = false: mean stands for 0 everywhere and sum g for 0
//   x = (1, 2 | 3, 4) on two ranks: (1.5, 0.5) and (3.5, 0.5) merge to mean 2.5, M2 = 0.5 + 0.5 + 4 * 2 * 2 / 4 = 5
#pragma once
#include "base/matrix.h"
#include "base/stream.h"

namespace gingham {

// What normalises: merged statistics [rows, 2] float64 (mean, M2) of rows of `count` elements; gamma, beta [1, cols], on a GPU in x's dtype,
// on the CPU in that or in its accumulator; or empty.
struct Norm {
  Matrix statistics;
  int64_t count;
  double eps;
  Matrix gamma, beta;
  bool centred = true;
};

// Gradients of the weights, [1, cols] each in the accumulator of x; empty: not asked for.
struct NormWeights {
  Matrix dgamma, dbeta;
};

void row_statistics(const Matrix& x, bool centred, const Matrix& statistics, const Stream& stream);
// into, over into_count elements a row, takes in other, over other_count; both [rows, 2] float64.
void merge_statistics(const Matrix& other, int64_t other_count, const Matrix& into, int64_t into_count, const Stream& stream);
void layer_norm(const Matrix& x, const Norm& norm, const Matrix& y, const Stream& stream);
// pieces: [rows, 2] float64.
void layer_norm_pieces(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& pieces, const Stream& stream);
void layer_norm_backward(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& pieces, const Matrix& dx, const Stream& stream);
void layer_norm_weights(const Matrix& dy, const Matrix& x, const Norm& norm, const NormWeights& out, const Stream& stream);

// norm.statistics is written.
void layer_norm_whole(const Matrix& x, const Norm& norm, const Matrix& y, const Stream& stream);
// dx may be empty.
void layer_norm_whole_backward(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& dx, const NormWeights& out, const Stream& stream);

namespace cuda {
void row_statistics(const Matrix& x, bool centred, const Matrix& statistics, const Stream& stream);
void merge_statistics(const Matrix& other, int64_t other_count, const Matrix& into, int64_t into_count, const Stream& stream);
void layer_norm(const Matrix& x, const Norm& norm, const Matrix& y, const Stream& stream);
void layer_norm_pieces(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& pieces, const Stream& stream);
void layer_norm_backward(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& pieces, const Matrix& dx, const Stream& stream);
void layer_norm_weights(const Matrix& dy, const Matrix& x, const Norm& norm, const NormWeights& out, const Stream& stream);
void layer_norm_whole(const Matrix& x, const Norm& norm, const Matrix& y, const Stream& stream);
void layer_norm_whole_backward(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& dx, const NormWeights& out, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
