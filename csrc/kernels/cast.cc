#include "kernels/cast.h"

#include <string.h>

#include <bit>

namespace gingham {

float widen_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t narrow_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t nan = (bits >> 16) | 0x40u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? nan : rounded);
}

float widen_f16(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }

uint16_t narrow_f16(float value) { return std::bit_cast<uint16_t>(static_cast<_Float16>(value)); }

namespace {

template <class From, class To, class Convert>
void convert_rows(const Matrix& from, const Matrix& to, Convert convert) {
  for (int64_t i = 0; i < from.rows; i++) {
    const From* in = static_cast<const From*>(from.data) + i * from.row_stride;
    To* out = static_cast<To*>(to.data) + i * to.row_stride;
    if (from.col_stride == 1 && to.col_stride == 1)
      for (int64_t j = 0; j < from.cols; j++) out[j] = convert(in[j]);
    else
      for (int64_t j = 0; j < from.cols; j++) out[j * to.col_stride] = convert(in[j * from.col_stride]);
  }
}

template <class T>
void copy_rows(const Matrix& from, const Matrix& to) {
  if (from.col_stride == 1 && to.col_stride == 1) {
    if (from.row_stride == from.cols && to.row_stride == to.cols) {
      memcpy(to.data, from.data, static_cast<size_t>(from.count()) * sizeof(T));
      return;
    }
    for (int64_t i = 0; i < from.rows; i++)
      memcpy(static_cast<T*>(to.data) + i * to.row_stride, static_cast<const T*>(from.data) + i * from.row_stride,
             static_cast<size_t>(from.cols) * sizeof(T));
    return;
  }
  convert_rows<T, T>(from, to, [](T x) { return x; });
}

}  // namespace

void cast(const Matrix& a, const Matrix& b, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, cast(a, b, stream));
  CHECK(ShapeError, a.rows == b.rows && a.cols == b.cols, "copy of [", a.rows, ",", a.cols, "] into [", b.rows, ",", b.cols, "]");
  if (a.empty()) return;
  // Walk along the order in which both are contiguous.
  const bool turn = a.col_stride != 1 && a.row_stride == 1;
  const Matrix from = turn ? a.t() : a, to = turn ? b.t() : b;
  if (from.dtype == to.dtype) {
    switch (size_of(from.dtype)) {
      case 1:
        return copy_rows<uint8_t>(from, to);
      case 2:
        return copy_rows<uint16_t>(from, to);
      case 4:
        return copy_rows<uint32_t>(from, to);
      default:
        return copy_rows<uint64_t>(from, to);
    }
  }
  if (from.dtype == DType::bf16 && to.dtype == DType::f32) return convert_rows<uint16_t, float>(from, to, widen_bf16);
  if (from.dtype == DType::f16 && to.dtype == DType::f32) return convert_rows<uint16_t, float>(from, to, widen_f16);
  if (from.dtype == DType::f32 && to.dtype == DType::bf16) return convert_rows<float, uint16_t>(from, to, narrow_bf16);
  if (from.dtype == DType::f32 && to.dtype == DType::f16) return convert_rows<float, uint16_t>(from, to, narrow_f16);
  throw ShapeError(concat("no conversion from ", name_of(from.dtype), " to ", name_of(to.dtype)));
}

void fill_zero(const Matrix& m, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, fill_zero(m, stream));
  if (m.empty()) return;
  const Matrix v = m.col_stride == 1 ? m : m.t();
  for (int64_t i = 0; i < v.rows; i++)
    memset(static_cast<char*>(v.data) + static_cast<size_t>(i * v.row_stride) * size_of(v.dtype), 0, static_cast<size_t>(v.cols) * size_of(v.dtype));
}

}  // namespace gingham
