// Rows of which no rank has another part, one block each: a row is read once and stays in registers, forward between its mean, its squares and y,
// backward between its two sums and dx. In 16 bits 4 bytes an element forward and 6 backward, and 4 more for the gradients of gamma and beta,
// which are summed down the columns together.
#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "kernels/column_slabs.cuh"
#include "kernels/norm_row.cuh"

namespace gingham::cuda {
namespace {

constexpr int kHeld = 4;           // packs of a row that a thread keeps
constexpr int kHeldThreads = 512;  // at most: rows of 16384 numbers in 16 bits

// Of a thread's pack number p. Rows are whole packs.
template <int W>
__device__ inline int64_t column_of(int p) {
  return (static_cast<int64_t>(threadIdx.x) + p * static_cast<int64_t>(blockDim.x)) * W;
}

// fn(p, j) for the packs of this thread.
template <int W, class Fn>
__device__ inline void each_held(int64_t cols, Fn fn) {
#pragma unroll
  for (int p = 0; p < kHeld; p++) {
    const int64_t j = column_of<W>(p);
    if (j < cols) fn(p, j);
  }
}

template <int W, class T>
__device__ inline void hold(const View<T>& x, int64_t i, int64_t cols, Pack<T, W> (&held)[kHeld]) {
#pragma unroll
  for (int p = 0; p < kHeld; p++) {
    held[p] = {};
    if (column_of<W>(p) < cols) held[p] = x.template load<W>(i, column_of<W>(p));
  }
}

template <int W, class T>
__global__ void __launch_bounds__(kHeldThreads, 2) whole_kernel(View<T> x, NormViews<T> norm, View<T> y, int64_t cols, bool centred) {
  using A = Wide<T>;
  const int64_t i = blockIdx.x;
  Pack<T, W> in[kHeld];
  hold(x, i, cols, in);
  double mean[1] = {0};
  if (centred) {
    A sum = 0;
    each_held<W>(cols, [&](int p, int64_t) {
      for (const A& v : widened(in[p]).at) sum += v;
    });
    mean[0] = static_cast<double>(sum);
    block_sum(mean);
    mean[0] *= norm.share;
  }
  const A high = static_cast<A>(mean[0]);
  A squares = 0, rest = 0;
  each_held<W>(cols, [&](int p, int64_t) {
    for (const A& v : widened(in[p]).at) {
      const A d = v - high;
      squares += d * d;
      rest += d;  // what rounding left in the mean
    }
  });
  double total[2] = {static_cast<double>(squares), static_cast<double>(rest)};
  block_sum(total);
  const double shift = centred ? total[1] * norm.share : 0.0, m2 = total[0] - shift * total[1];
  mean[0] = static_cast<double>(high) + shift;
  if (threadIdx.x == 0) {
    *norm.statistics.to(i, 0) = mean[0];
    *norm.statistics.to(i, 1) = m2;
  }
  const auto row = row_of(norm, mean[0], m2);
  each_held<W>(cols, [&](int p, int64_t j) {
    const auto values = widened(in[p]), gamma = weights<W>(norm.gamma, j, 1), beta = weights<W>(norm.beta, j, 0);
    Pack<T, W> out;
    for (int k = 0; k < W; k++) narrow(row.xhat(values.at[k]) * gamma.at[k] + beta.at[k], out.at[k]);
    y.template store<W>(i, j, out);
  });
}

template <int W, class T>
__global__ void __launch_bounds__(kHeldThreads, 1)
    whole_backward_kernel(View<T> dy, View<T> x, NormViews<T> norm, View<T> dx, int64_t cols, bool centred) {
  using A = Wide<T>;
  const int64_t i = blockIdx.x;
  Pack<T, W> in[kHeld], grad[kHeld];
  hold(x, i, cols, in);
  hold(dy, i, cols, grad);
  const auto row = row_norm(norm, i);
  A sum = 0, with_x = 0;
  each_held<W>(cols, [&](int p, int64_t j) {
    const auto values = widened(in[p]), slopes = widened(grad[p]), gamma = weights<W>(norm.gamma, j, 1);
    for (int k = 0; k < W; k++) {
      const A g = slopes.at[k] * gamma.at[k];
      sum += g;
      with_x += g * row.xhat(values.at[k]);
    }
  });
  double total[2] = {centred ? static_cast<double>(sum) : 0.0, static_cast<double>(with_x)};
  block_sum(total);
  // dx = rstd (g - even - xhat along), multiplied out
  const A even = static_cast<A>(total[0] * norm.share) * row.rstd, along = static_cast<A>(total[1] * norm.share) * row.rstd;
  each_held<W>(cols, [&](int p, int64_t j) {
    const auto values = widened(in[p]), slopes = widened(grad[p]), gamma = weights<W>(norm.gamma, j, 1);
    Pack<T, W> out;
    for (int k = 0; k < W; k++) narrow(slopes.at[k] * gamma.at[k] * row.rstd - (row.xhat(values.at[k]) * along + even), out.at[k]);
    dx.template store<W>(i, j, out);
  });
}

// sum dy xhat down the columns and, beside it, sum dy. Every thread takes one row of the slab's statistics into shared memory.
template <class T, bool both>
struct WeightSums {
  using Sum = Wide<T>;
  static constexpr int count = both ? 2 : 1;
  static constexpr size_t room = 3 * kSlab * sizeof(Sum);
  View<T> dy, x;
  NormViews<T> norm;

