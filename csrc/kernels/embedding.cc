#include "kernels/embedding.h"

#include <string.h>

#include <bit>

#include "base/vectorise.h"
#include "kernels/cast.h"

namespace gingham {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
// By its bits, which vectorises where a conversion does not: 2^112 stands between the biases of the exponents, for numbers below normal too.
inline float widen(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, size = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(size) * 0x1p112f);
  return std::bit_cast<float>(sign | ((x.bits & 0x7c00u) == 0x7c00u ? size | 0x7f800000u : finite));
}

template <class In, class T>
VECTORISED void add_row(const In* x, T* sum, int64_t n) {
  for (int64_t j = 0; j < n; j++) sum[j] += widen(x[j]);
}

template <class In, class T>
void add_rows(const Matrix& rows, const Places& places, const Matrix& table) {
  const bool dense = rows.col_stride == 1 && table.col_stride == 1;
  for (int64_t p = 0; p < rows.rows; p++) {
    const int64_t at = places.ids[p] - places.first;
    if (at < 0 || at >= table.rows || places.ids[p] == places.skipped) continue;
    const In* x = static_cast<const In*>(rows.data) + (places.order ? places.order[p] : p) * rows.row_stride;
    T* sum = static_cast<T*>(table.data) + at * table.row_stride;
    if (dense)
      add_row(x, sum, rows.cols);
    else
      for (int64_t j = 0; j < rows.cols; j++) sum[j * table.col_stride] += widen(x[j * rows.col_stride]);
  }
}

// All bits set are a NaN in every real dtype.
void fill_nan(const Matrix& row) {
  const size_t size = size_of(row.dtype);
  for (int64_t j = 0; j < row.cols; j++) memset(static_cast<char*>(row.data) + static_cast<size_t>(j * row.col_stride) * size, 0xff, size);
}

}  // namespace

void gather_rows(const Matrix& table, const int64_t* ids, const Matrix& out, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, gather_rows(table, ids, out, stream));
  CHECK(ShapeError, table.cols == out.cols && table.dtype == out.dtype && is_real(out.dtype), "rows of ", table.cols, " ", name_of(table.dtype),
        " into rows of ", out.cols, " ", name_of(out.dtype));
  const bool dense = table.col_stride == 1 && out.col_stride == 1;
  const size_t size = size_of(out.dtype), bytes = static_cast<size_t>(out.cols) * size;
  for (int64_t n = 0; n < out.rows; n++) {
    const Matrix to = out.slice(0, n, n + 1);
    if (ids[n] < 0 || ids[n] >= table.rows)
      fill_nan(to);
    else if (dense)
      memcpy(to.data, static_cast<const char*>(table.data) + static_cast<size_t>(ids[n] * table.row_stride) * size, bytes);
    else
      cast(table.slice(0, ids[n], ids[n] + 1), to, stream);
  }
}

void scatter_rows(const Matrix& rows, const Places& places, const Matrix& table, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, scatter_rows(rows, places, table, stream));
  CHECK(ShapeError, rows.cols == table.cols && table.dtype == accumulator(rows.dtype), "rows of ", rows.cols, " ", name_of(rows.dtype),
        " summed into rows of ", table.cols, " ", name_of(table.dtype));
  fill_zero(table, stream);
  switch (rows.dtype) {
    case DType::f32:
      return add_rows<float, float>(rows, places, table);
    case DType::f64:
      return add_rows<double, double>(rows, places, table);
    case DType::bf16:
      return add_rows<Bf16, float>(rows, places, table);
    case DType::f16:
      return add_rows<F16, float>(rows, places, table);
    default:
      throw ShapeError(concat("scatter of ", name_of(rows.dtype)));
  }
}

}  // namespace gingham
