// Sums limited by memory: 12 bytes an element in fp32 for both accumulate and accumulate_into, 10 where that rounds to 16 bits, the roofline
// being 3.35 TB/s / 12 = 279 G elements/s.
#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "kernels/column_slabs.cuh"

namespace gingham::cuda {
namespace {

template <class T, class Out>
struct Sum {
  View<T> a, b;
  View<Out> out;
  template <int W>
  __device__ void at(int64_t i, int64_t j) const {
    const Pack<T, W> x = a.template load<W>(i, j), y = b.template load<W>(i, j);
    Pack<Out, W> sum;
    for (int k = 0; k < W; k++) narrow(x.at[k] + y.at[k], sum.at[k]);
    out.template store<W>(i, j, sum);
  }
};

template <class T>
struct Column {
  using Sum = Wide<T>;
  static constexpr int count = 1;
  static constexpr size_t room = 0;
  View<T> a;
  __device__ Column enter(int64_t, int64_t, void*) const { return *this; }
  template <int W>
  __device__ void at(int64_t i, int64_t j, Sum (&sum)[1][W]) const {
    const Pack<T, W> x = a.template load<W>(i, j);
    for (int k = 0; k < W; k++) sum[0][k] += widen(x.at[k]);
  }
};

// Columns that lie along memory: one warp a column, each lane in double.
template <class T, class Out>
__global__ void __launch_bounds__(32 * kStrands) line_kernel(View<T> a, View<Out> out, int64_t rows, int64_t cols, bool add) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kStrands + threadIdx.x / 32;
  double total = 0;
  if (j < cols)
    for (int64_t i = threadIdx.x % 32; i < rows; i += 32) total += static_cast<double>(widen(*a.to(i, j)));
  for (int mask = 32 / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  if (j >= cols || threadIdx.x % 32 != 0) return;
  Out& to = *out.to(0, j);
  narrow(static_cast<Wide<T>>(add ? static_cast<double>(widen(to)) + total : total), to);
}

template <class T, class Out>
void sum_columns(const Matrix& a, const Matrix& out, bool add, const Stream& stream) {
  if (column_major(a)) {
    const unsigned blocks = static_cast<unsigned>(ceil_div(a.cols, kStrands));
    return launch(stream, line_kernel<T, Out>, dim3(blocks), 32 * kStrands, 0, View<T>(a), View<Out>(out), a.rows, a.cols, add);
  }
  sum_slabs<16 / static_cast<int>(sizeof(T)), Out>(Column<T>{View<T>(a)}, a.rows, {out}, add, {&a}, stream);
}

}  // namespace

void accumulate_into(const Matrix& a, const Matrix& b, const Matrix& out, const Stream& stream) {
  CHECK(ShapeError,
        a.rows == b.rows && a.cols == b.cols && a.dtype == b.dtype && a.rows == out.rows && a.cols == out.cols && rounds_to(a.dtype, out.dtype),
        "sum of [", a.rows, ",", a.cols, "] and [", b.rows, ",", b.cols, "] into [", out.rows, ",", out.cols, "] ", name_of(out.dtype));
  with_real(out.dtype, "a sum", [&](auto tag) {
    using Out = typename decltype(tag)::type;
    using T = Wide<Out>;
    constexpr int width = 16 / static_cast<int>(sizeof(Out));
    Matrix x = a, y = b, z = out;
    arrange({&z, &x, &y});
    sweep<width>(Sum<T, Out>{View<T>(x), View<T>(y), View<Out>(z)}, z.rows, z.cols, {&x, &y, &z}, stream);
  });
}

void accumulate(const Matrix& a, const Matrix& b, const Stream& stream) { cuda::accumulate_into(a, b, b, stream); }

void column_sums(const Matrix& a, const Matrix& out, bool add, const Stream& stream) {
  if (a.cols == 0) return;
  if (a.rows == 0) {
    if (!add) gingham::fill_zero(out, stream);
    return;
  }
  with_real(a.dtype, "column sums", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (out.dtype == accumulator(a.dtype)) return sum_columns<T, Wide<T>>(a, out, add, stream);
    CHECK(ShapeError, !add && out.dtype == a.dtype, "column sums of ", name_of(a.dtype), " into ", name_of(out.dtype));
    if constexpr (sizeof(T) == 2) sum_columns<T, T>(a, out, false, stream);
  });
}

}  // namespace gingham::cuda