  struct Slab {
    View<T> dy, x;
    const Sum* rows;
    int64_t begin;
    template <int W>
    __device__ void at(int64_t i, int64_t j, Sum (&sum)[count][W]) const {
      const auto values = widened(x.template load<W>(i, j)), slopes = widened(dy.template load<W>(i, j));
      const Sum* of = rows + (i - begin);
      const RowNorm<Sum> row{shared_load(of), shared_load(of + kSlab), shared_load(of + 2 * kSlab)};
      for (int k = 0; k < W; k++) {
        sum[0][k] += slopes.at[k] * row.xhat(values.at[k]);
        if constexpr (both) sum[1][k] += slopes.at[k];
      }
    }
  };
  __device__ Slab enter(int64_t begin, int64_t end, void* memory) const {
    static_assert(kSlab == 32 * kStrands);
    Sum* rows = static_cast<Sum*>(memory);
    const int at = static_cast<int>(threadIdx.x);
    if (begin + at < end) {
      const auto row = row_norm(norm, begin + at);
      shared_store(rows + at, row.mean);
      shared_store(rows + kSlab + at, row.rest);
      shared_store(rows + 2 * kSlab + at, row.rstd);
    }
    block_barrier();
    return {dy, x, rows, begin};
  }
};

// go(width, threads) where a row of these views fits in the registers of a block; whether it does.
template <class T, class Go>
bool held(std::initializer_list<const Matrix*> views, int64_t cols, const Go& go) {
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  const auto fitting = [&](auto w) {
    const int64_t warps = ceil_div(cols / decltype(w)::value, 32 * kHeld);
    if (warps * 32 > kHeldThreads) return false;
    go(w, 32 * static_cast<int>(warps));
    return true;
  };
  if (movable(views, width) && cols % width == 0) return fitting(std::integral_constant<int, width>{});
  return fitting(std::integral_constant<int, 1>{});
}

template <class T>
void sum_weights(const Matrix& dy, const Matrix& x, const Norm& norm, const NormWeights& out, const Stream& stream) {
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  const View<T> grad(dy), in(x);
  const NormViews<T> views(norm);
  if (out.dbeta.data)
    sum_slabs<width, Wide<T>>(WeightSums<T, true>{grad, in, views}, x.rows, {out.dgamma, out.dbeta}, false, {&dy, &x}, stream);
  else
    sum_slabs<width, Wide<T>>(WeightSums<T, false>{grad, in, views}, x.rows, {out.dgamma}, false, {&dy, &x}, stream);
}

}  // namespace

void layer_norm_weights(const Matrix& dy, const Matrix& x, const Norm& norm, const NormWeights& out, const Stream& stream) {
  if (x.cols == 0) return;
  if (!out.dgamma.data || x.rows == 0) {
    if (out.dbeta.data) cuda::column_sums(dy, out.dbeta, false, stream);
    if (out.dgamma.data) gingham::fill_zero(out.dgamma, stream);
    return;
  }
  with_real(x.dtype, "layer norm", [&](auto tag) { sum_weights<typename decltype(tag)::type>(dy, x, norm, out, stream); });
}

void layer_norm_whole(const Matrix& x, const Norm& norm, const Matrix& y, const Stream& stream) {
  bool done = false;
  if (!x.empty())
    with_real(x.dtype, "layer norm", [&](auto tag) {
      using T = typename decltype(tag)::type;
      done = held<T>({&x, &norm.gamma, &norm.beta, &y}, x.cols, [&](auto w, int threads) {
        launch(stream, whole_kernel<decltype(w)::value, T>, dim3(blocks(x.rows)), threads, kRowShared, View<T>(x), NormViews<T>(norm), View<T>(y),
               x.cols, norm.centred);
      });
    });
  if (done) return;
  cuda::row_statistics(x, norm.centred, norm.statistics, stream);
  cuda::layer_norm(x, norm, y, stream);
}

namespace {

void input_gradient(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& dx, const Stream& stream) {
  bool done = false;
  with_real(x.dtype, "layer norm", [&](auto tag) {
    using T = typename decltype(tag)::type;
    done = held<T>({&x, &dy, &norm.gamma, &dx}, x.cols, [&](auto w, int threads) {
      launch(stream, whole_backward_kernel<decltype(w)::value, T>, dim3(blocks(x.rows)), threads, kRowShared, View<T>(dy), View<T>(x),
             NormViews<T>(norm), View<T>(dx), x.cols, norm.centred);
    });
  });
  if (done) return;
  const Scratch room(stream, static_cast<size_t>(x.rows) * 2 * sizeof(double));
  const Matrix pieces = dense(room.data(), x.rows, 2, DType::f64);
  cuda::layer_norm_pieces(dy, x, norm, pieces, stream);
  cuda::layer_norm_backward(dy, x, norm, pieces, dx, stream);
}

}  // namespace

void layer_norm_whole_backward(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& dx, const NormWeights& out, const Stream& stream) {
  if (dx.data && !x.empty()) input_gradient(dy, x, norm, dx, stream);
  cuda::layer_norm_weights(dy, x, norm, out, stream);
}

}  // namespace gingham::cuda
