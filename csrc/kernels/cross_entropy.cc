#include "kernels/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/exponential.h"
#include "base/vectorise.h"
#include "kernels/cast.h"

namespace gingham {
namespace {

double& at(const Matrix& m, int64_t i, int64_t j) { return static_cast<double*>(m.data)[i * m.row_stride + j * m.col_stride]; }

void check_numbers(const Matrix& m, int64_t rows, int64_t cols) {
  CHECK(ShapeError, m.rows == rows && m.cols == cols && m.dtype == DType::f64, "[", m.rows, ",", m.cols, "] ", name_of(m.dtype), ", expected [", rows,
        ",", cols, "] float64");
}

constexpr int kLanes = 16;  // numbers kept side by side, so that they vectorise
constexpr int kRun = 16;    // such steps are summed in the logits' accumulator, their sums in float64

// The largest; a NaN is passed over, and meets the sum of exponentials.
template <class T>
VECTORISED T largest_of(const T* x, int64_t n) {
  T most[kLanes];
  std::fill_n(most, kLanes, -std::numeric_limits<T>::infinity());
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int lane = 0; lane < kLanes; lane++) most[lane] = x[j + lane] > most[lane] ? x[j + lane] : most[lane];
  for (; j < n; j++) most[0] = x[j] > most[0] ? x[j] : most[0];
  return *std::max_element(most, most + kLanes);
}

template <class T>
double total_of(T (&sums)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
  return static_cast<double>(sums[0]);
}

template <class T>
VECTORISED double sum_of_exponentials(const T* x, int64_t n, T top) {
  double total = 0;
  int64_t j = 0;
  while (j + kLanes <= n) {
    T sums[kLanes] = {};
    for (const int64_t end = std::min(n - kLanes, j + (kRun - 1) * kLanes); j <= end; j += kLanes)
      for (int lane = 0; lane < kLanes; lane++) sums[lane] += exp_of(x[j + lane] - top);
    total += total_of(sums);
  }
  for (; j < n; j++) total += static_cast<double>(exp_of(x[j] - top));
  return total;
}

template <class T>
VECTORISED double sum_less(const T* x, int64_t n, T top) {
  double sums[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int lane = 0; lane < kLanes; lane++) sums[lane] += static_cast<double>(x[j + lane] - top);
  for (; j < n; j++) sums[0] += static_cast<double>(x[j] - top);
  return total_of(sums);
}

template <class T>
VECTORISED void slope_of(const T* x, int64_t n, T top, T part, T even, T* out) {
  for (int64_t j = 0; j < n; j++) out[j] = exp_of(x[j] - top) * part - even;
}

}  // namespace

void softmax_parts(const Matrix& logits, const Targets& targets, const Matrix& maxima, const Matrix& pieces, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, softmax_parts(logits, targets, maxima, pieces, stream));
  check_numbers(maxima, logits.rows, 1);
  check_numbers(pieces, logits.rows, 3);
  DISPATCH(accumulator(logits.dtype), T, {
    Rows<T> rows(logits, stream);
    for (int64_t i = 0; i < logits.rows; i++) {
      const T *row = rows.read(i), most = largest_of(row, logits.cols);
      const int64_t target = targets.ids[i] - targets.first;
      const bool here = targets.ids[i] != targets.ignore && target >= 0 && target < logits.cols;
      at(maxima, i, 0) = static_cast<double>(most);
      // columns that are all masked, of which other ranks may have more, have a sum of 0 and not of NaNs
      at(pieces, i, 0) = sum_of_exponentials(row, logits.cols, most == -std::numeric_limits<T>::infinity() ? T(0) : most);
      at(pieces, i, 1) = here ? static_cast<double>(row[target] - most) : 0.0;
      at(pieces, i, 2) = targets.smoothing > 0 ? sum_less(row, logits.cols, most) : 0.0;
      if (targets.ids[i] != targets.ignore && (targets.ids[i] < 0 || targets.ids[i] >= targets.vocabulary))
        at(pieces, i, 0) = std::numeric_limits<double>::quiet_NaN();
    }
  });
}

void losses(const Matrix& pieces, const Targets& targets, const Matrix& out, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, losses(pieces, targets, out, stream));
  check_numbers(pieces, out.rows, 3);
  check_numbers(out, out.rows, out.cols == 2 ? 2 : 1);
  for (int64_t i = 0; i < out.rows; i++) {
    const bool counts = targets.ids[i] != targets.ignore;
    if (out.cols == 2) at(out, i, 1) = counts ? 1.0 : 0.0;
    const double smooth = targets.smoothing > 0 ? targets.smoothing * at(pieces, i, 2) / static_cast<double>(targets.vocabulary) : 0.0;
    at(out, i, 0) = !counts ? 0.0 : std::log(at(pieces, i, 0)) - (1 - targets.smoothing) * at(pieces, i, 1) - smooth;
  }
}

void softmax_gradient(const Matrix& logits, const Matrix& maxima, const Matrix& pieces, const Targets& targets, const Matrix& scale,
                      const Matrix& gradient, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, softmax_gradient(logits, maxima, pieces, targets, scale, gradient, stream));
  check_numbers(maxima, logits.rows, 1);
  check_numbers(pieces, logits.rows, 3);
  check_numbers(scale, scale.rows == 1 ? 1 : logits.rows, 1);
  const double even = targets.smoothing > 0 ? targets.smoothing / static_cast<double>(targets.vocabulary) : 0.0;
  DISPATCH(accumulator(logits.dtype), T, {
    Rows<T> rows(logits, stream), out(gradient, stream);
    for (int64_t i = 0; i < logits.rows; i++) {
      const T* row = rows.read(i);
      T* slope = out.write(i);
      const double by = at(scale, scale.rows == 1 ? 0 : i, 0);
      const int64_t target = targets.ids[i] - targets.first;
      if (targets.ids[i] == targets.ignore) {
        std::fill_n(slope, logits.cols, T(0));
      } else {
        slope_of(row, logits.cols, static_cast<T>(at(maxima, i, 0)), static_cast<T>(by / at(pieces, i, 0)), static_cast<T>(by * even), slope);
        if (target >= 0 && target < logits.cols) slope[target] -= static_cast<T>(by * (1 - targets.smoothing));
      }
      out.written(i);
    }
  });
}

}  // namespace gingham
