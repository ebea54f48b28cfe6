// One block a row for the reductions, a sweep for the gradient. Memory bound: the logits are read once for the maxima, once for the sums and
// once for the gradient, which is written once.
#include "kernels/activation.cuh"
#include "kernels/cross_entropy.h"
#include "kernels/reduce.cuh"

namespace gingham::cuda {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 4) maxima_kernel(View<T> logits, View<double> maxima, int64_t cols) {
  const int64_t i = blockIdx.x;
  Wide<T> most = -static_cast<Wide<T>>(INFINITY);
  along_row<W>(cols, [&](auto width, int64_t j) {
    const auto in = logits.template load<decltype(width)::value>(i, j);
    for (const T& v : in.at) {
      const Wide<T> x = widen(v);
      most = x > most || x != x ? x : most;
    }
  });
  const double all = block_max(static_cast<double>(most));
  if (threadIdx.x == 0) *maxima.to(i, 0) = all;
}

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 4)
    softmax_kernel(View<T> logits, View<double> maxima, Targets targets, View<double> pieces, int64_t cols) {
  const int64_t i = blockIdx.x;
  const Wide<T> most = static_cast<Wide<T>>(*maxima.to(i, 0));
  Wide<T> sum = 0, all = 0;
  along_row<W>(cols, [&](auto width, int64_t j) {
    const auto in = logits.template load<decltype(width)::value>(i, j);
    for (const T& v : in.at) {
      const Wide<T> d = widen(v) - most;
      sum += exp_of(d);
      all += d;
    }
  });
  double total[2] = {static_cast<double>(sum), static_cast<double>(all)};
  block_sum(total);
  if (threadIdx.x != 0) return;
  const int64_t id = targets.ids[i], target = id - targets.first;
  const bool here = id != targets.ignore && target >= 0 && target < cols;
  *pieces.to(i, 0) = total[0];
  *pieces.to(i, 1) = here ? static_cast<double>(widen(*logits.to(i, target)) - most) : 0.0;
  *pieces.to(i, 2) = targets.smoothing > 0 ? total[1] : 0.0;
}

struct Loss {
  View<double> pieces, out;
  Targets targets;
  bool counted;
  template <int W>
  __device__ void at(int64_t i, int64_t) const {
    const double smooth = targets.smoothing > 0 ? targets.smoothing * *pieces.to(i, 2) / static_cast<double>(targets.vocabulary) : 0.0;
    const bool counts = targets.ids[i] != targets.ignore;
    if (counted) *out.to(i, 1) = counts ? 1.0 : 0.0;
    *out.to(i, 0) = !counts ? 0.0 : log(*pieces.to(i, 0)) - (1 - targets.smoothing) * *pieces.to(i, 1) - smooth;
  }
};

template <class T>
struct SoftmaxGradient {
  View<T> logits, out;
  View<double> maxima, pieces;
  Targets targets;
  View<double> scale;
  int64_t scales;  // one, or one a row

  template <int W>
  __device__ void at(int64_t i, int64_t j) const {
    using A = Wide<T>;
    const int64_t id = targets.ids[i], target = id - targets.first - j;  // counted from this group on
    const A most = static_cast<A>(*maxima.to(i, 0)), by = static_cast<A>(*scale.to(scales == 1 ? 0 : i, 0)),
            part = static_cast<A>(1.0 / *pieces.to(i, 0));
    const A even = targets.smoothing > 0 ? static_cast<A>(targets.smoothing / static_cast<double>(targets.vocabulary)) : A(0);
    const A whole = static_cast<A>(1 - targets.smoothing);
    const Pack<T, W> in = logits.template load<W>(i, j);
    Pack<T, W> gradient;
    for (int k = 0; k < W; k++) {
      const A value = by * (exp_of(widen(in.at[k]) - most) * part - even - (k == target ? whole : A(0)));
      narrow(id == targets.ignore ? A(0) : value, gradient.at[k]);
    }
    out.template store<W>(i, j, gradient);
  }
};

dim3 rows_of(const Matrix& x) { return dim3(blocks(x.rows)); }

}  // namespace

void row_maxima(const Matrix& logits, const Matrix& maxima, const Stream& stream) {
  if (logits.rows == 0) return;
  with_real(logits.dtype, "cross entropy", [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_width<T>({&logits}, [&](auto w) {
      launch(stream, maxima_kernel<decltype(w)::value, T>, rows_of(logits), row_threads<T>(logits.cols), kRowShared, View<T>(logits),
             View<double>(maxima), logits.cols);
    });
  });
}

void softmax_pieces(const Matrix& logits, const Matrix& maxima, const Targets& targets, const Matrix& pieces, const Stream& stream) {
  if (logits.rows == 0) return;
  with_real(logits.dtype, "cross entropy", [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_width<T>({&logits}, [&](auto w) {
      launch(stream, softmax_kernel<decltype(w)::value, T>, rows_of(logits), row_threads<T>(logits.cols), kRowShared, View<T>(logits),
             View<double>(maxima), targets, View<double>(pieces), logits.cols);
    });
  });
}

void losses(const Matrix& pieces, const Targets& targets, const Matrix& out, const Stream& stream) {
  if (out.rows == 0) return;
  sweep_width<1>(Loss{View<double>(pieces), View<double>(out), targets, out.cols == 2}, out.rows, 1, stream);
}

void softmax_gradient(const Matrix& logits, const Matrix& maxima, const Matrix& pieces, const Targets& targets, const Matrix& scale,
                      const Matrix& gradient, const Stream& stream) {
  with_real(logits.dtype, "cross entropy", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const SoftmaxGradient<T> op{View<T>(logits),     View<T>(gradient), View<double>(maxima), View<double>(pieces), targets,
                                View<double>(scale), scale.rows};
    sweep<16 / static_cast<int>(sizeof(T))>(op, logits.rows, logits.cols, {&logits, &gradient}, stream);
  });
}

}  // namespace gingham::cuda
