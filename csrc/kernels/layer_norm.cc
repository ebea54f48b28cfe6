#include "kernels/layer_norm.h"

#include <cmath>
#include <vector>

#include "kernels/cast.h"

namespace gingham {
namespace {

double& pair_at(const Matrix& m, int64_t i, int which) { return static_cast<double*>(m.data)[i * m.row_stride + which * m.col_stride]; }

template <class T>
std::vector<T> row_of(const Matrix& m, int64_t i, const Stream& stream) {
  std::vector<T> row(static_cast<size_t>(m.cols));
  load_row(m, i, row.data(), stream);
  return row;
}

// gamma or beta, or what stands for it.
template <class T>
std::vector<T> weights_of(const Matrix& m, int64_t cols, T otherwise, const Stream& stream) {
  return m.empty() ? std::vector<T>(static_cast<size_t>(cols), otherwise) : row_of<T>(m, 0, stream);
}

double rstd_of(const Norm& norm, int64_t i) { return 1 / std::sqrt(pair_at(norm.statistics, i, 1) / static_cast<double>(norm.count) + norm.eps); }

void check_pairs(const Matrix& pairs, const Matrix& x) {
  CHECK(ShapeError, pairs.rows == x.rows && pairs.cols == 2 && pairs.dtype == DType::f64, "[", pairs.rows, ",", pairs.cols, "] ",
        name_of(pairs.dtype), " for ", x.rows, " rows, expected two float64 each");
}

}  // namespace

void row_statistics(const Matrix& x, const Matrix& statistics, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, row_statistics(x, statistics, stream));
  check_pairs(statistics, x);
  DISPATCH(accumulator(x.dtype), T, {
    for (int64_t i = 0; i < x.rows; i++) {
      double mean = 0, m2 = 0, rest = 0;
      const std::vector<T> row = row_of<T>(x, i, stream);
      for (const T v : row) mean += static_cast<double>(v);
      mean /= static_cast<double>(x.cols > 0 ? x.cols : 1);
      for (const T v : row) {
        const double d = static_cast<double>(v) - mean;
        m2 += d * d;
        rest += d;  // what rounding left in the mean
      }
      pair_at(statistics, i, 0) = mean;
      pair_at(statistics, i, 1) = m2 - (x.cols > 0 ? rest * rest / static_cast<double>(x.cols) : 0.0);
    }
  });
}

void merge_statistics(const Matrix& other, int64_t other_count, const Matrix& into, int64_t into_count, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, merge_statistics(other, other_count, into, into_count, stream));
  check_pairs(other, into);
  const double n = static_cast<double>(other_count), all = n + static_cast<double>(into_count);
  if (all == 0) return;
  for (int64_t i = 0; i < into.rows; i++) {
    const double d = pair_at(other, i, 0) - pair_at(into, i, 0);
    pair_at(into, i, 1) += pair_at(other, i, 1) + d * d * static_cast<double>(into_count) * n / all;
    pair_at(into, i, 0) += d * n / all;
  }
}

void layer_norm(const Matrix& x, const Norm& norm, const Matrix& y, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, layer_norm(x, norm, y, stream));
  check_pairs(norm.statistics, x);
  DISPATCH(accumulator(x.dtype), T, {
    const std::vector<T> gamma = weights_of(norm.gamma, x.cols, T(1), stream), beta = weights_of(norm.beta, x.cols, T(0), stream);
    for (int64_t i = 0; i < x.rows; i++) {
      std::vector<T> row = row_of<T>(x, i, stream);
      const double mean = pair_at(norm.statistics, i, 0), rstd = rstd_of(norm, i);
      for (size_t j = 0; j < row.size(); j++) row[j] = static_cast<T>((static_cast<double>(row[j]) - mean) * rstd) * gamma[j] + beta[j];
      store_row(row.data(), y, i, stream);
    }
  });
}

void layer_norm_pieces(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& pieces, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, layer_norm_pieces(dy, x, norm, pieces, stream));
  check_pairs(norm.statistics, x);
  check_pairs(pieces, x);
  DISPATCH(accumulator(x.dtype), T, {
    const std::vector<T> gamma = weights_of(norm.gamma, x.cols, T(1), stream);
    for (int64_t i = 0; i < x.rows; i++) {
      const std::vector<T> row = row_of<T>(x, i, stream), grad = row_of<T>(dy, i, stream);
      const double mean = pair_at(norm.statistics, i, 0), rstd = rstd_of(norm, i);
      double sum = 0, with_x = 0;
      for (size_t j = 0; j < row.size(); j++) {
        const double g = static_cast<double>(grad[j]) * static_cast<double>(gamma[j]);
        sum += g;
        with_x += g * (static_cast<double>(row[j]) - mean) * rstd;
      }
      pair_at(pieces, i, 0) = sum;
      pair_at(pieces, i, 1) = with_x;
    }
  });
}

void layer_norm_backward(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& pieces, const Matrix& dx,
                         [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, layer_norm_backward(dy, x, norm, pieces, dx, stream));
  check_pairs(norm.statistics, x);
  check_pairs(pieces, x);
  DISPATCH(accumulator(x.dtype), T, {
    const std::vector<T> gamma = weights_of(norm.gamma, x.cols, T(1), stream);
    for (int64_t i = 0; i < x.rows; i++) {
      std::vector<T> row = row_of<T>(x, i, stream);
      const std::vector<T> grad = row_of<T>(dy, i, stream);
      const double mean = pair_at(norm.statistics, i, 0), rstd = rstd_of(norm, i), n = static_cast<double>(norm.count);
      const double sum = pair_at(pieces, i, 0) / n, with_x = pair_at(pieces, i, 1) / n;
      for (size_t j = 0; j < row.size(); j++) {
        const double xhat = (static_cast<double>(row[j]) - mean) * rstd, g = static_cast<double>(grad[j]) * static_cast<double>(gamma[j]);
        row[j] = static_cast<T>(rstd * (g - sum - xhat * with_x));
      }
      store_row(row.data(), dx, i, stream);
    }
  });
}

void layer_norm_weights(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& dgamma, bool add, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, layer_norm_weights(dy, x, norm, dgamma, add, stream));
  check_pairs(norm.statistics, x);
  DISPATCH(accumulator(x.dtype), T, {
    std::vector<double> total(static_cast<size_t>(x.cols), 0.0);
    for (int64_t i = 0; i < x.rows; i++) {
      const std::vector<T> row = row_of<T>(x, i, stream), grad = row_of<T>(dy, i, stream);
      const double mean = pair_at(norm.statistics, i, 0), rstd = rstd_of(norm, i);
      for (size_t j = 0; j < row.size(); j++) total[j] += static_cast<double>(grad[j]) * (static_cast<double>(row[j]) - mean) * rstd;
    }
    for (size_t j = 0; j < total.size(); j++) {
      T& out = static_cast<T*>(dgamma.data)[static_cast<int64_t>(j) * dgamma.col_stride];
      out = static_cast<T>(add ? static_cast<double>(out) + total[j] : total[j]);
    }
  });
}

}  // namespace gingham
