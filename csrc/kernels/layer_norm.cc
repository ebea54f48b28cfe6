// Statistics are summed in float64. The backward pass's sums are kept in the rows' accumulator for no more than kRun numbers, and those sums
// in float64.
#include "kernels/layer_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "base/vectorise.h"
#include "kernels/cast.h"

namespace gingham {
namespace {

// Eight numbers that are computed with side by side; two such are summed in turn, so that no sum waits for the one before.
using Doubles = double __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(32)));
template <class T>
using Eight = std::conditional_t<sizeof(T) == 8, Doubles, Floats>;
template <class T>
using Many = std::conditional_t<sizeof(T) == 8, Doubles, float __attribute__((vector_size(64)))>;
constexpr int kRun = 16;
constexpr int kStep = 16;

double& pair_at(const Matrix& m, int64_t i, int which) { return static_cast<double*>(m.data)[i * m.row_stride + which * m.col_stride]; }

template <class T, class V>
inline void load(const T* from, V& to) {
  std::memcpy(&to, from, sizeof to);
}

inline double total_of(const Floats& v) { return static_cast<double>(((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]))); }

inline double total_of(const Doubles& v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// The mean of [0, n).
template <class T>
VECTORISED double mean_of(const T* x, int64_t n) {
  Doubles sums[2] = {};
  Eight<T> in;
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep)
    for (int half = 0; half < 2; half++) {
      load(x + j + 8 * half, in);
      sums[half] += __builtin_convertvector(in, Doubles);
    }
  double total = total_of(sums[0] + sums[1]);
  for (; j < n; j++) total += static_cast<double>(x[j]);
  return total / static_cast<double>(n > 0 ? n : 1);
}

// The sum of squares about the mean, which costs no digits where the mean is large.
template <class T>
VECTORISED double squares_about(double mean, const T* x, int64_t n) {
  Doubles sums[2] = {};
  Eight<T> in;
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep)
    for (int half = 0; half < 2; half++) {
      load(x + j + 8 * half, in);
      const Doubles d = __builtin_convertvector(in, Doubles) - mean;
      sums[half] += d * d;
    }
  double total = total_of(sums[0] + sums[1]);
  for (; j < n; j++) total += (static_cast<double>(x[j]) - mean) * (static_cast<double>(x[j]) - mean);
  return total;
}

struct Moments {
  double mean, m2;
};

template <class T>
Moments moments(const T* x, int64_t n, bool centred) {
  const double mean = centred ? mean_of(x, n) : 0.0;
  return {mean, squares_about(mean, x, n)};
}

// xhat = (x - mean) rstd, the mean in two parts, so that x - mean keeps its digits.
template <class T>
struct Affine {
  T mean, mean_rest, rstd;
  T operator()(T x) const { return ((x - mean) - mean_rest) * rstd; }
};

template <class T>
Affine<T> affine_of(double mean, double m2, const Norm& norm) {
  const T high = static_cast<T>(mean);
  return {high, static_cast<T>(mean - static_cast<double>(high)), static_cast<T>(1 / std::sqrt(m2 / static_cast<double>(norm.count) + norm.eps))};
}

template <class T>
Affine<T> affine_of(const Norm& norm, int64_t i) {
  return affine_of<T>(pair_at(norm.statistics, i, 0), pair_at(norm.statistics, i, 1), norm);
}

template <class T>
VECTORISED void normalise(const T* x, int64_t n, Affine<T> xhat, const T* gamma, const T* beta, T* y) {
  for (int64_t j = 0; j < n; j++) y[j] = xhat(x[j]) * gamma[j] + beta[j];
}

struct Pieces {
  double sum, with_x;
};

// sum g and sum g xhat, g = dy gamma: xhat = (d - mean_rest) rstd with d = x - mean, so that two sums are enough.
template <class T>
VECTORISED Pieces pieces_of(const T* dy, const T* x, int64_t n, Affine<T> xhat, const T* gamma) {
  constexpr int64_t width = sizeof(Many<T>) / sizeof(T);
  double sum = 0, with_d = 0;
  int64_t j = 0;
  while (j + width <= n) {
    Many<T> sums = {}, with = {}, in, grad, scale;
    for (const int64_t end = std::min(n - width, j + (kRun - 1) * width); j <= end; j += width) {
      load(x + j, in);
      load(dy + j, grad);
      load(gamma + j, scale);
      grad *= scale;
      sums += grad;
      with += grad * (in - xhat.mean);
    }
    Eight<T> halves[2][sizeof(Many<T>) / sizeof(Eight<T>)];
    std::memcpy(halves[0], &sums, sizeof sums);
    std::memcpy(halves[1], &with, sizeof with);
    if constexpr (sizeof(T) == 4) {
      halves[0][0] += halves[0][1];
      halves[1][0] += halves[1][1];
    }
    sum += total_of(halves[0][0]);
    with_d += total_of(halves[1][0]);
  }
  for (; j < n; j++) {
    const T g = dy[j] * gamma[j];
    sum += static_cast<double>(g);
    with_d += static_cast<double>(g) * static_cast<double>(x[j] - xhat.mean);
  }
  return {sum, (with_d - static_cast<double>(xhat.mean_rest) * sum) * static_cast<double>(xhat.rstd)};
}

