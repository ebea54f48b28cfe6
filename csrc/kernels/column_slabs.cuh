// Sums down columns in a fixed order: slabs of 256 rows are summed apart, every warp of a block taking each eighth row in the accumulator, the
// warps and then the slabs joined in double. No atomics, so every run gives the same bits.
#pragma once
#include <algorithm>

#include "kernels/sweep.cuh"

namespace gingham::cuda {

constexpr int kStrands = 8, kSlab = 256;
constexpr int64_t kMostDown = 65535;  // blocks of a grid along y

// Adds, over the strands of a block, the sums of its 32 groups of W columns from column `left` on, and writes them in double.
template <int W, class Sum>
__device__ inline void join_strands(double* sums, const Sum (&sum)[W], int64_t left, int64_t cols, double* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32, strand = static_cast<int>(threadIdx.x) / 32;
  for (int k = 0; k < W; k++) shared_store(sums + (strand * W + k) * 32 + lane, static_cast<double>(sum[k]));  // column lane W + k
  block_barrier();
  for (int at = static_cast<int>(threadIdx.x); at < W * 32; at += 32 * kStrands) {
    const int64_t column = left + at % 32 * W + at / 32;
    double total = 0;
    for (int s = 0; s < kStrands; s++) total += shared_load(sums + s * W * 32 + at);
    if (column < cols) out[column] = total;
  }
}

// op.enter(begin, end, memory) gives what adds rows of that slab, with Op::room<Sum> bytes of shared memory: at<W>(i, j, sum) adds the W values of
// row i from column j on to each of the Op::count sums. One block: 32 groups of W columns of a slab, the first of which is number `first`.
// partial: [count][slabs][cols].
template <int W, class Op>
__global__ void __launch_bounds__(32 * kStrands, 3) slab_kernel(Op op, double* partial, int64_t rows, int64_t cols, int64_t first, int64_t slabs) {
  using Sum = typename Op::Sum;
  double* sums = reinterpret_cast<double*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % 32, strand = static_cast<int>(threadIdx.x) / 32;
  const int64_t left = static_cast<int64_t>(blockIdx.x) * 32 * W, j = left + lane * W;
  const int64_t slab = first + blockIdx.y, begin = slab * kSlab, end = begin + kSlab < rows ? begin + kSlab : rows;
  const auto rows_of = op.enter(begin, end, sums + kStrands * 32 * W);
  Sum sum[Op::count][W] = {};
  if (j + W <= cols) {
#pragma unroll 4  // the loads of four rows are under way together
    for (int64_t i = begin + strand; i < end; i += kStrands) rows_of.template at<W>(i, j, sum);
  } else {
#pragma unroll
    for (int k = 0; k < W; k++) {
      if (j + k >= cols) break;
      Sum one[Op::count][1] = {};
#pragma unroll 1
      for (int64_t i = begin + strand; i < end; i += kStrands) rows_of.template at<1>(i, j + k, one);
      for (int n = 0; n < Op::count; n++) sum[n][k] = one[n][0];
    }
  }
#pragma unroll
  for (int n = 0; n < Op::count; n++) {
    if (n > 0) block_barrier();  // what was joined before has been read
    join_strands<W>(sums, sum[n], left, cols, partial + (n * slabs + slab) * cols);
  }
}

template <class T>
struct SlabSums {
  View<T> at[2];
};

// T: of the result, rounded by way of the accumulator.
template <class T>
__global__ void __launch_bounds__(kSweepThreads) slabs_kernel(const double* partial, SlabSums<T> outs, int64_t slabs, int64_t cols, bool add) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kSweepThreads + threadIdx.x;
  if (j >= cols) return;
  T* out = blockIdx.y == 0 ? outs.at[0].to(0, j) : outs.at[1].to(0, j);
  partial += blockIdx.y * slabs * cols;
  double total = add ? static_cast<double>(widen(*out)) : 0.0;
#pragma unroll 8
  for (int64_t s = 0; s < slabs; s++) total += partial[s * cols + j];
  narrow(static_cast<Wide<T>>(total), *out);
}

// outs, [1, cols] each in Out, as many as op has sums, (+)= them; views: every operand of op.
template <int W, class Out, class Op>
void sum_slabs(const Op& op, int64_t rows, std::initializer_list<Matrix> outs, bool add, std::initializer_list<const Matrix*> views,
               const Stream& stream) {
  const int64_t cols = outs.begin()->cols, slabs = ceil_div(rows, kSlab);
  const Scratch room(stream, static_cast<size_t>(Op::count * slabs * cols) * sizeof(double));
  double* partial = reinterpret_cast<double*>(room.data());
  const auto go = [&](auto kernel, int w) {
    for (int64_t first = 0; first < slabs; first += kMostDown)
      launch(stream, kernel, dim3(blocks(ceil_div(cols, 32 * w)), blocks(std::min(slabs - first, kMostDown))), 32 * kStrands,
             sizeof(double) * static_cast<size_t>(kStrands * 32 * w) + Op::room, op, partial, rows, cols, first, slabs);
  };
  if (movable(views, W))
    go(slab_kernel<W, Op>, W);
  else
    go(slab_kernel<1, Op>, 1);
  SlabSums<Out> to;
  for (int n = 0; n < Op::count; n++) to.at[n] = View<Out>(outs.begin()[n]);
  launch(stream, slabs_kernel<Out>, dim3(blocks(ceil_div(cols, kSweepThreads)), Op::count), kSweepThreads, 0, partial, to, slabs, cols, add);
}

}  // namespace gingham::cuda
