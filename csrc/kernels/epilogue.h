// What is applied to C before it is stored, once C is whole:  Z = C + bias,  Y = Z or gelu(Z) = Z/2 (1 + erf(Z / sqrt 2)); and the
// gradient dZ = dY gelu'(Z), gelu'(z) = Phi(z) + z phi(z) (Hendrycks & Gimpel 2016).
#pragma once
#include "base/matrix.h"
#include "base/stream.h"

namespace gingham {

enum class Epilogue { none, gelu };

// c in its accumulator; bias [1, cols] in z's dtype or empty; z and y in the layer's dtype (z may be c itself, y may be empty).
void epilogue(const Matrix& c, const Matrix& bias, const Matrix& z, const Matrix& y, Epilogue kind, const Stream& stream);
void gelu_backward(const Matrix& dy, const Matrix& z, const Matrix& dz, const Stream& stream);

namespace cuda {
void epilogue(const Matrix& c, const Matrix& bias, const Matrix& z, const Matrix& y, Epilogue kind, const Stream& stream);
void gelu_backward(const Matrix& dy, const Matrix& z, const Matrix& dz, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
