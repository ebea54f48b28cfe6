// Element types. Sums of 16-bit inputs are kept and travel in fp32 (accumulator()).
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/check.h"

namespace gingham {

enum class DType : int32_t { f32, f64, bf16, f16, bytes1, bytes2, bytes4, bytes8 };

inline size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::bytes8:
      return 8;
    case DType::f32:
    case DType::bytes4:
      return 4;
    case DType::bf16:
    case DType::f16:
    case DType::bytes2:
      return 2;
    case DType::bytes1:
      return 1;
  }
  return 0;
}

inline const char* name_of(DType dtype) {
  static const char* names[] = {"float32", "float64", "bfloat16", "float16", "bytes1", "bytes2", "bytes4", "bytes8"};
  return names[static_cast<int>(dtype)];
}

inline bool is_real(DType dtype) { return dtype <= DType::f16; }
inline DType accumulator(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// DISPATCH(dtype, T, { body }) runs body with T = float or double; 16-bit types are cast to fp32 before arithmetic.
#define DISPATCH(dtype, T, ...)                                                                                             \
  do {                                                                                                                      \
    if ((dtype) == ::gingham::DType::f32) {                                                                                 \
      using T = float;                                                                                                      \
      __VA_ARGS__;                                                                                                          \
    } else if ((dtype) == ::gingham::DType::f64) {                                                                          \
      using T = double;                                                                                                     \
      __VA_ARGS__;                                                                                                          \
    } else {                                                                                                                \
      throw ::gingham::ShapeError(::gingham::concat("dtype ", ::gingham::name_of(dtype), ", expected float32 or float64")); \
    }                                                                                                                       \
  } while (0)

}  // namespace gingham
