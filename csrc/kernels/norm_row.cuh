// What the kernels of layer_norm.h share: a norm's operands as views, and what it takes of a row.
#pragma once
#include "kernels/layer_norm.h"
#include "kernels/reduce.cuh"

namespace gingham::cuda {

template <class T>
struct NormViews {
  View<double> statistics;
  View<T> gamma, beta;
  double share, eps;  // share: of one element in a mean

  explicit NormViews(const Norm& n) : statistics(n.statistics), gamma(n.gamma), beta(n.beta), share(1.0 / static_cast<double>(n.count)), eps(n.eps) {}
};

// A row's mean in two parts, so that x - mean keeps its digits in fp32; what the first leaves is `rest`, in units of the deviation.
template <class A>
struct RowNorm {
  A mean, rest, rstd;
  __device__ A xhat(A x) const { return (x - mean) * rstd - rest; }
};

template <class T>
__device__ inline RowNorm<Wide<T>> row_of(const NormViews<T>& n, double mean, double m2) {
  using A = Wide<T>;
  const A high = static_cast<A>(mean);
  const double rstd = 1.0 / sqrt(m2 * n.share + n.eps);
  return {high, static_cast<A>((mean - static_cast<double>(high)) * rstd), static_cast<A>(rstd)};
}

template <class T>
__device__ inline RowNorm<Wide<T>> row_norm(const NormViews<T>& n, int64_t i) {
  return row_of(n, *n.statistics.to(i, 0), *n.statistics.to(i, 1));
}

template <int W, class T>
__device__ inline Pack<Wide<T>, W> weights(const View<T>& v, int64_t j, Wide<T> otherwise) {
  Pack<Wide<T>, W> out;
  if (v.data) {
    out = widened(v.template load<W>(0, j));
  } else {
    for (int k = 0; k < W; k++) out.at[k] = otherwise;
  }
  return out;
}

}  // namespace gingham::cuda
