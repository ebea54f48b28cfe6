// act(z) and act'(z) of epilogue.h on the device, for the epilogue kernel and the tail of gemm.
#pragma once
#include "kernels/element.cuh"
#include "kernels/epilogue.h"

namespace gingham::cuda {

__device__ inline float erf_of(float x) { return erff(x); }
__device__ inline double erf_of(double x) { return erf(x); }
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }

template <class T>
__device__ inline T activate(Epilogue kind, T z) {
  if (kind == Epilogue::gelu) return T(0.5) * z * (T(1) + erf_of(z * T(0.70710678118654752440)));
  if (kind == Epilogue::silu) return z / (T(1) + exp_of(-z));
  return z;
}

template <class T>
__device__ inline T slope(Epilogue kind, T z) {
  if (kind == Epilogue::gelu)
    return T(0.5) * (T(1) + erf_of(z * T(0.70710678118654752440))) + z * exp_of(T(-0.5) * z * z) * T(0.39894228040143267794);
  if (kind == Epilogue::silu) {
    const T s = T(1) / (T(1) + exp_of(-z));
    return s + z * s * (T(1) - s);
  }
  return T(1);
}

}  // namespace gingham::cuda
