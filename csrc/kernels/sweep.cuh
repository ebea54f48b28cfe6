// Elementwise kernels over strided views: sweep(op, rows, cols, views, stream) calls op.at<W>(i, j) for every group of W elements of a row, W = 16
// bytes of the narrowest operand where all views allow it, else 1. Limited by memory: 1024 resident threads with one 16-byte load per
// operand keep 16 KiB per operand under way on every multiprocessor, what 3.35 TB/s need at 600 ns.
#pragma once
#include <initializer_list>
#include <utility>

#include "base/matrix.h"
#include "kernels/element.cuh"
#include "kernels/launch.cuh"

namespace gingham::cuda {

template <class T>
struct View {
  T* data = nullptr;
  int64_t row_stride = 0, col_stride = 0;

  View() = default;
  explicit View(const Matrix& m) : data(static_cast<T*>(m.data)), row_stride(m.row_stride), col_stride(m.col_stride) {}
  __device__ T* to(int64_t i, int64_t j) const { return data + i * row_stride + j * col_stride; }
  __device__ View from(int64_t i, int64_t j) const {
    View out = *this;
    out.data = to(i, j);
    return out;
  }
  template <int W>
  __device__ Pack<T, W> load(int64_t i, int64_t j) const {
    return load_pack<W>(to(i, j));
  }
  template <int W>
  __device__ void store(int64_t i, int64_t j, const Pack<T, W>& pack) const {
    store_pack<W>(to(i, j), pack);
  }
};

constexpr int kSweepThreads = 256;

// 1 << lanes threads stand side by side along a row, the rest of the block below them.
template <int W, class Op>
__global__ void __launch_bounds__(kSweepThreads, 4) sweep_kernel(Op op, int64_t rows, int64_t cols, int lanes) {
  const int64_t j = ((static_cast<int64_t>(blockIdx.x) << lanes) + (threadIdx.x & ((1u << lanes) - 1))) * W;
  const unsigned down = kSweepThreads >> lanes;
  if (j >= cols) return;
  for (int64_t i = blockIdx.y * down + (threadIdx.x >> lanes); i < rows; i += gridDim.y * down) {
    if (j + W <= cols) {
      op.template at<W>(i, j);
    } else {
      for (int64_t rest = j; rest < cols; rest++) op.template at<1>(i, rest);
    }
  }
}

inline bool column_major(const Matrix& m) { return m.col_stride != 1 && m.row_stride == 1; }

// Whether groups of `width` elements of a row of every view (those without data aside) can be moved as words of up to 16 bytes.
inline bool movable(std::initializer_list<const Matrix*> views, int width) {
  for (const Matrix* m : views) {
    if (!m->data) continue;
    const size_t bytes = size_of(m->dtype) * static_cast<size_t>(width), unit = bytes < 16 ? bytes : 16;
    const size_t pitch = m->rows > 1 ? static_cast<size_t>(m->row_stride) * size_of(m->dtype) : 0;
    if (m->col_stride != 1 || reinterpret_cast<uintptr_t>(m->data) % unit != 0 || pitch % unit != 0) return false;
  }
  return true;
}

// Turns views of equal shape so that the first is walked along its contiguous dim, and joins them to one row where all are dense.
inline void arrange(std::initializer_list<Matrix*> views) {
  const bool turn = column_major(**views.begin());
  bool joined = true;
  for (Matrix* m : views) {
    if (!m->data) continue;
    if (turn) *m = m->t();
    joined = joined && m->col_stride == 1 && (m->row_stride == m->cols || m->rows == 1);
  }
  for (Matrix* m : views)
    if (joined && m->data) *m = dense(m->data, 1, m->count(), m->dtype);
}

template <int W, class Op>
void sweep_width(const Op& op, int64_t rows, int64_t cols, const Stream& stream) {
  int lanes = 0;
  while (lanes < 8 && (int64_t{W} << lanes) < cols) lanes++;
  const int64_t across = ceil_div(cols, int64_t{W} << lanes), down = ceil_div(rows, kSweepThreads >> lanes);
  const dim3 grid(blocks(across), blocks(down < 65535 ? down : 65535));
  launch(stream, sweep_kernel<W, Op>, grid, kSweepThreads, 0, op, rows, cols, lanes);
}

// views: every operand of op.
template <int W, class Op>
void sweep(const Op& op, int64_t rows, int64_t cols, std::initializer_list<const Matrix*> views, const Stream& stream) {
  if (rows == 0 || cols == 0) return;
  if (movable(views, W))
    sweep_width<W>(op, rows, cols, stream);
  else
    sweep_width<1>(op, rows, cols, stream);
}

}  // namespace gingham::cuda