template <class T>
VECTORISED void gradient(const T* dy, const T* x, int64_t n, Affine<T> xhat, const T* gamma, T sum, T with_x, T* dx) {
  for (int64_t j = 0; j < n; j++) dx[j] = xhat.rstd * (dy[j] * gamma[j] - sum - xhat(x[j]) * with_x);
}

template <class T>
VECTORISED void add_weights(const T* dy, const T* x, int64_t n, Affine<T> xhat, T* dgamma, T* dbeta) {
  for (int64_t j = 0; j < n; j++) {
    dgamma[j] += dy[j] * xhat(x[j]);
    dbeta[j] += dy[j];
  }
}

template <class T>
VECTORISED void move_sums(T* from, double* to, int64_t n) {
  for (int64_t j = 0; j < n; j++) {
    to[j] += static_cast<double>(from[j]);
    from[j] = 0;
  }
}

// gamma or beta, or what stands for it.
template <class T>
std::vector<T> weights_of(const Matrix& m, int64_t cols, T otherwise, const Stream& stream) {
  std::vector<T> row(static_cast<size_t>(cols), otherwise);
  if (!m.empty()) load_row(m, 0, row.data(), stream);
  return row;
}

// dgamma and dbeta: sums down the columns, of kRun rows at a time.
template <class T>
class Totals {
 public:
  explicit Totals(const NormWeights& out, int64_t cols) : out_(out), cols_(out.dgamma.data || out.dbeta.data ? cols : 0) {
    const size_t n = static_cast<size_t>(cols_);
    run_[0].resize(n), run_[1].resize(n), total_[0].resize(n), total_[1].resize(n);
  }
  void add(const T* dy, const T* x, const Affine<T>& xhat) {
    add_weights(dy, x, cols_, xhat, run_[0].data(), run_[1].data());
    if (++rows_ % kRun == 0) end_run();
  }
  void store() {
    end_run();
    put(total_[0], out_.dgamma);
    put(total_[1], out_.dbeta);
  }

 private:
  void end_run() {
    for (int i = 0; i < 2; i++) move_sums(run_[i].data(), total_[i].data(), cols_);
  }
  static void put(const std::vector<double>& from, const Matrix& to) {
    for (size_t j = 0; j < from.size() && to.data; j++) static_cast<T*>(to.data)[static_cast<int64_t>(j) * to.col_stride] = static_cast<T>(from[j]);
  }
  const NormWeights& out_;
  int64_t cols_, rows_ = 0;
  std::vector<T> run_[2];
  std::vector<double> total_[2];
};

void check_pairs(const Matrix& pairs, const Matrix& x) {
  CHECK(ShapeError, pairs.rows == x.rows && pairs.cols == 2 && pairs.dtype == DType::f64, "[", pairs.rows, ",", pairs.cols, "] ",
        name_of(pairs.dtype), " for ", x.rows, " rows, expected two float64 each");
}

void check_weights(const Norm& norm, const Matrix& x) {
  for (const Matrix* each : {&norm.gamma, &norm.beta})
    CHECK(ShapeError, each->empty() || (each->cols == x.cols && accumulator(each->dtype) == accumulator(x.dtype)), "weights of [", each->cols, "] ",
          name_of(each->dtype), " for rows of [", x.cols, "] ", name_of(x.dtype));
}

}  // namespace

