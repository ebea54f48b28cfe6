// Sums limited by memory: 12 bytes an element in fp32 for both accumulate and accumulate_into, the roofline being 3.35 TB/s / 12 = 279 G elements/s.
// column_sums adds slabs of 256 rows apart and then the slabs in order, in double: no atomics, so every run gives the same bits.
#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "kernels/sweep.cuh"

namespace gingham::cuda {
namespace {

template <class T>
struct Sum {
  View<T> a, b, out;
  template <int W>
  __device__ void at(int64_t i, int64_t j) const {
    const Pack<T, W> x = a.template load<W>(i, j), y = b.template load<W>(i, j);
    Pack<T, W> sum;
    for (int k = 0; k < W; k++) sum.at[k] = x.at[k] + y.at[k];
    out.template store<W>(i, j, sum);
  }
};

constexpr int kWarp = 32, kStrands = 8, kSlab = 256;

// One block: 32 groups of W columns of a slab; each warp takes every eighth row.
template <class T, int W>
__global__ void __launch_bounds__(kWarp* kStrands) slab_kernel(View<T> a, double* partial, int64_t rows, int64_t cols) {
  double* sums = reinterpret_cast<double*>(shared_memory());  // [strand][k][lane], column lane W + k
  const int lane = threadIdx.x % kWarp, strand = threadIdx.x / kWarp;
  const int64_t left = static_cast<int64_t>(blockIdx.x) * kWarp * W, j = left + lane * W;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * kSlab, end = begin + kSlab < rows ? begin + kSlab : rows;
  Wide<T> sum[W] = {};
  for (int64_t i = begin + strand; i < end; i += kStrands) {
    if (j + W <= cols) {
      const Pack<T, W> x = a.template load<W>(i, j);
      for (int k = 0; k < W; k++) sum[k] += widen(x.at[k]);
    } else {
      for (int k = 0; k < W; k++)
        if (j + k < cols) sum[k] += widen(*a.to(i, j + k));
    }
  }
  for (int k = 0; k < W; k++) shared_store(sums + (strand * W + k) * kWarp + lane, static_cast<double>(sum[k]));
  block_barrier();
  for (int at = threadIdx.x; at < W * kWarp; at += kWarp * kStrands) {
    const int64_t column = left + at % kWarp * W + at / kWarp;
    double total = 0;
    for (int s = 0; s < kStrands; s++) total += shared_load(sums + s * W * kWarp + at);
    if (column < cols) partial[blockIdx.y * cols + column] = total;
  }
}

template <class T>
__global__ void __launch_bounds__(kSweepThreads) slabs_kernel(const double* partial, View<T> out, int64_t slabs, int64_t cols, bool add) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kSweepThreads + threadIdx.x;
  if (j >= cols) return;
  double total = add ? static_cast<double>(*out.to(0, j)) : 0.0;
  for (int64_t s = 0; s < slabs; s++) total += partial[s * cols + j];
  *out.to(0, j) = static_cast<T>(total);
}

// Columns that lie along memory: one warp a column, each lane in double.
template <class T>
__global__ void __launch_bounds__(kWarp* kStrands) line_kernel(View<T> a, View<Wide<T>> out, int64_t rows, int64_t cols, bool add) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kStrands + threadIdx.x / kWarp;
  double total = 0;
  if (j < cols)
    for (int64_t i = threadIdx.x % kWarp; i < rows; i += kWarp) total += static_cast<double>(widen(*a.to(i, j)));
  for (int mask = kWarp / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  if (j < cols && threadIdx.x % kWarp == 0) *out.to(0, j) = static_cast<Wide<T>>(add ? static_cast<double>(*out.to(0, j)) + total : total);
}

template <class T>
void sum_columns(const Matrix& a, const Matrix& out, bool add, const Stream& stream) {
  if (column_major(a)) {
    const unsigned blocks = static_cast<unsigned>(ceil_div(a.cols, kStrands));
    return launch(stream, line_kernel<T>, dim3(blocks), kWarp * kStrands, 0, View<T>(a), View<Wide<T>>(out), a.rows, a.cols, add);
  }
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  const int64_t slabs = ceil_div(a.rows, kSlab);
  const Scratch room(stream, static_cast<size_t>(slabs * a.cols) * sizeof(double));
  double* partial = reinterpret_cast<double*>(room.data());
  const auto go = [&](auto kernel, int w) {
    launch(stream, kernel, dim3(static_cast<unsigned>(ceil_div(a.cols, kWarp * w)), static_cast<unsigned>(slabs)), kWarp * kStrands,
           sizeof(double) * static_cast<size_t>(kStrands * kWarp * w), View<T>(a), partial, a.rows, a.cols);
  };
  if (movable({&a}, width))
    go(slab_kernel<T, width>, width);
  else
    go(slab_kernel<T, 1>, 1);
  launch(stream, slabs_kernel<Wide<T>>, dim3(static_cast<unsigned>(ceil_div(a.cols, kSweepThreads))), kSweepThreads, 0, partial, View<Wide<T>>(out),
         slabs, a.cols, add);
}

}  // namespace

void accumulate_into(const Matrix& a, const Matrix& b, const Matrix& out, const Stream& stream) {
  CHECK(ShapeError, a.rows == b.rows && a.cols == b.cols && a.dtype == b.dtype && a.rows == out.rows && a.cols == out.cols && a.dtype == out.dtype,
        "sum of [", a.rows, ",", a.cols, "] and [", b.rows, ",", b.cols, "] into [", out.rows, ",", out.cols, "]");
  DISPATCH(a.dtype, T, {
    constexpr int width = 16 / static_cast<int>(sizeof(T));
    Matrix x = a, y = b, z = out;
    arrange({&z, &x, &y});
    sweep<width>(Sum<T>{View<T>(x), View<T>(y), View<T>(z)}, z.rows, z.cols, {&x, &y, &z}, stream);
  });
}

void accumulate(const Matrix& a, const Matrix& b, const Stream& stream) { cuda::accumulate_into(a, b, b, stream); }

void column_sums(const Matrix& a, const Matrix& out, bool add, const Stream& stream) {
  if (a.cols == 0) return;
  if (a.rows == 0) {
    if (!add) gingham::fill_zero(out, stream);
    return;
  }
  with_real(a.dtype, "column sums", [&](auto tag) { sum_columns<typename decltype(tag)::type>(a, out, add, stream); });
}

}  // namespace gingham::cuda
