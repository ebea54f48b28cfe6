#include "kernels/accumulate.h"

#include <vector>

#include "kernels/cast.h"

namespace gingham {

void accumulate(const Matrix& a, const Matrix& b, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, accumulate(a, b, stream));
  CHECK(ShapeError, a.rows == b.rows && a.cols == b.cols && a.dtype == b.dtype, "sum of [", a.rows, ",", a.cols, "] into [", b.rows, ",", b.cols,
        "]");
  const bool turn = a.col_stride != 1 && a.row_stride == 1;
  const Matrix from = turn ? a.t() : a, to = turn ? b.t() : b;
  DISPATCH(from.dtype, T, {
    for (int64_t i = 0; i < from.rows; i++) {
      const T* x = static_cast<const T*>(from.data) + i * from.row_stride;
      T* y = static_cast<T*>(to.data) + i * to.row_stride;
      if (from.col_stride == 1 && to.col_stride == 1)
        for (int64_t j = 0; j < from.cols; j++) y[j] += x[j];
      else
        for (int64_t j = 0; j < from.cols; j++) y[j * to.col_stride] += x[j * from.col_stride];
    }
  });
}

void accumulate_into(const Matrix& a, const Matrix& b, const Matrix& out, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, accumulate_into(a, b, out, stream));
  CHECK(ShapeError,
        a.rows == b.rows && a.cols == b.cols && a.dtype == b.dtype && a.rows == out.rows && a.cols == out.cols && rounds_to(a.dtype, out.dtype),
        "sum of [", a.rows, ",", a.cols, "] and [", b.rows, ",", b.cols, "] into [", out.rows, ",", out.cols, "] ", name_of(out.dtype));
  const bool turn = out.col_stride != 1 && out.row_stride == 1;
  const Matrix x = turn ? a.t() : a, y = turn ? b.t() : b, z = turn ? out.t() : out;
  DISPATCH(x.dtype, T, {
    std::vector<T> room(static_cast<size_t>(z.dtype == x.dtype ? 0 : z.cols));
    for (int64_t i = 0; i < z.rows; i++) {
      const T* p = static_cast<const T*>(x.data) + i * x.row_stride;
      const T* q = static_cast<const T*>(y.data) + i * y.row_stride;
      T* r = room.empty() ? static_cast<T*>(z.data) + i * z.row_stride : room.data();
      const int64_t stride = room.empty() ? z.col_stride : 1;
      for (int64_t j = 0; j < z.cols; j++) r[j * stride] = p[j * x.col_stride] + q[j * y.col_stride];
      if (!room.empty()) cast(dense(room.data(), 1, z.cols, x.dtype), z.slice(0, i, i + 1), stream);
    }
  });
}

namespace {

// Rows are summed in blocks of 64, block by block in double: the error stays that of a pairwise sum at the cost of a plain one.
template <class T, class In, class Widen>
void sum_rows(const Matrix& a, const Matrix& out, bool add, Widen widen) {
  const size_t n = static_cast<size_t>(a.cols);
  std::vector<double> total(n, 0.0);
  std::vector<T> block(n);
  for (int64_t begin = 0; begin < a.rows; begin += 64) {
    std::fill(block.begin(), block.end(), T(0));
    const int64_t end = begin + 64 < a.rows ? begin + 64 : a.rows;
    for (int64_t i = begin; i < end; i++) {
      const In* x = static_cast<const In*>(a.data) + i * a.row_stride;
      for (size_t j = 0; j < n; j++) block[j] += widen(x[static_cast<int64_t>(j) * a.col_stride]);
    }
    for (size_t j = 0; j < n; j++) total[j] += static_cast<double>(block[j]);
  }
  T* y = static_cast<T*>(out.data);
  for (size_t j = 0; j < n; j++) {
    T& sum = y[static_cast<int64_t>(j) * out.col_stride];
    sum = static_cast<T>(add ? static_cast<double>(sum) + total[j] : total[j]);
  }
}

}  // namespace

void column_sums(const Matrix& a, const Matrix& out, bool add, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, column_sums(a, out, add, stream));
  if (a.cols == 0) return;
  if (out.dtype != accumulator(a.dtype)) {
    CHECK(ShapeError, !add && out.dtype == a.dtype, "column sums of ", name_of(a.dtype), " into ", name_of(out.dtype));
    std::vector<float> row(static_cast<size_t>(a.cols));
    const Matrix wide = dense(row.data(), 1, a.cols, DType::f32);
    column_sums(a, wide, false, stream);
    return cast(wide, out, stream);
  }
  switch (a.dtype) {
    case DType::f32:
      return sum_rows<float, float>(a, out, add, [](float x) { return x; });
    case DType::f64:
      return sum_rows<double, double>(a, out, add, [](double x) { return x; });
    case DType::bf16:
      return sum_rows<float, uint16_t>(a, out, add, widen_bf16);
    case DType::f16:
      return sum_rows<float, uint16_t>(a, out, add, widen_f16);
    default:
      throw ShapeError(concat("column sums of ", name_of(a.dtype)));
  }
}

}  // namespace gingham