void row_statistics(const Matrix& x, bool centred, const Matrix& statistics, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, row_statistics(x, centred, statistics, stream));
  check_pairs(statistics, x);
  DISPATCH(accumulator(x.dtype), T, {
    Rows<T> rows(x, stream);
    for (int64_t i = 0; i < x.rows; i++) {
      const Moments found = moments(rows.read(i), x.cols, centred);
      pair_at(statistics, i, 0) = found.mean;
      pair_at(statistics, i, 1) = found.m2;
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
  check_weights(norm, x);
  DISPATCH(accumulator(x.dtype), T, {
    const std::vector<T> gamma = weights_of(norm.gamma, x.cols, T(1), stream), beta = weights_of(norm.beta, x.cols, T(0), stream);
    Rows<T> in(x, stream), out(y, stream);
    for (int64_t i = 0; i < x.rows; i++) {
      normalise(in.read(i), x.cols, affine_of<T>(norm, i), gamma.data(), beta.data(), out.write(i));
      out.written(i);
    }
  });
}

void layer_norm_pieces(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& pieces, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, layer_norm_pieces(dy, x, norm, pieces, stream));
  check_pairs(norm.statistics, x);
  check_pairs(pieces, x);
  check_weights(norm, x);
  DISPATCH(accumulator(x.dtype), T, {
    const std::vector<T> gamma = weights_of(norm.gamma, x.cols, T(1), stream);
    Rows<T> in(x, stream), grad(dy, stream);
    for (int64_t i = 0; i < x.rows; i++) {
      const Pieces found = pieces_of(grad.read(i), in.read(i), x.cols, affine_of<T>(norm, i), gamma.data());
      pair_at(pieces, i, 0) = norm.centred ? found.sum : 0.0;
      pair_at(pieces, i, 1) = found.with_x;
    }
  });
}

void layer_norm_backward(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& pieces, const Matrix& dx,
                         [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, layer_norm_backward(dy, x, norm, pieces, dx, stream));
  check_pairs(norm.statistics, x);
  check_pairs(pieces, x);
  check_weights(norm, x);
  DISPATCH(accumulator(x.dtype), T, {
    const std::vector<T> gamma = weights_of(norm.gamma, x.cols, T(1), stream);
    Rows<T> in(x, stream), grad(dy, stream), out(dx, stream);
    const double n = static_cast<double>(norm.count);
    for (int64_t i = 0; i < x.rows; i++) {
      const T sum = static_cast<T>(pair_at(pieces, i, 0) / n), with_x = static_cast<T>(pair_at(pieces, i, 1) / n);
      gradient(grad.read(i), in.read(i), x.cols, affine_of<T>(norm, i), gamma.data(), sum, with_x, out.write(i));
      out.written(i);
    }
  });
}

void layer_norm_weights(const Matrix& dy, const Matrix& x, const Norm& norm, const NormWeights& out, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, layer_norm_weights(dy, x, norm, out, stream));
  check_pairs(norm.statistics, x);
  DISPATCH(accumulator(x.dtype), T, {
    Totals<T> totals(out, x.cols);
    Rows<T> in(x, stream), grad(dy, stream);
    for (int64_t i = 0; i < x.rows; i++) totals.add(grad.read(i), in.read(i), affine_of<T>(norm, i));
    totals.store();
  });
}

void layer_norm_whole(const Matrix& x, const Norm& norm, const Matrix& y, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, layer_norm_whole(x, norm, y, stream));
  check_pairs(norm.statistics, x);
  check_weights(norm, x);
  DISPATCH(accumulator(x.dtype), T, {
    const std::vector<T> gamma = weights_of(norm.gamma, x.cols, T(1), stream), beta = weights_of(norm.beta, x.cols, T(0), stream);
    Rows<T> in(x, stream), out(y, stream);
    for (int64_t i = 0; i < x.rows; i++) {
      const T* row = in.read(i);
      const Moments found = moments(row, x.cols, norm.centred);
      pair_at(norm.statistics, i, 0) = found.mean;
      pair_at(norm.statistics, i, 1) = found.m2;
      normalise(row, x.cols, affine_of<T>(found.mean, found.m2, norm), gamma.data(), beta.data(), out.write(i));
      out.written(i);
    }
  });
}

void layer_norm_whole_backward(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& dx, const NormWeights& out,
                               [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, layer_norm_whole_backward(dy, x, norm, dx, out, stream));
  check_pairs(norm.statistics, x);
  check_weights(norm, x);
  DISPATCH(accumulator(x.dtype), T, {
    const std::vector<T> gamma = weights_of(norm.gamma, x.cols, T(1), stream);
    Totals<T> totals(out, x.cols);
    Rows<T> in(x, stream), grad(dy, stream), to(dx, stream);
    const double n = static_cast<double>(norm.count);
    for (int64_t i = 0; i < x.rows; i++) {
      const T *row = in.read(i), *slope = grad.read(i);
      const Affine<T> xhat = affine_of<T>(norm, i);
      totals.add(slope, row, xhat);
      if (!dx.data) continue;
      const Pieces found = pieces_of(slope, row, x.cols, xhat, gamma.data());
      gradient(slope, row, x.cols, xhat, gamma.data(), static_cast<T>(norm.centred ? found.sum / n : 0.0), static_cast<T>(found.with_x / n),
               to.write(i));
      to.written(i);
    }
    totals.store();
  });
}

}  // namespace gingham
