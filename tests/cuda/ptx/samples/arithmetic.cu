// One kernel for each family of instructions; tests/cuda/test_ptx_opcodes.py compares them with numpy.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define THREAD (blockIdx.x * blockDim.x + threadIdx.x)
#define KERNEL extern "C" __global__ void

KERNEL integers(const int* a, const int* b, int* out, int n) {
  const int i = THREAD;
  if (i >= n) return;
  const int x = a[i], y = b[i];
  int* to = out + 12 * i;
  to[0] = x / (y | 1);
  to[1] = x % (y | 1);
  to[2] = __mulhi(x, y);
  to[3] = x >> (y & 31);
  to[4] = static_cast<int>(static_cast<unsigned>(x) / (static_cast<unsigned>(y) | 1u));
  to[5] = __popc(x);
  to[6] = __clz(x);
  to[7] = static_cast<int>(__brev(x));
  to[8] = min(x, y);
  to[9] = static_cast<int>(__byte_perm(x, y, 0x5362));
  to[10] = static_cast<int>(__funnelshift_l(x, y, 11));
  to[11] = (x & y) ^ (x | ~y);
}

KERNEL longs(const int64_t* a, const int64_t* b, int64_t* out, int n) {
  const int i = THREAD;
  if (i >= n) return;
  const int64_t x = a[i], y = b[i];
  int64_t* to = out + 5 * i;
  to[0] = __mul64hi(x, y);
  to[1] = static_cast<int64_t>(__umul64hi(x, y));
  to[2] = x / (y | 1);
  to[3] = x % (y | 1);
  to[4] = static_cast<int64_t>(static_cast<int>(x)) * static_cast<int>(y);
}

KERNEL fields(const unsigned* a, const unsigned* b, unsigned* out, int n) {
  const int i = THREAD;
  if (i >= n) return;
  const unsigned x = a[i], at = b[i] % 40, length = b[i] / 64 % 40;
  unsigned* to = out + 3 * i;
  asm("bfe.u32 %0, %1, %2, %3;" : "=r"(to[0]) : "r"(x), "r"(at), "r"(length));
  asm("bfe.s32 %0, %1, %2, %3;" : "=r"(to[1]) : "r"(x), "r"(at), "r"(length));
  asm("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(to[2]) : "r"(x), "r"(b[i]), "r"(at), "r"(length));
}

KERNEL floats(const float* a, const float* b, float* out, int n) {
  const int i = THREAD;
  if (i >= n) return;
  const float x = a[i], y = b[i];
  float* to = out + 14 * i;
  to[0] = x / y;
  to[1] = sqrtf(fabsf(x));
  to[2] = fmaf(x, y, 1.0f);
  to[3] = expf(x);
  to[4] = logf(fabsf(x));
  to[5] = tanhf(x);
  to[6] = erff(x);
  to[7] = fminf(x, y);
  to[8] = copysignf(x, y);
  to[9] = __fadd_rz(x, y);
  to[10] = __fmul_ru(x, y);
  to[11] = rintf(x * 8.0f);
  to[12] = rsqrtf(fabsf(y));
  to[13] = x < y ? floorf(x) : ceilf(y);
}

KERNEL doubles(const double* a, const double* b, double* out, int n) {
  const int i = THREAD;
  if (i >= n) return;
  const double x = a[i], y = b[i];
  double* to = out + 6 * i;
  to[0] = x / y;
  to[1] = sqrt(fabs(x));
  to[2] = fma(x, y, -x * y);
  to[3] = exp(x);
  to[4] = erf(x);
  to[5] = log(fabs(x));
}

KERNEL conversions(const float* a, int* out, int n) {
  const int i = THREAD;
  if (i >= n) return;
  const float x = a[i];
  int* to = out + 10 * i;
  to[0] = static_cast<int>(x * 100.0f);
  to[1] = __float2int_rn(x * 1e10f);
  to[2] = static_cast<int>(__float2uint_rd(x));
  to[3] = __bfloat16_as_ushort(__float2bfloat16(x));
  to[4] = __half_as_ushort(__float2half(x));
  to[5] = __bfloat16_as_ushort(__float2bfloat16_rz(x));
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, -2.0f * x);
  to[6] = *reinterpret_cast<const int*>(&pair);
  const __half2 halves = __floats2half2_rn(x, 3.0f * x);
  to[7] = *reinterpret_cast<const int*>(&halves);
  to[8] = static_cast<signed char>(static_cast<int>(x * 1000.0f));
  unsigned tf32;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(tf32) : "f"(x));
  to[9] = static_cast<int>(tf32);
}

KERNEL sixteen(const __nv_bfloat16* a, const __half* b, float* out, int n) {
  const int i = THREAD;
  if (i >= n) return;
  float* to = out + 6 * i;
  to[0] = __bfloat162float(__hmul(a[i], a[i]));
  to[1] = __bfloat162float(__hfma(a[i], a[i], a[i]));
  to[2] = __half2float(__hmul(b[i], b[i]));
  to[3] = __half2float(__hfma(b[i], b[i], b[i]));
  to[4] = __bfloat162float(__hmax(a[i], __float2bfloat16(0.5f)));
  to[5] = a[i] > __float2bfloat16(0.25f) && b[i] < __float2half(0.5f) ? 1.0f : 0.0f;
}
