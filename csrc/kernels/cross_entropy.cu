// One block a row. Memory bound: the logits are read once for the sums and once for the gradient, which is written once. The sums are an online
// softmax: every thread keeps the largest of its logits so far and the sum of exponentials about it, which it rescales where a larger one comes.
// Within a thread numbers are summed in the accumulator, over the threads in double.
#include "kernels/activation.cuh"
#include "kernels/cross_entropy.h"
#include "kernels/packed_row.cuh"

namespace gingham::cuda {
namespace {

// Packs that a thread loads before it uses the first.
template <class T>
constexpr int kTogether = sizeof(T) == 8 ? 1 : 4;

// exp for x <= 0. Of 16-bit logits: its error of up to 2^-24 |x| is far below their own.
template <class T>
__device__ inline Wide<T> exp_below(Wide<T> x) {
  if constexpr (sizeof(T) == 2)
    return exp2_near(x * 1.44269504f);
  else
    return exp_of(x);
}

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }  // NaNs are passed over, and meet the sum
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// What a thread has seen of a row.
template <class T>
struct OnlineSum {
  using A = Wide<T>;
  A top = -static_cast<A>(INFINITY), sum = 0;

  // What exponents are measured from: of logits that are all -inf, 0, so that their exponentials are 0 and no NaN.
  __device__ static A base(A top) { return top == -static_cast<A>(INFINITY) ? A(0) : top; }

  template <int W, int U>
  __device__ void take(const Pack<A, W> (&in)[U]) {
    A high = top;
#pragma unroll
    for (int u = 0; u < U; u++) {
      A most = in[u].at[0];
#pragma unroll
      for (int k = 1; k < W; k++) most = larger(most, in[u].at[k]);
      high = larger(high, most);
    }
    if (high > top) {
      sum *= exp_below<T>(top - high);
      top = high;
    }
    const A from = base(top);
#pragma unroll
    for (int u = 0; u < U; u++) {
      A more = 0;
#pragma unroll
      for (int k = 0; k < W; k++) more += exp_below<T>(in[u].at[k] - from);
      sum += more;
    }
  }
};

template <class T, bool smooth>
__global__ void __launch_bounds__(kRowThreads, 4)
    parts_kernel(View<T> logits, Targets targets, View<double> maxima, View<double> pieces, int64_t cols) {
  using A = Wide<T>;
  const int64_t i = blockIdx.x;
  const RowOf<T> row(logits, i);
  const A first = smooth && cols > 0 ? OnlineSum<T>::base(widen(*row.template to<1>(0))) : A(0);
  OnlineSum<T> online;
  A less = 0;  // sum of x - first
  along_packs<kTogether<T>>(RowSplit<T>(cols, row, row), [&](auto width, auto count, int64_t j) {
    constexpr int W = decltype(width)::value, U = decltype(count)::value;
    Pack<T, W> in[U];
    load_packs(row, j, in);
    Pack<A, W> values[U];
#pragma unroll
    for (int u = 0; u < U; u++) values[u] = widened(in[u]);
    online.take(values);
    if constexpr (smooth)
      for (const auto& pack : values)
        for (const A& v : pack.at) less += v - first;
  });
  const double all = block_max(static_cast<double>(online.top));
  const A most = static_cast<A>(all);
  double total[2] = {static_cast<double>(online.sum * exp_of(OnlineSum<T>::base(online.top) - OnlineSum<T>::base(most))), static_cast<double>(less)};
  block_sum(total);
  if (threadIdx.x != 0) return;
  const int64_t id = targets.ids[i], target = id - targets.first;
  const bool counts = id != targets.ignore, here = counts && target >= 0 && target < cols;
  *maxima.to(i, 0) = all;
  *pieces.to(i, 0) = counts && (id < 0 || id >= targets.vocabulary) ? static_cast<double>(NAN) : total[0];
  *pieces.to(i, 1) = here ? static_cast<double>(widen(*logits.to(i, target)) - most) : 0.0;
  *pieces.to(i, 2) = smooth && cols > 0 ? total[1] + static_cast<double>(cols) * (static_cast<double>(first) - all) : 0.0;
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

// exp(x - most) part - even, and less at the target.
template <class A>
struct Slope {
  A most, part, even, whole;
  int64_t target;

  __device__ Slope(double top, double sum, double by, const Targets& targets, int64_t id)
      : most(static_cast<A>(top)),
        part(static_cast<A>(by / sum)),
        even(static_cast<A>(targets.smoothing > 0 ? by * (targets.smoothing / static_cast<double>(targets.vocabulary)) : 0.0)),
        whole(static_cast<A>(by * (1 - targets.smoothing))),
        target(id - targets.first) {}

  template <class T, int W>
  __device__ Pack<T, W> of(const Pack<T, W>& in, int64_t j) const {
    Pack<T, W> out;
    auto [value] = widened(in);
#pragma unroll
    for (int k = 0; k < W; k++) value[k] = exp_below<T>(value[k] - most) * part - even;
    const int64_t at = target - j;
    if (at >= 0 && at < W) {
#pragma unroll
      for (int k = 0; k < W; k++) value[k] -= k == at ? whole : A(0);
    }
#pragma unroll
    for (int k = 0; k < W; k++) narrow(value[k], out.at[k]);
    return out;
  }
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, 4) gradient_kernel(View<T> logits, View<T> gradient, View<double> maxima, View<double> pieces,
                                                                  Targets targets, View<double> scale, int64_t scales, int64_t cols) {
  const int64_t i = blockIdx.x, id = targets.ids[i];
  const RowOf<T> from(logits, i), to(gradient, i);
  const RowSplit<T> split(cols, from, to);
  if (id == targets.ignore) {
    along_packs<1>(split, [&](auto width, auto, int64_t j) {
      constexpr int W = decltype(width)::value;
      store_pack<W>(to.template to<W>(j), Pack<T, W>{});
    });
    return;
  }
  const Slope<Wide<T>> slope(*maxima.to(i, 0), *pieces.to(i, 0), *scale.to(scales == 1 ? 0 : i, 0), targets, id);
  along_packs<kTogether<T>>(split, [&](auto width, auto count, int64_t j) {
    constexpr int W = decltype(width)::value, U = decltype(count)::value;
    Pack<T, W> in[U];
    load_packs(from, j, in);
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int64_t at = j + u * row_step<W>();
      store_pack<W>(to.template to<W>(at), slope.of(in[u], at));
    }
  });
}

}  // namespace

