// A view of a matrix: element (i, j) stands at data + (i * row_stride + j * col_stride) elements. One of the strides is 1, so that
// a transposed view is free: W stored [out, in] is seen as [in, out] with row_stride 1.
#pragma once
#include <cstdint>
#include <utility>

#include "base/dtype.h"

namespace gingham {

struct Matrix {
  void* data = nullptr;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 1;
  DType dtype = DType::f32;

  int64_t count() const { return rows * cols; }
  size_t bytes() const { return static_cast<size_t>(count()) * size_of(dtype); }
  bool empty() const { return rows == 0 || cols == 0; }
  // Row by row without gaps.
  bool flat() const { return col_stride == 1 && (row_stride == cols || rows == 1); }
  Matrix t() const { return {data, cols, rows, col_stride, row_stride, dtype}; }
  // Rows (dim 0) or columns (dim 1) [begin, end).
  Matrix slice(int dim, int64_t begin, int64_t end) const {
    Matrix out = *this;
    const int64_t stride = dim == 0 ? row_stride : col_stride;
    if (data) out.data = static_cast<char*>(data) + begin * stride * static_cast<int64_t>(size_of(dtype));
    (dim == 0 ? out.rows : out.cols) = end - begin;
    return out;
  }
  int64_t size(int dim) const { return dim == 0 ? rows : cols; }
};

enum class Storage { row_major, column_major };

// A dense matrix at `data`.
inline Matrix dense(void* data, int64_t rows, int64_t cols, DType dtype) { return {data, rows, cols, cols, 1, dtype}; }
inline Matrix dense(void* data, int64_t rows, int64_t cols, DType dtype, Storage storage) {
  return storage == Storage::column_major ? dense(data, cols, rows, dtype).t() : dense(data, rows, cols, dtype);
}

}  // namespace gingham
