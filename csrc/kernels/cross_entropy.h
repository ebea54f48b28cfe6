// Softmax cross-entropy where the logits' columns (the vocabulary) are cut over ranks. Each rank holds columns first .. first + cols of every
// row; one small exchange joins them:
//   softmax_parts -> the largest of these columns, max, and (S, T, A) about it:
//     S = sum exp(x - max), T = x_target - max where the target lies here (else 0), A = sum (x - max), 0 without label smoothing
//     S is NaN, and with it the loss and the row's gradient, where the target is no class of the vocabulary
//   losses: loss = log S - (1 - e) T - e A / V, with smoothing e and vocabulary V; 0 for rows whose target is `ignore`
//   softmax_gradient: dx = scale (exp(x - max) / S - (1 - e) [target] - e / V); 0 for ignored rows
//   x = (1, 2 | 3, 4), target 3: max 4, S = 0.184 + 1.368, T = 0: loss 0.440
#pragma once
#include "base/matrix.h"
#include "base/stream.h"

namespace gingham {

struct Targets {
  const int64_t* ids = nullptr;  // one a row, of the whole vocabulary
  int64_t ignore = -100, first = 0, vocabulary = 0;
  double smoothing = 0;
};

// maxima [rows, 1], pieces [rows, 3], float64.
void softmax_parts(const Matrix& logits, const Targets& targets, const Matrix& maxima, const Matrix& pieces, const Stream& stream);
// out [rows, 1] float64, or [rows, 2] with 1 beside the loss of a row that counts and 0 beside others.
void losses(const Matrix& pieces, const Targets& targets, const Matrix& out, const Stream& stream);
// pieces as joined over the ranks; scale [1, 1] float64 (the gradient of the mean over the rows that count) or [rows, 1] (of each row's loss).
void softmax_gradient(const Matrix& logits, const Matrix& maxima, const Matrix& pieces, const Targets& targets, const Matrix& scale,
                      const Matrix& gradient, const Stream& stream);

namespace cuda {
void softmax_parts(const Matrix& logits, const Targets& targets, const Matrix& maxima, const Matrix& pieces, const Stream& stream);
void losses(const Matrix& pieces, const Targets& targets, const Matrix& out, const Stream& stream);
void softmax_gradient(const Matrix& logits, const Matrix& maxima, const Matrix& pieces, const Targets& targets, const Matrix& scale,
                      const Matrix& gradient, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