void softmax_parts(const Matrix& logits, const Targets& targets, const Matrix& maxima, const Matrix& pieces, const Stream& stream) {
  if (logits.rows == 0) return;
  with_real(logits.dtype, "cross entropy", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto go = [&](auto kernel) {
      launch(stream, kernel, dim3(blocks(logits.rows)), row_threads<T>(logits.cols), kRowShared, View<T>(logits), targets, View<double>(maxima),
             View<double>(pieces), logits.cols);
    };
    if (targets.smoothing > 0)
      go(parts_kernel<T, true>);
    else
      go(parts_kernel<T, false>);
  });
}

void losses(const Matrix& pieces, const Targets& targets, const Matrix& out, const Stream& stream) {
  if (out.rows == 0) return;
  sweep_width<1>(Loss{View<double>(pieces), View<double>(out), targets, out.cols == 2}, out.rows, 1, stream);
}

void softmax_gradient(const Matrix& logits, const Matrix& maxima, const Matrix& pieces, const Targets& targets, const Matrix& scale,
                      const Matrix& gradient, const Stream& stream) {
  if (logits.empty()) return;
  with_real(logits.dtype, "cross entropy", [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(stream, gradient_kernel<T>, dim3(blocks(logits.rows)), row_threads<T>(logits.cols), 0, View<T>(logits), View<T>(gradient),
           View<double>(maxima), View<double>(pieces), targets, View<double>(scale), scale.rows, logits.cols);
  });
}

}  // namespace gingham::cuda
