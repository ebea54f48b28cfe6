// 8-bit codes for what travels or is kept: every block of 128 consecutive elements of a row shares one fp32 scale,
//   scale = max |x| / top,  code = round(x top / max |x|),  x ~ code scale,   top = 127 for int8, 448 for e4m3 (4 bits of exponent, 3 of mantissa)
// rounding to nearest even, the same bits on every device. A block of zeros has scale 0; a block with a NaN or infinity comes back as NaNs.
// Largest error: int8 scale / 2 (0.4 % of the block's largest), e4m3 1/16 of the element.
//   x = (0.5, -2, 1): max 2, int8 codes 32, -127, 64, scale 2/127, back 0.504, -2, 1.008
#pragma once
#include <cmath>

#include "base/matrix.h"
#include "base/stream.h"

#ifdef __CUDACC__
#define ON_BOTH __host__ __device__
#else
#define ON_BOTH
#endif

namespace gingham {

enum class Code { int8, e4m3 };
constexpr int64_t kQuantiseBlock = 128;

// x [rows, cols] of 16 or 32 bits; codes [rows, cols] bytes1; scales [rows, ceil(cols / 128)] float32.
void quantise(const Matrix& x, const Matrix& codes, const Matrix& scales, Code code, const Stream& stream);
void dequantise(const Matrix& codes, const Matrix& scales, const Matrix& x, Code code, const Stream& stream);
void check_quantise(const Matrix& x, const Matrix& codes, const Matrix& scales);

ON_BOTH inline float top_of(Code code) { return code == Code::int8 ? 127.f : 448.f; }

// v is at most top_of(code) but for rounding; a NaN becomes 0 (its block's scale is not finite).
ON_BOTH inline uint8_t encode(Code code, float v) {
  if (v != v) return 0;
  if (code == Code::int8) return static_cast<uint8_t>(static_cast<int8_t>(rintf(v < -127.f ? -127.f : (v > 127.f ? 127.f : v))));
  const uint32_t bits = __builtin_bit_cast(uint32_t, v), sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  const float magnitude = __builtin_bit_cast(float, size);
  if (magnitude >= 448.f) return static_cast<uint8_t>(sign | 0x7eu);
  // Below 2^-6 codes count steps of 2^-9; else the top bits of fp32, the exponent's bias changed from 127 to 7.
  if (magnitude < 0.015625f) return static_cast<uint8_t>(sign | static_cast<uint32_t>(rintf(magnitude * 512.f)));
  return static_cast<uint8_t>(sign | (((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3)));
}

ON_BOTH inline float decode(Code code, uint8_t bits) {
  if (code == Code::int8) return static_cast<float>(static_cast<int8_t>(bits));
  const uint32_t exponent = bits >> 3 & 15u, mantissa = bits & 7u;
  const float size =
      exponent == 0 ? static_cast<float>(mantissa) * 0.001953125f : __builtin_bit_cast(float, (exponent + 120u) << 23 | mantissa << 20);
  return bits & 0x80u ? -size : size;
}

namespace cuda {
void quantise(const Matrix& x, const Matrix& codes, const Matrix& scales, Code code, const Stream& stream);
void dequantise(const Matrix& codes, const Matrix& scales, const Matrix& x, Code code, const Stream& stream);
}  // namespace cuda

}  // namespace gingham

#undef ON_BOTH
