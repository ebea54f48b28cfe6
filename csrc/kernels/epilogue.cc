#include "kernels/epilogue.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>
#include <vector>

#include "base/vectorise.h"
#include "kernels/cast.h"

namespace gingham {
namespace {

// An odd function of z in fp32 that has reached +-1/2 at +-top: z P(2 z^2 / top^2 - 1), P least squares at Chebyshev points, highest power
// first. Neither a division nor a branch, so it vectorises.
template <size_t... I>
inline float odd_of(float z, float top, const float (&powers)[sizeof...(I) + 1], std::index_sequence<I...>) {
  const float u = z * z * (2.f / (top * top)) - 1.f;
  float p = powers[0];
  ((p = p * u + powers[I + 1]), ...);
  const float value = z * p;
  return z > top ? 0.5f : (z < -top ? -0.5f : value);
}

// Phi(z) - 1/2 = erf(z / sqrt 2) / 2, to 8e-8.
constexpr float kPhiTop = 5.3f;
constexpr float kPhi[] = {-1.140996784e-04f, 3.300695451e-04f, -3.603353957e-04f, 5.815379954e-04f, -1.666995226e-03f, 3.325504206e-03f,
                          -5.440169693e-03f, 8.709376234e-03f, -1.334202184e-02f, 1.896353156e-02f, -2.526770927e-02f, 3.207388173e-02f,
                          -3.959155313e-02f, 4.926447549e-02f, -6.651844120e-02f, 1.333925598e-01f};
// gelu'(z) - 1/2 = Phi(z) - 1/2 + z phi(z), to 2e-7.
constexpr float kSlopeTop = 5.8f;
constexpr float kSlope[] = {1.275905696e-03f,  -3.434547648e-03f, 1.853563734e-03f,  -9.126192526e-04f, 1.015653681e-02f,
                            -2.117458450e-02f, 2.555656213e-02f,  -3.369997942e-02f, 4.899212915e-02f,  -6.170333226e-02f,
                            6.804037082e-02f,  -6.929094370e-02f, 6.540332423e-02f,  -5.777188018e-02f, 5.013159336e-02f,
                            -4.619338143e-02f, 4.863696944e-02f,  -6.165753940e-02f, 1.219987691e-01f};

VECTORISED void gelu_row(const float* z, float* y, size_t n) {
  for (size_t j = 0; j < n; j++) y[j] = z[j] * (0.5f + odd_of(z[j], kPhiTop, kPhi, std::make_index_sequence<std::size(kPhi) - 1>()));
}

void gelu_row(const double* z, double* y, size_t n) {
  for (size_t j = 0; j < n; j++) y[j] = 0.5 * z[j] * (1.0 + std::erf(z[j] * 0.70710678118654752440));
}

VECTORISED void gelu_slope(const float* z, const float* dy, float* dz, size_t n) {
  for (size_t j = 0; j < n; j++) dz[j] = dy[j] * (0.5f + odd_of(z[j], kSlopeTop, kSlope, std::make_index_sequence<std::size(kSlope) - 1>()));
}

void gelu_slope(const double* z, const double* dy, double* dz, size_t n) {
  for (size_t j = 0; j < n; j++)
    dz[j] = dy[j] * (0.5 * (1.0 + std::erf(z[j] * 0.70710678118654752440)) + z[j] * std::exp(-0.5 * z[j] * z[j]) * 0.39894228040143267794);
}

template <class T>
T logistic(T z) {
  return T(1) / (T(1) + std::exp(-z));
}

template <class T>
void silu_row(const T* z, T* y, size_t n) {
  for (size_t j = 0; j < n; j++) y[j] = z[j] * logistic(z[j]);
}

template <class T>
void silu_slope(const T* z, const T* dy, T* dz, size_t n) {
  for (size_t j = 0; j < n; j++) {
    const T s = logistic(z[j]);
    dz[j] = dy[j] * (s + z[j] * s * (T(1) - s));
  }
}

template <class T>
void activate(Epilogue kind, const T* z, T* y, size_t n) {
  if (kind == Epilogue::gelu) return gelu_row(z, y, n);
  if (kind == Epilogue::silu) return silu_row(z, y, n);
  if (y != z) std::copy(z, z + n, y);
}

template <class T>
void multiply_slope(Epilogue kind, const T* z, const T* dy, T* dz, size_t n) {
  if (kind == Epilogue::gelu) return gelu_slope(z, dy, dz, n);
  if (kind == Epilogue::silu) return silu_slope(z, dy, dz, n);
  if (dz != dy) std::copy(dy, dy + n, dz);
}

template <class T>
VECTORISED void add(const T* a, const T* b, T* sum, size_t n) {
  for (size_t j = 0; j < n; j++) sum[j] = a[j] + b[j];
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
    const bool bias = !tail.bias.empty(), residual = !tail.residual.empty(), gradient = !tail.slope_at.empty();
    std::vector<T> shift(bias ? n : 0), room(n);
    if (bias) load_row(tail.bias, 0, shift.data(), stream);
    Rows<T> in(c, stream), sum(tail.z, stream), out(tail.y, stream), slope_at(tail.slope_at, stream), more(tail.residual, stream);
    for (int64_t i = 0; i < c.rows; i++) {
      const T* row = in.read(i);
      if (bias || !tail.z.empty()) {
        T* shifted = tail.z.empty() ? room.data() : sum.write(i);
        if (bias)
          add(row, shift.data(), shifted, n);
        else if (shifted != row)
          std::copy(row, row + n, shifted);
        if (!tail.z.empty()) sum.written(i);
        row = shifted;
      }
      if (tail.y.empty()) continue;
      T* y = out.write(i);
      if (gradient)
        multiply_slope(tail.kind, slope_at.read(i), row, y, n);
      else
        activate(tail.kind, row, y, n);
      if (residual) add(y, more.read(i), y, n);
      out.written(i);
    }
  });
}

void activation_backward(const Matrix& dy, const Matrix& z, const Matrix& dz, Epilogue kind, const Stream& stream) {
  DISPATCH_DEVICE(stream, activation_backward(dy, z, dz, kind, stream));
  DISPATCH(accumulator(z.dtype), T, {
    Rows<T> at(z, stream), grad(dy, stream), out(dz, stream);
    for (int64_t i = 0; i < z.rows; i++) {
      multiply_slope(kind, at.read(i), grad.read(i), out.write(i), static_cast<size_t>(z.cols));
      out.written(i);
    }
  });
}

}  // namespace gingham
