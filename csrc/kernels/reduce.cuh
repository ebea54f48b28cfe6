// Sums and maxima over a block, the same on every thread and in a fixed order; and walks along a row in vectors.
#pragma once
#include <type_traits>

#include "kernels/sweep.cuh"

namespace gingham::cuda {

constexpr int kRowThreads = 256;
constexpr size_t kRowShared = 4 * 32 * sizeof(double);  // block_join of up to 4 numbers of 8 bytes

template <class V, int N, class Join>
__device__ inline void block_join(V (&v)[N], Join join) {
  V* memory = reinterpret_cast<V*>(shared_memory());
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int mask = 16; mask > 0; mask /= 2)
    for (int n = 0; n < N; n++) v[n] = join(v[n], shuffle_xor(v[n], mask));
  block_barrier();  // what was joined last time has been read
  if (threadIdx.x % 32 == 0)
    for (int n = 0; n < N; n++) shared_store(memory + warp * N + n, v[n]);
  block_barrier();
  for (int n = 0; n < N; n++) {
    V all = shared_load(memory + n);
    for (int w = 1; w < warps; w++) all = join(all, shared_load(memory + w * N + n));
    v[n] = all;
  }
}

template <int N>
__device__ inline void block_sum(double (&v)[N]) {
  block_join(v, [](double a, double b) { return a + b; });
}

__device__ inline double block_max(double value) {
  double v[1] = {value};
  block_join(v, [](double a, double b) { return b > a || b != b ? b : a; });  // a NaN stays
  return v[0];
}

// fn(width, j) for the groups of a row that are this thread's, width a constant: W, and 1 for what is left over.
template <int W, class Fn>
__device__ inline void along_row(int64_t cols, Fn fn) {
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * W; j < cols; j += static_cast<int64_t>(blockDim.x) * W) {
    if (j + W <= cols) {
      fn(std::integral_constant<int, W>{}, j);
    } else {
      for (int64_t rest = j; rest < cols; rest++) fn(std::integral_constant<int, 1>{}, rest);
    }
  }
}

// One block a row, of as many warps as find a group each.
template <class T>
int row_threads(int64_t cols) {
  const int64_t groups = ceil_div(cols * static_cast<int64_t>(sizeof(T)), 16), warps = ceil_div(groups, 32);
  return 32 * static_cast<int>(warps < kRowThreads / 32 ? (warps > 0 ? warps : 1) : kRowThreads / 32);
}

// go(width) with the widest group that all views allow.
template <class T, class Go>
void with_width(std::initializer_list<const Matrix*> views, Go go) {
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  if (movable(views, width))
    go(std::integral_constant<int, width>{});
  else
    go(std::integral_constant<int, 1>{});
}

}  // namespace gingham::cuda
