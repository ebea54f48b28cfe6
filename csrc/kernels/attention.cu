// What stands around the tiled kernels (attention_forward.cuh, attention_backward.cuh): the sums' beginning and end, D, and the choice of a kernel.
#include "kernels/attention_tile.cuh"
#include "kernels/cast.h"
#include "kernels/reduce.cuh"

namespace gingham::cuda {

// One file each: attention_bf16.cu, attention_f16.cu, attention_f32.cu, attention_f64.cu.
void attention_forward(const AttentionPart& p, const ForwardViews<Bf16>& views, const Stream& stream);
void attention_forward(const AttentionPart& p, const ForwardViews<F16>& views, const Stream& stream);
void attention_forward(const AttentionPart& p, const ForwardViews<float>& views, const Stream& stream);
void attention_forward(const AttentionPart& p, const ForwardViews<double>& views, const Stream& stream);
void attention_backward(const AttentionPart& p, const BackwardViews<Bf16>& views, const Stream& stream);
void attention_backward(const AttentionPart& p, const BackwardViews<F16>& views, const Stream& stream);
void attention_backward(const AttentionPart& p, const BackwardViews<float>& views, const Stream& stream);
void attention_backward(const AttentionPart& p, const BackwardViews<double>& views, const Stream& stream);

namespace {

template <class T>
struct Nothing {
  View<T> top;
  template <int W>
  __device__ void at(int64_t i, int64_t j) const {
    Pack<T, W> out;
    for (int k = 0; k < W; k++) out.at[k] = -static_cast<T>(INFINITY);
    top.template store<W>(i, j, out);
  }
};

// out = out / sum, of columns [heads, width].
template <class T>
struct Divide {
  View<T> out, sum;
  int64_t width;
  template <int W>
  __device__ void at(int64_t i, int64_t j) const {
    const T total = *sum.to(j / width, i), factor = total == T(0) ? T(0) : T(1) / total;
    Pack<T, W> pack = out.template load<W>(i, j);
    for (int k = 0; k < W; k++) pack.at[k] *= factor;
    out.template store<W>(i, j, pack);
  }
};

__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }

template <class T>
struct LogSum {
  View<T> top, sum;
  template <int W>
  __device__ void at(int64_t i, int64_t j) const {
    for (int k = 0; k < W; k++) {
      const T total = *sum.to(i, j + k);
      T& lse = *top.to(i, j + k);
      lse = total == T(0) ? -static_cast<T>(INFINITY) : lse + log_of(total);
    }
  }
};

// delta(line, i) = the sum over a head of dout out; a warp each.
template <int W, class T>
__global__ void __launch_bounds__(kRowThreads)
    delta_kernel(View<T> dout, View<T> out, View<Wide<T>> delta, int64_t lines, int64_t width, int64_t count) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32, i = number / lines, line = number % lines;
  if (number >= count) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Wide<T> sum = 0;
  for (int64_t j = static_cast<int64_t>(lane) * W; j < width; j += 32 * W) {
    const Pack<T, W> x = dout.template load<W>(i, line * width + j), y = out.template load<W>(i, line * width + j);
    for (int k = 0; k < W; k++) sum += widen(x.at[k]) * widen(y.at[k]);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  if (lane == 0) *delta.to(line, i) = sum;
}

AttentionPart part_of(const Attention& a, const Matrix& q, const Run& queries, const Run& keys, const Stream& stream) {
  CHECK(ShapeError, a.width <= cuda::widest_head(q.dtype, stream), "attention of heads of ", a.width, " numbers in ", name_of(q.dtype),
        " on a GPU, at most ", cuda::widest_head(q.dtype, stream), ": gather keys and values (ring=False)");
  CHECK(ShapeError, queries.count <= INT32_MAX / 2 && keys.count <= INT32_MAX / 2 && a.batch * a.heads <= INT32_MAX, "attention of ", queries.count,
        " queries, ", keys.count, " keys and ", a.batch * a.heads, " heads on a GPU: at most ", INT32_MAX / 2, " a call; cut it");
  return {a, queries, keys, draw_of(a.dropout)};
}

// Whether a head's part of a row can be moved in groups of `width` elements.
bool in_groups(const Attention& a, std::initializer_list<const Matrix*> views, int width) { return a.width % width == 0 && movable(views, width); }

// Tiles of `high` rows that look at, or are looked at by, what causality leaves of the others.
void count_products(const Attention& a, const Run& queries, const Run& keys, int64_t products) {
  if (!a.multiplied) return;
  constexpr int64_t kHigh = 64;
  for (int64_t i = 0; i < queries.count; i += kHigh) {
    const int64_t rows = queries.count - i < kHigh ? queries.count - i : kHigh, ends = queries.position + i + rows - keys.position;
    const int64_t seen = a.causal && ends < keys.count ? (ends > 0 ? ends : 0) : keys.count;
    *a.multiplied += products * rows * seen * a.width * a.batch * a.heads;
  }
}

}  // namespace

