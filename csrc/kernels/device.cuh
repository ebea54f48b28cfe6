// The hardware as the kernels see it: every instruction that C++ has no word for is reached through a function here. nvcc compiles the
// inline PTX below (sm_80 and later); under GINGHAM_SHIM the same names come from the host shim (tests/cuda/shim), which runs the kernels
// on a CPU, one fiber per thread, and checks what hardware leaves unchecked.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace gingham::cuda {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

}  // namespace gingham::cuda

#ifdef GINGHAM_SHIM
#include "shim_device.h"
#else

namespace gingham::cuda {

// Dynamic shared memory is the only kind used.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

template <class V>
__device__ inline V shared_load(const V* at) {
  return *at;
}

template <class V>
__device__ inline void shared_store(V* at, V value) {
  *at = value;
}

__device__ inline void block_barrier() { __syncthreads(); }
__device__ inline void warp_barrier() { __syncwarp(); }

template <class V>
__device__ inline V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ inline uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// Copies `bytes` (4, 8 or 16) from global to shared memory behind the thread's back: the first `valid` bytes are read, the rest are zeros.
// Both addresses are multiples of `bytes`. The data may be read after cp_async_wait and a barrier.
template <int bytes>
__device__ inline void cp_async(void* shared, const void* global, int valid) {
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(bytes), "r"(valid) : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's committed groups are under way.
template <int pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lanes 8i .. 8i+7 give the addresses of the rows of matrix i (16 bytes each), and lane l receives
// in out[i] the elements 2 (l % 4) and + 1 of row l / 4; _trans hands out the matrices transposed.
__device__ inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b over the warp, with g = lane / 4 and t = lane % 4: c holds (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1) of a 16x8 matrix.
// 16-bit: a is 16x16, registers (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..); b is 16x8, registers (2t.., g), (2t+8.., g).
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// tf32: a is 16x8, registers (g, t), (g+8, t), (g, t+4), (g+8, t+4); b is 8x8, registers (t, g), (t+4, g). Operands from to_tf32: the
// hardware cuts the low 13 bits off.
__device__ inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds to tf32 (10 bits of mantissa), ties away from zero.
__device__ inline uint32_t to_tf32(uint32_t fp32) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "r"(fp32));
  return out;
}

// One store of 16 or 8 bytes to global memory, which the compiler may neither take apart nor merge with others.
__device__ inline void store_words(uint4* to, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ inline void store_words(uint2* to, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(v.x), "r"(v.y) : "memory");
}

// 2^x to 2 units of its last place; what is smaller than a normal number is 0.
__device__ inline float exp2_near(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

__device__ inline float widen(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

__device__ inline float widen(F16 x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
}

__device__ inline void narrow(float x, Bf16& out) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x)); }
__device__ inline void narrow(float x, F16& out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x)); }

}  // namespace gingham::cuda
#endif
