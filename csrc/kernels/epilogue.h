// What is applied to C before it is stored, once C is whole:
//   Z = C + bias,  Y = act(Z) + residual,  act = identity, gelu(z) = z/2 (1 + erf(z / sqrt 2)) or silu(z) = z / (1 + exp -z)
// and the gradient dZ = dY act'(Z): gelu'(z) = Phi(z) + z phi(z) (Hendrycks & Gimpel 2016), silu'(z) = s + z s (1 - s), s = 1 / (1 + exp -z).
#pragma once
#include "base/matrix.h"
#include "base/stream.h"

namespace gingham {

enum class Epilogue { none, gelu, silu };

// All in the layer's dtype, [M, N] but bias [1, N]; what is empty is left out. With slope_at, a gradient: Y = C act'(slope_at).
struct Tail {
  Matrix bias, residual, slope_at;
  Epilogue kind = Epilogue::none;
  Matrix z, y;            // written
  bool keeps_sum = true;  // false: whoever stores z and y need not store C as well

  bool empty() const { return z.empty() && y.empty(); }
  DType dtype() const { return z.empty() ? y.dtype : z.dtype; }
};

// c in its accumulator; bias [1, cols] in z's dtype or empty; z and y in the layer's dtype (z may be c itself, y may be empty).
void epilogue(const Matrix& c, const Matrix& bias, const Matrix& z, const Matrix& y, Epilogue kind, const Stream& stream);
void epilogue(const Matrix& c, const Tail& tail, const Stream& stream);
void activation_backward(const Matrix& dy, const Matrix& z, const Matrix& dz, Epilogue kind, const Stream& stream);
inline void gelu_backward(const Matrix& dy, const Matrix& z, const Matrix& dz, const Stream& stream) {
  activation_backward(dy, z, dz, Epilogue::gelu, stream);
}

namespace cuda {
void epilogue(const Matrix& c, const Tail& tail, const Stream& stream);
void activation_backward(const Matrix& dy, const Matrix& z, const Matrix& dz, Epilogue kind, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
