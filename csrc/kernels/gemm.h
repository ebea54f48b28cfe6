// C = beta C + A B, with A [M, K], B [K, N], C [M, N] given as strided views (either stride 1), beta 0 or 1. A and B of one dtype; C in
// its accumulator (fp32 for 16-bit inputs, which are widened panel by panel: products of bf16 are exact in fp32, and on CPUs without AMX
// sgemm on widened panels is faster than the 16-bit entry points; one fixed choice keeps runs bitwise repeatable).
#pragma once
#include "base/matrix.h"
#include "base/stream.h"
#include "kernels/epilogue.h"

namespace gingham {

void gemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Stream& stream);
// The same with the tail of epilogue.h applied to C as it is stored; c may be left out (empty) when only the tail's outputs are wanted. Where
// the tail keeps no sum and adds to none, C is not touched; what it holds after an addition whose sum is not kept is not said.
void gemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Tail& tail, const Stream& stream);
void check_gemm(const Matrix& a, const Matrix& b, const Matrix& c, const Tail& tail);

namespace cuda {
void gemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Stream& stream);
void gemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Tail& tail, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
