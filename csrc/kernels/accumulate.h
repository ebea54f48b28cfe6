// Sums over strided views of equal shape (fp32, fp64): accumulate is b += a; accumulate_into is out = a + b, a ring's step when the partial
// sum that came in (a) and the rank's own share (b) go out in one buffer: 3 passes over memory instead of the 5 of a copy and a sum. out may be in 16
// bits where a and b are fp32: the sum, rounded once.
// column_sums: out[j] (+)= sum over rows i of a[i][j], in the accumulator of a; where nothing is added to, it may be rounded to a's own dtype.
#pragma once
#include "base/matrix.h"
#include "base/stream.h"

namespace gingham {

void accumulate(const Matrix& a, const Matrix& b, const Stream& stream);
void accumulate_into(const Matrix& a, const Matrix& b, const Matrix& out, const Stream& stream);
// out: a [1, cols] matrix in accumulator(a.dtype), or without add in a.dtype.
void column_sums(const Matrix& a, const Matrix& out, bool add, const Stream& stream);

// Whether sums in `wide` may be stored as `out`.
inline bool rounds_to(DType wide, DType out) { return out == wide || (accumulator(out) == wide && size_of(out) == 2); }

namespace cuda {
void accumulate(const Matrix& a, const Matrix& b, const Stream& stream);
void accumulate_into(const Matrix& a, const Matrix& b, const Matrix& out, const Stream& stream);
void column_sums(const Matrix& a, const Matrix& out, bool add, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
