// Elements of matrices on the host, in any real type, for the cases of single kernels.
#pragma once
#include "kernels/cast.h"
#include "ranks.h"

namespace gingham {

// From -1 to 1 in steps of 2^-10.
inline float number_at(int64_t i, int64_t seed) {
  uint64_t h = (static_cast<uint64_t>(i) + 1) * 0x9E3779B97F4A7C15ull ^ static_cast<uint64_t>(seed) * 0xC2B2AE3D27D4EB4Full;
  h = (h ^ h >> 29) * 0xBF58476D1CE4E5B9ull;
  return static_cast<float>((h ^ h >> 32) % 2048u) / 1024.f - 1.f;
}

// Element `at` of the memory at m, whatever its strides.
inline void store(const Matrix& m, int64_t at, double value) {
  switch (m.dtype) {
    case DType::f64:
      static_cast<double*>(m.data)[at] = value;
      break;
    case DType::f32:
      static_cast<float*>(m.data)[at] = static_cast<float>(value);
      break;
    case DType::bf16:
      static_cast<uint16_t*>(m.data)[at] = narrow_bf16(static_cast<float>(value));
      break;
    default:
      static_cast<uint16_t*>(m.data)[at] = narrow_f16(static_cast<float>(value));
  }
}

inline double load(const Matrix& m, int64_t at) {
  switch (m.dtype) {
    case DType::f64:
      return static_cast<double*>(m.data)[at];
    case DType::f32:
      return static_cast<float*>(m.data)[at];
    case DType::bf16:
      return widen_bf16(static_cast<uint16_t*>(m.data)[at]);
    default:
      return widen_f16(static_cast<uint16_t*>(m.data)[at]);
  }
}

inline Room filled(Job& job, int64_t rows, int64_t cols, DType dtype, int64_t seed) {
  Room room(job, rows, cols, dtype);
  for (int64_t i = 0; i < rows * cols; i++) store(room.host(), i, number_at(i, seed));
  room.upload();
  return room;
}

}  // namespace gingham
