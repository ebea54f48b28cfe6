// Rows of any length and pitch in 16-byte words: a row is single elements up to its first 16-byte boundary, then packs, then singles again. A
// vocabulary of 50257 in 16 bits has its rows 2 bytes past a boundary, 4 past it, and so on: all but 14 elements of each still travel in packs.
#pragma once
#include <type_traits>

#include "kernels/reduce.cuh"

namespace gingham::cuda {

template <class T>
struct RowOf {
  T* data;
  int64_t stride;

  __device__ RowOf(const View<T>& view, int64_t i) : data(view.to(i, 0)), stride(view.col_stride) {}
  // W > 1: only where RowSplit says so.
  template <int W>
  __device__ T* to(int64_t j) const {
    return W > 1 ? data + j : data + j * stride;
  }
  // Elements to the next 16-byte boundary.
  __device__ int lead() const { return static_cast<int>((16 - reinterpret_cast<uintptr_t>(data) % 16) % 16 / sizeof(T)); }
};

// Rows that are walked together are packs where all stand alike to the boundaries, else singles throughout.
template <class T>
struct RowSplit {
  static constexpr int width = 16 / static_cast<int>(sizeof(T));
  int64_t head, end, cols;  // packs are head .. end

  __device__ RowSplit(int64_t count, const RowOf<T>& x, const RowOf<T>& y) : head(x.lead()), end(count), cols(count) {
    if (x.stride != 1 || y.stride != 1 || y.lead() != x.lead() || head > cols) head = cols;
    end = head + (cols - head) / width * width;
  }
};

// fn(width, count, j): this thread's groups of `width` elements at columns j, j + row_step<width>(), ..., `count` of them, which are best loaded
// together before the first is used; both are constants: U packs, or what is left over.
template <int U, class T, class Fn>
__device__ inline void along_packs(const RowSplit<T>& row, Fn fn) {
  constexpr int W = RowSplit<T>::width;
  using One = std::integral_constant<int, 1>;
  const int64_t step = static_cast<int64_t>(blockDim.x) * W;
  int64_t j = row.head + static_cast<int64_t>(threadIdx.x) * W;
  for (; j + (U - 1) * step < row.end; j += U * step) fn(std::integral_constant<int, W>{}, std::integral_constant<int, U>{}, j);
  for (; j < row.end; j += step) fn(std::integral_constant<int, W>{}, One{}, j);
  const int64_t inside = row.end - row.head;
#pragma unroll 1
  for (int64_t s = threadIdx.x; s < row.cols - inside; s += blockDim.x) fn(One{}, One{}, s < row.head ? s : s + inside);
}

template <int W>
__device__ inline int64_t row_step() {
  return static_cast<int64_t>(blockDim.x) * W;
}

template <int W, int U, class T>
__device__ inline void load_packs(const RowOf<T>& row, int64_t j, Pack<T, W> (&in)[U]) {
#pragma unroll
  for (int u = 0; u < U; u++) in[u] = load_pack<W>(row.template to<W>(j + u * row_step<W>()));
}

}  // namespace gingham::cuda
