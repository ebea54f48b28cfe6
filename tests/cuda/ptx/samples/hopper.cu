// Hopper's instructions one at a time (sm_90a); tests/cuda/test_ptx_hopper.py compares them with numpy.
#include <cuda.h>

#include <cstdint>

#define KERNEL extern "C" __global__ void

__device__ uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

__device__ void init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ void expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ void await(uint32_t barrier, int parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
}

// The box at (x, y, z) to shared memory, word by word to `out` as it lies there, and to the same place of a second tensor.
KERNEL boxes(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, uint16_t* out, int count, int x, int y, int z) {
  extern __shared__ __align__(1024) uint16_t box[];
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) {
    init(shared_address(&barrier), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    expect(shared_address(&barrier), 2 * count);
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(box)),
        "l"(&from), "r"(x), "r"(y), "r"(z), "r"(shared_address(&barrier))
        : "memory");
  }
  await(shared_address(&barrier), 0);
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = box[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&to), "r"(x), "r"(y), "r"(z),
                 "r"(shared_address(box))
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

// Warps hand a number round through mbarriers: warp w waits for phase after phase of its own, adds, and wakes the next.
KERNEL relay(int* out, int rounds) {
  __shared__ uint64_t barriers[4];
  __shared__ int value;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < 4) init(shared_address(barriers + threadIdx.x), 32);
  if (threadIdx.x == 0) value = 0;
  __syncthreads();
  for (int round = 0; round < rounds; round++) {
    if (warp > 0 || round > 0) await(shared_address(barriers + warp), (warp ? round : round - 1) & 1);
    if (lane == 0) value = value * 2 + warp;
    __syncwarp();
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barriers + (warp + 1) % 4)) : "memory");
  }
  __syncthreads();
  if (threadIdx.x == 0) out[0] = value;
}

#define WGMMA(name, form, bits)                                                                                   \
  KERNEL name(const uint16_t* bytes, int count, uint64_t a, uint64_t b, float* out, int fence, int wait) {        \
    extern __shared__ __align__(1024) uint16_t memory[];                                                          \
    for (int i = threadIdx.x; i < count; i += blockDim.x) memory[i] = bytes[i];                                   \
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                                                  \
    __syncthreads();                                                                                              \
    const uint64_t base = shared_address(memory) >> 4;                                                            \
    float d[8];                                                                                                   \
    for (int i = 0; i < 8; i++) d[i] = 1.0f;                                                                      \
    for (int i = 0; i < 8; i++) asm volatile("" : "+f"(d[i])::"memory"); /* here, not behind the fence */         \
    if (fence) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");                                            \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\nwgmma.mma_async.sync.aligned." form                     \
                 " {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, -1" bits ";\n}"                                \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) \
                 : "l"(a + base), "l"(b + base));                                                                 \
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");                                                \
    if (wait) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");                                      \
    for (int i = 0; i < 8; i++) out[threadIdx.x * 8 + i] = d[i];                                                  \
  }

WGMMA(product_kk, "m64n16k16.f32.f16.f16", ", 0, 0")
WGMMA(product_mk, "m64n16k16.f32.f16.f16", ", 1, 0")
WGMMA(product_kn, "m64n16k16.f32.f16.f16", ", 0, 1")
WGMMA(product_mn, "m64n16k16.f32.f16.f16", ", 1, 1")
