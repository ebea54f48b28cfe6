// Rows of which other ranks have parts, or too long for layer_norm_whole.cu: one block a row. Statistics read the row twice, the second time
// from L1 or L2 (a row of 12288 in bf16 is 24 KiB): first the mean, then the sum of squares around it, which no mean however large can
// cancel. All is limited by memory: forward 2 x sizeof(T) bytes an element.
#include "kernels/cast.h"
#include "kernels/norm_row.cuh"

namespace gingham::cuda {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 4) statistics_kernel(View<T> x, View<double> out, int64_t cols, bool centred) {
  const int64_t i = blockIdx.x;
  Wide<T> sum = 0;
  if (centred)
    along_row<W>(cols, [&](auto width, int64_t j) {
      const auto in = x.template load<decltype(width)::value>(i, j);
      for (const T& v : in.at) sum += widen(v);
    });
  double mean[1] = {static_cast<double>(sum)};
  block_sum(mean);
  mean[0] /= static_cast<double>(cols);
  const Wide<T> high = static_cast<Wide<T>>(mean[0]), low = static_cast<Wide<T>>(mean[0] - static_cast<double>(high));
  Wide<T> squares = 0, rest = 0;
  along_row<W>(cols, [&](auto width, int64_t j) {
    const auto in = x.template load<decltype(width)::value>(i, j);
    for (const T& v : in.at) {
      const Wide<T> d = (widen(v) - high) - low;
      squares += d * d;
      rest += d;  // what rounding left in the mean
    }
  });
  double total[2] = {static_cast<double>(squares), static_cast<double>(rest)};
  block_sum(total);
  if (threadIdx.x == 0) {
    const double shift = centred ? total[1] / static_cast<double>(cols) : 0.0;
    *out.to(i, 0) = mean[0] + shift;
    *out.to(i, 1) = total[0] - shift * total[1];
  }
}

struct Merge {
  View<double> other, into;
  double other_count, into_count;
  template <int W>
  __device__ void at(int64_t i, int64_t) const {
    const double all = other_count + into_count, d = *other.to(i, 0) - *into.to(i, 0);
    *into.to(i, 1) += *other.to(i, 1) + d * d * into_count * other_count / all;
    *into.to(i, 0) += d * other_count / all;
  }
};

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 4) layer_norm_kernel(View<T> x, NormViews<T> norm, View<T> y, int64_t cols) {
  const int64_t i = blockIdx.x;
  const auto row = row_norm(norm, i);
  along_row<W>(cols, [&](auto width, int64_t j) {
    constexpr int w = decltype(width)::value;
    const Pack<T, w> in = x.template load<w>(i, j);
    const auto gamma = weights<w>(norm.gamma, j, 1), beta = weights<w>(norm.beta, j, 0);
    Pack<T, w> out;
    for (int k = 0; k < w; k++) narrow(row.xhat(widen(in.at[k])) * gamma.at[k] + beta.at[k], out.at[k]);
    y.template store<w>(i, j, out);
  });
}

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 3)
    pieces_kernel(View<T> dy, View<T> x, NormViews<T> norm, View<double> pieces, int64_t cols, bool centred) {
  const int64_t i = blockIdx.x;
  const auto row = row_norm(norm, i);
  Wide<T> sum = 0, with_x = 0;
  along_row<W>(cols, [&](auto width, int64_t j) {
    constexpr int w = decltype(width)::value;
    const Pack<T, w> in = x.template load<w>(i, j), grad = dy.template load<w>(i, j);
    const auto gamma = weights<w>(norm.gamma, j, 1);
    for (int k = 0; k < w; k++) {
      const Wide<T> g = widen(grad.at[k]) * gamma.at[k];
      sum += g;
      with_x += g * row.xhat(widen(in.at[k]));
    }
  });
  double total[2] = {centred ? static_cast<double>(sum) : 0.0, static_cast<double>(with_x)};
  block_sum(total);
  if (threadIdx.x == 0)
    for (int n = 0; n < 2; n++) *pieces.to(i, n) = total[n];
}

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 4)
    backward_kernel(View<T> dy, View<T> x, NormViews<T> norm, View<double> pieces, View<T> dx, int64_t cols) {
  const int64_t i = blockIdx.x;
  const auto row = row_norm(norm, i);
  const Wide<T> sum = static_cast<Wide<T>>(*pieces.to(i, 0) * norm.share), with_x = static_cast<Wide<T>>(*pieces.to(i, 1) * norm.share);
  along_row<W>(cols, [&](auto width, int64_t j) {
    constexpr int w = decltype(width)::value;
    const Pack<T, w> in = x.template load<w>(i, j), grad = dy.template load<w>(i, j);
    const auto gamma = weights<w>(norm.gamma, j, 1);
    Pack<T, w> out;
    for (int k = 0; k < w; k++) narrow(row.rstd * (widen(grad.at[k]) * gamma.at[k] - sum - row.xhat(widen(in.at[k])) * with_x), out.at[k]);
    dx.template store<w>(i, j, out);
  });
}

dim3 rows_of(const Matrix& x) { return dim3(blocks(x.rows)); }

}  // namespace

void row_statistics(const Matrix& x, bool centred, const Matrix& statistics, const Stream& stream) {
  if (x.rows == 0) return;
  if (x.cols == 0) return gingham::fill_zero(statistics, stream);
  with_real(x.dtype, "layer norm", [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_width<T>({&x}, [&](auto w) {
      launch(stream, statistics_kernel<decltype(w)::value, T>, rows_of(x), row_threads<T>(x.cols), kRowShared, View<T>(x), View<double>(statistics),
             x.cols, centred);
    });
  });
}

void merge_statistics(const Matrix& other, int64_t other_count, const Matrix& into, int64_t into_count, const Stream& stream) {
  if (other_count + into_count == 0 || into.rows == 0) return;
  const Merge op{View<double>(other), View<double>(into), static_cast<double>(other_count), static_cast<double>(into_count)};
  sweep_width<1>(op, into.rows, 1, stream);
}

void layer_norm(const Matrix& x, const Norm& norm, const Matrix& y, const Stream& stream) {
  if (x.empty()) return;
  with_real(x.dtype, "layer norm", [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_width<T>({&x, &norm.gamma, &norm.beta, &y}, [&](auto w) {
      launch(stream, layer_norm_kernel<decltype(w)::value, T>, rows_of(x), row_threads<T>(x.cols), 0, View<T>(x), NormViews<T>(norm), View<T>(y),
             x.cols);
    });
  });
}

void layer_norm_pieces(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& pieces, const Stream& stream) {
  if (x.rows == 0) return;
  with_real(x.dtype, "layer norm", [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_width<T>({&x, &dy, &norm.gamma}, [&](auto w) {
      launch(stream, pieces_kernel<decltype(w)::value, T>, rows_of(x), row_threads<T>(x.cols), kRowShared, View<T>(dy), View<T>(x),
             NormViews<T>(norm), View<double>(pieces), x.cols, norm.centred);
    });
  });
}

void layer_norm_backward(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& pieces, const Matrix& dx, const Stream& stream) {
  if (x.empty()) return;
  with_real(x.dtype, "layer norm", [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_width<T>({&x, &dy, &norm.gamma, &dx}, [&](auto w) {
      launch(stream, backward_kernel<decltype(w)::value, T>, rows_of(x), row_threads<T>(x.cols), 0, View<T>(dy), View<T>(x), NormViews<T>(norm),
             View<double>(pieces), View<T>(dx), x.cols);
    });
  });
}

}  // namespace gingham::cuda
