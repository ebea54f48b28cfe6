// The wrappers of kernels/device.cuh in reference semantics: what the PTX manual says each instruction does, for all 32 lanes at once.
#pragma once
#include <cmath>
#include <cstring>

#include "shim.h"

namespace gingham::cuda {

inline char* shared_memory() { return shim::block_memory(); }

template <class V>
inline V shared_load(const V* at) {
  shim::touch(at, sizeof(V), shim::Access::load);
  return *at;
}

template <class V>
inline void shared_store(V* at, V value) {
  shim::touch(at, sizeof(V), shim::Access::store);
  *at = value;
}

inline void block_barrier() { shim::meet_block(); }
inline void warp_barrier() { shim::meet_warp_memory(); }

template <class V>
struct Shuffle {
  V value;
  int mask;
};

template <class V>
inline V shuffle_xor(V value, int mask) {
  const Shuffle<V> in{value, mask};
  V out;
  shim::meet_warp(
      [](shim::Lane(&lanes)[32]) {
        for (int l = 0; l < 32; l++) {
          const int from = l ^ static_cast<const Shuffle<V>*>(lanes[l].in)->mask;
          *static_cast<V*>(lanes[l].out) = static_cast<const Shuffle<V>*>(lanes[from & 31].in)->value;
        }
      },
      "shfl.sync", &in, &out);
  return out;
}

template <int bytes>
inline void cp_async(void* shared, const void* global, int valid) {
  shim::issue_copy(shared, global, bytes, valid);
}
inline void cp_async_commit() { shim::commit_copies(); }
template <int pending>
inline void cp_async_wait() {
  shim::wait_copies(pending);
}

using Fragment = uint32_t[4];

template <bool transposed>
inline void load_matrices(shim::Lane (&lanes)[32]) {
  for (int i = 0; i < 4; i++) {
    uint16_t matrix[8][8];
    const void* rows[8];
    for (int r = 0; r < 8; r++) {
      rows[r] = lanes[8 * i + r].in;
      memcpy(matrix[r], rows[r], 16);
    }
    shim::count_matrix_phase(rows);
    for (int l = 0; l < 32; l++) {
      const int r = l / 4, c = l % 4 * 2;
      const uint32_t low = transposed ? matrix[c][r] : matrix[r][c], high = transposed ? matrix[c + 1][r] : matrix[r][c + 1];
      static_cast<uint32_t*>(lanes[l].out)[i] = low | high << 16;
    }
  }
}

inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  shim::touch(row, 16, shim::Access::matrix);
  shim::meet_warp(load_matrices<false>, "ldmatrix", row, out);
}

inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
  shim::touch(row, 16, shim::Access::matrix);
  shim::meet_warp(load_matrices<true>, "ldmatrix.trans", row, out);
}

inline void store_words(uint4* to, uint4 v) { *to = v; }
inline void store_words(uint2* to, uint2 v) { *to = v; }

inline float exp2_near(float x) { return x < -126.f ? 0.f : exp2f(x); }

inline float widen(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

inline float widen(F16 x) {
  _Float16 half;
  memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
}

inline void narrow(float x, Bf16& out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  out.bits = static_cast<uint16_t>(x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline void narrow(float x, F16& out) {
  const _Float16 half = static_cast<_Float16>(x);
  memcpy(&out.bits, &half, 2);
}

struct Product {
  float c[4];
  uint32_t a[4], b[2];
};

// C (16x8) += A (16 x K) B (K x 8), added in fp32 in the order of k.
template <int K>
inline void add_product(shim::Lane (&lanes)[32], const float (&a)[16][K], const float (&b)[K][8]) {
  for (int l = 0; l < 32; l++) {
    const float* c = static_cast<const Product*>(lanes[l].in)->c;
    float* out = static_cast<float*>(lanes[l].out);
    const int g = l / 4, t = l % 4;
    for (int e = 0; e < 4; e++) {
      float sum = c[e];
      for (int k = 0; k < K; k++) sum += a[g + (e / 2) * 8][k] * b[k][2 * t + e % 2];
      out[e] = sum;
    }
  }
}

template <class T>
inline void multiply_16bit(shim::Lane (&lanes)[32]) {
  float a[16][16], b[16][8];
  const auto half = [](uint32_t word, int which) { return widen(T{static_cast<uint16_t>(word >> (16 * which))}); };
  for (int l = 0; l < 32; l++) {
    const Product& p = *static_cast<const Product*>(lanes[l].in);
    const int g = l / 4, t = l % 4;
    for (int e = 0; e < 2; e++) {
      for (int r = 0; r < 4; r++) a[g + r % 2 * 8][2 * t + e + r / 2 * 8] = half(p.a[r], e);
      for (int r = 0; r < 2; r++) b[2 * t + e + r * 8][g] = half(p.b[r], e);
    }
  }
  add_product<16>(lanes, a, b);
}

inline void multiply_tf32(shim::Lane (&lanes)[32]) {
  float a[16][8], b[8][8];
  const auto cut = [](uint32_t word) {
    word &= 0xffffe000u;
    float out;
    memcpy(&out, &word, 4);
    return out;
  };
  for (int l = 0; l < 32; l++) {
    const Product& p = *static_cast<const Product*>(lanes[l].in);
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; r++) a[g + r % 2 * 8][t + r / 2 * 4] = cut(p.a[r]);
    for (int r = 0; r < 2; r++) b[t + r * 4][g] = cut(p.b[r]);
  }
  add_product<8>(lanes, a, b);
}

template <class T>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  const Product in{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  shim::meet_warp(multiply_16bit<T>, "mma.m16n8k16", &in, c);
}

inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Product in{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  shim::meet_warp(multiply_tf32, "mma.m16n8k8.tf32", &in, c);
}

inline uint32_t to_tf32(uint32_t fp32) { return (fp32 & 0x7f800000u) == 0x7f800000u ? fp32 : (fp32 + 0x1000u) & 0xffffe000u; }

}  // namespace gingham::cuda
