// What threads do together, and what the interpreter must refuse; tests/cuda/test_ptx_opcodes.py runs them.
#include <cstdint>

#define THREAD (blockIdx.x * blockDim.x + threadIdx.x)
#define KERNEL extern "C" __global__ void

KERNEL shuffles(const int* in, int* out) {
  const int i = THREAD, x = in[i];
  int* to = out + 8 * i;
  to[0] = __shfl_xor_sync(0xffffffffu, x, 5);
  to[1] = __shfl_up_sync(0xffffffffu, x, 3);
  to[2] = __shfl_down_sync(0xffffffffu, x, 2, 8);
  to[3] = __shfl_sync(0xffffffffu, x, 17);
  to[4] = static_cast<int>(__ballot_sync(0xffffffffu, x > 0));
  to[5] = __any_sync(0xffffffffu, x > 90) * 2 + __all_sync(0xffffffffu, x > -200);
  to[6] = __reduce_add_sync(0xffffffffu, x);
  to[7] = static_cast<int>(__match_any_sync(0xffffffffu, x % 4));
}

// Lanes part, loop for different times and come together again.
KERNEL diverging(const int* in, int* out) {
  const int i = THREAD;
  int steps = 0;
  for (unsigned x = in[i]; x != 1; x = x % 2 ? 3 * x + 1 : x / 2) steps++;
  if (threadIdx.x % 3 == 0)
    steps += 1000;
  else if (threadIdx.x % 3 == 1)
    steps += 2000;
  __syncwarp();
  out[i] = __reduce_max_sync(0xffffffffu, steps);
}

KERNEL histogram(const int* in, int* bins, float* sum, int n) {
  __shared__ int own[16];
  if (threadIdx.x < 16) own[threadIdx.x] = 0;
  __syncthreads();
  if (THREAD < n) atomicAdd(own + (in[THREAD] & 15), 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(bins + threadIdx.x, own[threadIdx.x]);
  if (threadIdx.x == 0) atomicAdd(sum, 0.5f);
  if (threadIdx.x == 1) atomicMax(bins + 16, static_cast<int>(blockIdx.x));
  if (threadIdx.x == 2) atomicCAS(bins + 17, 0, static_cast<int>(blockIdx.x) + 1);
}

// Named barriers: the second half of the block makes what the first half reads.
KERNEL handed_over(const float* in, float* out) {
  extern __shared__ float line[];
  const int half = blockDim.x / 2;
  if (static_cast<int>(threadIdx.x) >= half) {
    line[threadIdx.x - half] = 2.0f * in[THREAD];
    asm volatile("bar.arrive 1, %0;" ::"r"(blockDim.x) : "memory");
  } else {
    asm volatile("bar.sync 1, %0;" ::"r"(blockDim.x) : "memory");
    out[blockIdx.x * half + threadIdx.x] = line[half - 1 - threadIdx.x];
  }
}

KERNEL reversed(float* x, int barrier) {
  __shared__ float line[128];
  line[threadIdx.x] = x[THREAD];
  if (barrier) __syncthreads();
  x[THREAD] = line[127 - threadIdx.x];
}

KERNEL unwritten(float* out) {
  __shared__ float line[64];
  if (threadIdx.x < 32) line[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = line[threadIdx.x];
}

KERNEL copied(const float4* in, float4* out, int wait, int valid) {
  __shared__ float4 line[64];
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(line + threadIdx.x));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(in + THREAD), "r"(valid) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  if (wait) asm volatile("cp.async.wait_group 0;" ::: "memory");
  out[THREAD] = line[threadIdx.x];
}

KERNEL stuck(int* out) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;" ::: "memory");
  out[threadIdx.x] = 1;
}

KERNEL local_array(const int* in, int* out, int n) {
  int own[16];
  for (int i = 0; i < 16; i++) own[(i * 7 + threadIdx.x) % 16] = in[i] + static_cast<int>(threadIdx.x);
  out[THREAD] = own[n % 16];
}

KERNEL switched(const int* in, int* out) {
  int x = in[THREAD];
  switch (x & 7) {
    case 0:
      x = x * 3;
      break;
    case 1:
      x = x - 77;
      break;
    case 2:
      x = ~x;
      break;
    case 3:
      x = x << 3;
      break;
    case 4:
      x = x / 5;
      break;
    case 5:
      x = x ^ 0x55;
      break;
    default:
      x = 1;
  }
  out[THREAD] = x;
}
