// exp in fp32 for x <= 0, 0 below -87: 2^n e^r with n = round(x / ln 2), e^r by its series to r^6 (|r| <= ln 2 / 2; error below 2 ulp).
// n is read off the low bits of x / ln 2 + 1.5 2^23; branch-free, so it vectorises. A NaN stays one.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace gingham {

inline float exp_of(float x) {
  const float shifted = x * 1.44269504f + 12582912.f;
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
  return x < -87.f ? 0.f : p * power;
}
inline double exp_of(double x) { return std::exp(x); }

}  // namespace gingham
