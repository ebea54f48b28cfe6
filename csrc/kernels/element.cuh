// Elements in kernels: 16-bit types are widened to fp32 for arithmetic; Pack<T, W> is W elements that travel in 16-byte loads and stores.
#pragma once
#include <type_traits>

#include "base/dtype.h"
#include "kernels/device.cuh"

namespace gingham::cuda {

template <class T>
struct Tag {
  using type = T;
};

// fn(Tag<T>) with the element type of a real dtype.
template <class Fn>
void with_real(DType dtype, const char* what, Fn fn) {
  switch (dtype) {
    case DType::f32:
      return fn(Tag<float>{});
    case DType::f64:
      return fn(Tag<double>{});
    case DType::bf16:
      return fn(Tag<Bf16>{});
    case DType::f16:
      return fn(Tag<F16>{});
    default:
      throw ShapeError(concat(what, " of ", name_of(dtype)));
  }
}

template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(double x, double& out) { out = x; }

template <class To, class From>
__device__ inline To bits_as(From from) {
  return __builtin_bit_cast(To, from);
}

// Storage of Pack<T, W>: one load of at most 16 bytes, or several of 16.
template <size_t bytes>
struct Words {
  uint4 at[bytes / 16];
};
template <>
struct Words<8> {
  uint2 at;
};
template <>
struct Words<4> {
  uint32_t at;
};
template <>
struct Words<2> {
  uint16_t at;
};
template <>
struct Words<1> {
  uint8_t at;
};

template <class T, int W>
struct Pack {
  T at[W];
};

// All of a pack for arithmetic. bf16 by pairs: a shift and a mask for two, where one by one takes three instructions.
template <class T, int W>
__device__ inline Pack<Wide<T>, W> widened(const Pack<T, W>& in) {
  Pack<Wide<T>, W> out;
  if constexpr (std::is_same_v<T, Bf16> && W % 2 == 0) {
    const auto words = bits_as<Pack<uint32_t, W / 2>>(in);
#pragma unroll
    for (int k = 0; k < W / 2; k++) {
      out.at[2 * k] = bits_as<float>(words.at[k] << 16);
      out.at[2 * k + 1] = bits_as<float>(words.at[k] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int k = 0; k < W; k++) out.at[k] = widen(in.at[k]);
  }
  return out;
}

template <int W, class T>
__device__ inline Pack<T, W> load_pack(const T* from) {
  using Storage = Words<sizeof(T) * W>;
  Storage words;
  if constexpr (sizeof(Storage) >= 16) {
#pragma unroll
    for (size_t i = 0; i < sizeof(Storage) / 16; i++) words.at[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
    words = *reinterpret_cast<const Storage*>(from);
  }
  return bits_as<Pack<T, W>>(words);
}

template <int W, class T>
__device__ inline void store_pack(T* to, const Pack<T, W>& pack) {
  using Storage = Words<sizeof(T) * W>;
  const Storage words = bits_as<Storage>(pack);
  if constexpr (sizeof(Storage) >= 16) {
#pragma unroll
    for (size_t i = 0; i < sizeof(Storage) / 16; i++) store_words(reinterpret_cast<uint4*>(to) + i, words.at[i]);
  } else if constexpr (sizeof(Storage) == 8) {
    if constexpr (W > 1)
      store_words(reinterpret_cast<uint2*>(to), words.at);
    else
      *to = pack.at[0];
  } else {
    *reinterpret_cast<Storage*>(to) = words;
  }
}

}  // namespace gingham::cuda
