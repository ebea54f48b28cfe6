// Philox4x32-10 (dropout.h): the four words of one counter, and of one call.
#pragma once
#include "kernels/device.cuh"

namespace gingham::cuda {

struct Counter {
  uint32_t at[4];
};

__device__ inline Counter philox(uint64_t n, uint64_t call, uint32_t k0, uint32_t k1) {
  uint32_t c0 = static_cast<uint32_t>(n), c1 = static_cast<uint32_t>(n >> 32), c2 = static_cast<uint32_t>(call),
           c3 = static_cast<uint32_t>(call >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// The keys of the ten rounds, made once for a launch: the rounds then take them from the constant bank, where they cost no instruction.
struct RoundKeys {
  uint32_t k0[10], k1[10];

  RoundKeys(uint32_t first, uint32_t second) {
    for (uint32_t round = 0; round < 10; round++) {
      k0[round] = first + round * 0x9E3779B9;
      k1[round] = second + round * 0xBB67AE85;
    }
  }
};

__device__ inline Counter philox(uint64_t n, uint64_t call, const RoundKeys& keys) {
  uint32_t c0 = static_cast<uint32_t>(n), c1 = static_cast<uint32_t>(n >> 32), c2 = static_cast<uint32_t>(call),
           c3 = static_cast<uint32_t>(call >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ keys.k0[round];
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ keys.k1[round];
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
  }
  return {{c0, c1, c2, c3}};
}

// By a number that is known at run time only; words.at[k] would put them into memory.
__device__ inline uint32_t word_of(const Counter& words, int k) {
  return k < 2 ? (k == 0 ? words.at[0] : words.at[1]) : (k == 2 ? words.at[2] : words.at[3]);
}

}  // namespace gingham::cuda
