// Copies between strided views of equal shape, converting where the dtypes differ (round to nearest even); same dtype: a plain copy, also
// used to pack panels. fill_zero writes zeros.
#pragma once
#include "base/matrix.h"
#include "base/stream.h"

namespace gingham {

void cast(const Matrix& from, const Matrix& to, const Stream& stream);
void fill_zero(const Matrix& m, const Stream& stream);

namespace cuda {
void cast(const Matrix& from, const Matrix& to, const Stream& stream);
void fill_zero(const Matrix& m, const Stream& stream);
}  // namespace cuda

float widen_bf16(uint16_t bits);
uint16_t narrow_bf16(float value);
float widen_f16(uint16_t bits);
uint16_t narrow_f16(float value);

}  // namespace gingham
