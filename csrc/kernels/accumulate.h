// b += a elementwise over strided views of equal shape (fp32, fp64), and out[j] (+)= sum over rows i of a[i][j], in the accumulator of a.
#pragma once
#include "base/matrix.h"
#include "base/stream.h"

namespace gingham {

void accumulate(const Matrix& a, const Matrix& b, const Stream& stream);
// out: a [1, cols] matrix in accumulator(a.dtype).
void column_sums(const Matrix& a, const Matrix& out, bool add, const Stream& stream);

namespace cuda {
void accumulate(const Matrix& a, const Matrix& b, const Stream& stream);
void column_sums(const Matrix& a, const Matrix& out, bool add, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
