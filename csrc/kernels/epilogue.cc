#include "kernels/epilogue.h"

#include <cmath>
#include <vector>

#include "base/exponential.h"
#include "base/vectorise.h"
#include "kernels/cast.h"

namespace gingham {
namespace {

// erf in fp32 as x P(x^2) / Q(x^2) on [-4, 4] (the rational fit Eigen and XLA use; error below 4 ulp): branch-free, so it vectorises.
inline float erf_of(float x) {
  x = x < -4.f ? -4.f : (x > 4.f ? 4.f : x);
  const float t = x * x;
  float p = -2.72614225801306e-10f;
  p = p * t + 2.77068142495902e-08f;
  p = p * t + -2.10102402082508e-06f;
  p = p * t + -5.69250639462346e-05f;
  p = p * t + -7.34990630326855e-04f;
  p = p * t + -2.95459980854025e-03f;
  p = p * t + -1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * t + -2.13374055278905e-04f;
  q = q * t + -1.68282697438203e-03f;
  q = q * t + -7.37332916720468e-03f;
  q = q * t + -1.42647390514189e-02f;
  return x * p / q;
}

constexpr float kRootHalf = 0.70710678118654752440f, kRootTwoPi = 0.39894228040143267794f;

VECTORISED void gelu_row(float* z, size_t n) {
  for (size_t j = 0; j < n; j++) z[j] = 0.5f * z[j] * (1.f + erf_of(z[j] * kRootHalf));
}

void gelu_row(double* z, size_t n) {
  for (size_t j = 0; j < n; j++) z[j] = 0.5 * z[j] * (1.0 + std::erf(z[j] * 0.70710678118654752440));
}

VECTORISED void gelu_slope(const float* z, float* grad, size_t n) {
  for (size_t j = 0; j < n; j++) grad[j] *= 0.5f * (1.f + erf_of(z[j] * kRootHalf)) + z[j] * exp_of(-0.5f * z[j] * z[j]) * kRootTwoPi;
}

void gelu_slope(const double* z, double* grad, size_t n) {
  for (size_t j = 0; j < n; j++)
    grad[j] *= 0.5 * (1.0 + std::erf(z[j] * 0.70710678118654752440)) + z[j] * std::exp(-0.5 * z[j] * z[j]) * 0.39894228040143267794;
}

template <class T>
T logistic(T z) {
  return T(1) / (T(1) + std::exp(-z));
}

template <class T>
void silu_row(T* z, size_t n) {
  for (size_t j = 0; j < n; j++) z[j] *= logistic(z[j]);
}

template <class T>
void silu_slope(const T* z, T* grad, size_t n) {
  for (size_t j = 0; j < n; j++) {
    const T s = logistic(z[j]);
    grad[j] *= s + z[j] * s * (T(1) - s);
  }
}

template <class T>
void activate(Epilogue kind, T* z, size_t n) {
  if (kind == Epilogue::gelu) gelu_row(z, n);
  if (kind == Epilogue::silu) silu_row(z, n);
}

template <class T>
void multiply_slope(Epilogue kind, const T* z, T* grad, size_t n) {
  if (kind == Epilogue::gelu) gelu_slope(z, grad, n);
  if (kind == Epilogue::silu) silu_slope(z, grad, n);
}

}  // namespace

void epilogue(const Matrix& c, const Matrix& bias, const Matrix& z, const Matrix& y, Epilogue kind, const Stream& stream) {
  Tail tail;
  tail.bias = bias;
  tail.kind = kind;
  if (!bias.empty() || c.data != z.data) tail.z = z;
  if (kind != Epilogue::none) tail.y = y;
  epilogue(c, tail, stream);
}

void epilogue(const Matrix& c, const Tail& tail, const Stream& stream) {
  DISPATCH_DEVICE(stream, epilogue(c, tail, stream));
  if (c.empty() || tail.empty()) return;
  DISPATCH(c.dtype, T, {
    const size_t n = static_cast<size_t>(c.cols);
    std::vector<T> row(n), other(n), shift(tail.bias.empty() ? 0 : n);
    const bool bias = !tail.bias.empty(), residual = !tail.residual.empty(), gradient = !tail.slope_at.empty();
    if (bias) load_row(tail.bias, 0, shift.data(), stream);
    for (int64_t i = 0; i < c.rows; i++) {
      load_row(c, i, row.data(), stream);
      if (bias)
        for (size_t j = 0; j < n; j++) row[j] += shift[j];
      if (!tail.z.empty()) store_row(row.data(), tail.z, i, stream);
      if (tail.y.empty()) continue;
      if (gradient) {
        load_row(tail.slope_at, i, other.data(), stream);
        multiply_slope(tail.kind, other.data(), row.data(), n);
      } else {
        activate(tail.kind, row.data(), n);
      }
      if (residual) {
        load_row(tail.residual, i, other.data(), stream);
        for (size_t j = 0; j < n; j++) row[j] += other[j];
      }
      store_row(row.data(), tail.y, i, stream);
    }
  });
}

void activation_backward(const Matrix& dy, const Matrix& z, const Matrix& dz, Epilogue kind, const Stream& stream) {
  DISPATCH_DEVICE(stream, activation_backward(dy, z, dz, kind, stream));
  DISPATCH(accumulator(z.dtype), T, {
    const size_t n = static_cast<size_t>(z.cols);
    std::vector<T> row(n), grad(n);
    for (int64_t i = 0; i < z.rows; i++) {
      load_row(z, i, row.data(), stream);
      load_row(dy, i, grad.data(), stream);
      multiply_slope(kind, row.data(), grad.data(), n);
      store_row(grad.data(), dz, i, stream);
    }
  });
}

}  // namespace gingham
