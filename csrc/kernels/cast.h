// Copies between strided views of equal shape, converting where the dtypes differ (round to nearest even); same dtype: a plain copy, also
// used to pack panels. fill_zero writes zeros.
#pragma once
#include <vector>

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

// The rows of a matrix in its accumulator T: one that lies dense in that dtype is read and written in place, others pass through a buffer.
template <class T>
class Rows {
 public:
  Rows(const Matrix& m, const Stream& stream) : m_(m), stream_(stream), direct_(m.col_stride == 1 && size_of(m.dtype) == sizeof(T)) {
    if (!direct_) room_.resize(static_cast<size_t>(m.cols));
  }
  const T* read(int64_t i) {
    if (direct_) return at(i);
    load_row(m_, i, room_.data(), stream_);
    return room_.data();
  }
  // Where row i is to be written; written(i) puts it into the matrix.
  T* write(int64_t i) { return direct_ ? at(i) : room_.data(); }
  void written(int64_t i) {
    if (!direct_) store_row(room_.data(), m_, i, stream_);
  }

 private:
  T* at(int64_t i) const { return static_cast<T*>(m_.data) + i * m_.row_stride; }
  const Matrix& m_;
  const Stream& stream_;
  bool direct_;
  std::vector<T> room_;
};

float widen_bf16(uint16_t bits);
uint16_t narrow_bf16(float value);
float widen_f16(uint16_t bits);
uint16_t narrow_f16(float value);

}  // namespace gingham