int64_t widest_head(DType dtype, const Stream&) { return dtype == DType::f64 ? 128 : 256; }

void attention_begin(const AttentionSums& sums, const Stream& stream) {
  cuda::fill_zero(sums.out, stream);
  cuda::fill_zero(sums.sum, stream);
  DISPATCH(sums.top.dtype, T, sweep<16 / sizeof(T)>(Nothing<T>{View<T>(sums.top)}, sums.top.rows, sums.top.cols, {&sums.top}, stream));
}

void attention_forward(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys,
                       const AttentionSums& sums, const Stream& stream) {
  const AttentionPart p = part_of(a, q, queries, keys, stream);
  count_products(a, queries, keys, 2);
  with_real(q.dtype, "attention", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Wide<T>;
    const ForwardViews<T> views{View<T>(q),
                                View<T>(k),
                                View<T>(v),
                                View<A>(sums.out),
                                View<A>(sums.top),
                                View<A>(sums.sum),
                                in_groups(a, {&q, &k, &v}, 16 / sizeof(T)),
                                in_groups(a, {&sums.out}, 16 / sizeof(A))};
    attention_forward(p, views, stream);
  });
}

void attention_finish(const Attention& a, const AttentionSums& sums, const Stream& stream) {
  DISPATCH(sums.out.dtype, T, {
    const Divide<T> divide{View<T>(sums.out), View<T>(sums.sum), a.width};
    constexpr int group = 16 / sizeof(T);
    if (sums.out.empty()) return;
    if (in_groups(a, {&sums.out}, group))
      sweep_width<group>(divide, sums.out.rows, sums.out.cols, stream);
    else
      sweep_width<1>(divide, sums.out.rows, sums.out.cols, stream);
    sweep_width<1>(LogSum<T>{View<T>(sums.top), View<T>(sums.sum)}, sums.top.rows, sums.top.cols, stream);
  });
}

void attention_delta(const Attention& a, const Matrix& dout, const Matrix& out, const Matrix& delta, const Stream& stream) {
  const int64_t lines = a.batch * a.heads, count = lines * out.rows;
  if (count == 0) return;
  CHECK(ShapeError, dout.dtype == out.dtype, "attention of ", name_of(out.dtype), " with a gradient of ", name_of(dout.dtype));
  with_real(out.dtype, "attention", [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int group = 16 / sizeof(T);
    const auto go = [&](auto width) {
      launch(stream, delta_kernel<decltype(width)::value, T>, dim3(blocks(ceil_div(count, kRowThreads / 32))), kRowThreads, 0, View<T>(dout),
             View<T>(out), View<Wide<T>>(delta), lines, a.width, count);
    };
    if (in_groups(a, {&dout, &out}, group))
      go(std::integral_constant<int, group>{});
    else
      go(std::integral_constant<int, 1>{});
  });
}

void attention_backward(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys,
                        const Matrix& dout, const Matrix& lse, const Matrix& delta, const AttentionGradients& sums, const Stream& stream) {
  const AttentionPart p = part_of(a, q, queries, keys, stream);
  CHECK(ShapeError, dout.dtype == q.dtype, "attention of ", name_of(q.dtype), " with a gradient of ", name_of(dout.dtype));
  count_products(a, queries, keys, 7);
  with_real(q.dtype, "attention", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Wide<T>;
    const BackwardViews<T> views{View<T>(q),
                                 View<T>(k),
                                 View<T>(v),
                                 View<T>(dout),
                                 View<A>(lse),
                                 View<A>(delta),
                                 View<A>(sums.dq),
                                 View<A>(sums.dk),
                                 View<A>(sums.dv),
                                 in_groups(a, {&q, &k, &v, &dout}, 16 / sizeof(T)),
                                 in_groups(a, {&sums.dq, &sums.dk, &sums.dv}, 16 / sizeof(A))};
    attention_backward(p, views, stream);
  });
}

}  // namespace gingham::cuda
