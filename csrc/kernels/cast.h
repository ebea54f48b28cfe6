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

// One row in T, the accumulator of m, whatever its storage.
template <class T>
void load_row(const Matrix& m, int64_t i, T* row, const Stream& stream) {
  cast(m.slice(0, i, i + 1), dense(row, 1, m.cols, accumulator(m.dtype)), stream);
}

template <class T>
void store_row(const T* row, const Matrix& m, int64_t i, const Stream& stream) {
  cast(dense(const_cast<T*>(row), 1, m.cols, accumulator(m.dtype)), m.slice(0, i, i + 1), stream);
}

float widen_bf16(uint16_t bits);
uint16_t narrow_bf16(float value);
float widen_f16(uint16_t bits);
uint16_t narrow_f16(float value);

}  // namespace gingham
