// Sums down columns in a fixed order: slabs of 256 rows are summed apart, every warp of a block taking each eighth row in the accumulator, the
// warps and then the slabs joined in double. No atomics, so every run gives the same bits.
#pragma once
#include <algorithm>

#include "kernels/sweep.cuh"

namespace gingham::cuda {

constexpr int kStrands = 8, kSlab = 256;
constexpr int64_t kMostDown = 65535;  // blocks of a grid along y

// op.at<W>(i, j, sum) adds the W values of row i from column j on to sum. One block: 32 groups of W columns of a slab, the
// first of which is number `first`.
template <int W, class Op>
__global__ void __launch_bounds__(32 * kStrands, 3) slab_kernel(Op op, double* partial, int64_t rows, int64_t cols, int64_t first) {
  double* sums = reinterpret_cast<double*>(shared_memory());  // [strand][k][lane], column lane W + k
  const int lane = static_cast<int>(threadIdx.x) % 32, strand = static_cast<int>(threadIdx.x) / 32;
  const int64_t left = static_cast<int64_t>(blockIdx.x) * 32 * W, j = left + lane * W;
  const int64_t slab = first + blockIdx.y, begin = slab * kSlab, end = begin + kSlab < rows ? begin + kSlab : rows;
  typename Op::Sum sum[W] = {};
  for (int64_t i = begin + strand; i < end; i += kStrands) {
    if (j + W <= cols) {
      op.template at<W>(i, j, sum);
    } else {
#pragma unroll
      for (int k = 0; k < W; k++) {
        typename Op::Sum one[1] = {sum[k]};
        if (j + k < cols) op.template at<1>(i, j + k, one);
        sum[k] = one[0];
      }
    }
  }
  for (int k = 0; k < W; k++) shared_store(sums + (strand * W + k) * 32 + lane, static_cast<double>(sum[k]));
  block_barrier();
  for (int at = static_cast<int>(threadIdx.x); at < W * 32; at += 32 * kStrands) {
    const int64_t column = left + at % 32 * W + at / 32;
    double total = 0;
    for (int s = 0; s < kStrands; s++) total += shared_load(sums + s * W * 32 + at);
    if (column < cols) partial[slab * cols + column] = total;
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

// out [1, cols] (+)= the sums; views: every operand of op.
template <int W, class Op>
void sum_slabs(const Op& op, int64_t rows, const Matrix& out, bool add, std::initializer_list<const Matrix*> views, const Stream& stream) {
  const int64_t cols = out.cols, slabs = ceil_div(rows, kSlab);
  const Scratch room(stream, static_cast<size_t>(slabs * cols) * sizeof(double));
  double* partial = reinterpret_cast<double*>(room.data());
  const auto go = [&](auto kernel, int w) {
    for (int64_t first = 0; first < slabs; first += kMostDown)
      launch(stream, kernel, dim3(blocks(ceil_div(cols, 32 * w)), blocks(std::min(slabs - first, kMostDown))), 32 * kStrands,
             sizeof(double) * static_cast<size_t>(kStrands * 32 * w), op, partial, rows, cols, first);
  };
  if (movable(views, W))
    go(slab_kernel<W, Op>, W);
  else
    go(slab_kernel<1, Op>, 1);
  using T = typename Op::Sum;
  launch(stream, slabs_kernel<T>, dim3(blocks(ceil_div(cols, kSweepThreads))), kSweepThreads, 0, partial, View<T>(out), slabs, cols, add);
}

}  // namespace gingham::cuda
