#include "kernels/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cast.h"

namespace gingham {
namespace {

double& at(const Matrix& m, int64_t i, int64_t j) { return static_cast<double*>(m.data)[i * m.row_stride + j * m.col_stride]; }

void check_numbers(const Matrix& m, int64_t rows, int64_t cols) {
  CHECK(ShapeError, m.rows == rows && m.cols == cols && m.dtype == DType::f64, "[", m.rows, ",", m.cols, "] ", name_of(m.dtype), ", expected [", rows,
        ",", cols, "] float64");
}

}  // namespace

void row_maxima(const Matrix& logits, const Matrix& maxima, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, row_maxima(logits, maxima, stream));
  check_numbers(maxima, logits.rows, 1);
  DISPATCH(accumulator(logits.dtype), T, {
    std::vector<T> row(static_cast<size_t>(logits.cols));
    for (int64_t i = 0; i < logits.rows; i++) {
      load_row(logits, i, row.data(), stream);
      double most = -std::numeric_limits<double>::infinity();
      for (const T v : row)
        if (static_cast<double>(v) > most || v != v) most = static_cast<double>(v);  // a NaN stays
      at(maxima, i, 0) = most;
    }
  });
}

void softmax_pieces(const Matrix& logits, const Matrix& maxima, const Targets& targets, const Matrix& pieces, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, softmax_pieces(logits, maxima, targets, pieces, stream));
  check_numbers(maxima, logits.rows, 1);
  check_numbers(pieces, logits.rows, 3);
  DISPATCH(accumulator(logits.dtype), T, {
    std::vector<T> row(static_cast<size_t>(logits.cols));
    for (int64_t i = 0; i < logits.rows; i++) {
      load_row(logits, i, row.data(), stream);
      const double most = at(maxima, i, 0);
      const int64_t target = targets.ids[i] - targets.first;
      double sum = 0, all = 0;
      for (const T v : row) {
        sum += std::exp(static_cast<double>(v) - most);
        all += static_cast<double>(v) - most;
      }
      at(pieces, i, 0) = sum;
      at(pieces, i, 1) = targets.ids[i] != targets.ignore && target >= 0 && target < logits.cols
                             ? static_cast<double>(row[static_cast<size_t>(target)]) - most
                             : 0.0;
      at(pieces, i, 2) = all;
    }
  });
}

void losses(const Matrix& pieces, const Targets& targets, const Matrix& out, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, losses(pieces, targets, out, stream));
  check_numbers(pieces, out.rows, 3);
  check_numbers(out, out.rows, 1);
  for (int64_t i = 0; i < out.rows; i++) {
    const double smooth = targets.smoothing > 0 ? targets.smoothing * at(pieces, i, 2) / static_cast<double>(targets.vocabulary) : 0.0;
    at(out, i, 0) = targets.ids[i] == targets.ignore ? 0.0 : std::log(at(pieces, i, 0)) - (1 - targets.smoothing) * at(pieces, i, 1) - smooth;
  }
}

void softmax_gradient(const Matrix& logits, const Matrix& maxima, const Matrix& pieces, const Targets& targets, const double* scale,
                      const Matrix& gradient, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, softmax_gradient(logits, maxima, pieces, targets, scale, gradient, stream));
  check_numbers(maxima, logits.rows, 1);
  check_numbers(pieces, logits.rows, 3);
  const double even = targets.smoothing > 0 ? targets.smoothing / static_cast<double>(targets.vocabulary) : 0.0;
  DISPATCH(accumulator(logits.dtype), T, {
    std::vector<T> row(static_cast<size_t>(logits.cols));
    for (int64_t i = 0; i < logits.rows; i++) {
      load_row(logits, i, row.data(), stream);
      const double most = at(maxima, i, 0), sum = at(pieces, i, 0);
      const int64_t target = targets.ids[i] - targets.first;
      for (T& v : row) v = static_cast<T>(*scale * (std::exp(static_cast<double>(v) - most) / sum - even));
      if (targets.ids[i] == targets.ignore)
        std::fill(row.begin(), row.end(), T(0));
      else if (target >= 0 && target < logits.cols)
        row[static_cast<size_t>(target)] -= static_cast<T>(*scale * (1 - targets.smoothing));
      store_row(row.data(), gradient, i, stream);
    }
  });
}

}  // namespace gingham
