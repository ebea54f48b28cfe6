// The CUDA runtime for rung 4: a launch hands the kernel's mangled name, its grid and its arguments to a function of the test's, which runs
// the kernel's PTX; memory is the test's. The host code of csrc/kernels/*.cu runs as nvcc compiled it. Below: the kernels' public
// functions under plain names.
#include "host.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <string.h>

#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "kernels/dropout.h"
#include "kernels/epilogue.h"
#include "kernels/gemm.h"
#include "kernels/gemm_sm90.cuh"

namespace {

using LaunchFn = int (*)(const char* name, const unsigned* sizes, size_t shared, void** args);
using AllocateFn = void* (*)(size_t bytes);

LaunchFn launch_fn = nullptr;
AllocateFn allocate_fn = nullptr;
std::string message;

// What tma.py reads in place of the driver's 128 bytes.
struct __attribute__((packed)) TensorMap {
  uint32_t magic;
  uint8_t width, rank, swizzle, unused;
  uint64_t base, sizes[3], strides[2];
  uint32_t box[3];
};

std::unordered_map<const void*, std::string>& names() {
  static std::unordered_map<const void*, std::string> map;
  return map;
}

int device = 0, capability[2] = {8, 0}, capturing = 0;
cudaError_t fault = cudaSuccess;  // what a launch leaves behind from now on: the context has ended
bool faulted = false;
constexpr size_t kSharedWithoutAsking = 48 << 10, kMostShared = 227 << 10;

std::unordered_map<const void*, size_t>& shared_asked() {
  static std::unordered_map<const void*, size_t> map;
  return map;
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes, const cuuint64_t* strides,
                const cuuint32_t* box, const cuuint32_t* every, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  const bool half = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const uint32_t width = half ? 2 : (type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 0), span = swizzle ? 16u << swizzle : 0;
  bool fine = width && rank >= 1 && rank <= 3 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
              swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  TensorMap packed{
      0x544D4150, static_cast<uint8_t>(width), static_cast<uint8_t>(rank), static_cast<uint8_t>(swizzle), 0, reinterpret_cast<uint64_t>(base), {}, {},
      {}};
  for (uint32_t i = 0; fine && i < rank; i++) {
    packed.sizes[i] = sizes[i];
    packed.box[i] = box[i];
    fine = sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 && every[i] == 1;
    if (i + 1 < rank) {
      packed.strides[i] = strides[i];
      fine = fine && strides[i] % 16 == 0 && strides[i] > 0 && strides[i] < uint64_t{1} << 40;
    }
  }
  fine = fine && box[0] * width % 16 == 0 && (!span || box[0] * width <= span);
  if (!fine) return CUDA_ERROR_INVALID_VALUE;
  memset(map, 0, sizeof *map);
  memcpy(map, &packed, sizeof packed);
  return CUDA_SUCCESS;
}

}  // namespace

void* TestStream::allocate(size_t bytes, gingham::Heap::Kind) const { return allocate_fn(bytes); }
int failed(const std::exception& error) {
  message = error.what();
  return 1;
}

extern "C" {

void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device_name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names()[host] = device_name;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute which, int value) {
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || static_cast<size_t>(value) > kMostShared) return cudaErrorInvalidValue;
    shared_asked()[host] = static_cast<size_t>(value);
  }
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* found) {
  *found = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrComputeCapabilityMajor ? capability[0] : (which == cudaDevAttrComputeCapabilityMinor ? capability[1] : 0);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return faulted ? fault : cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  return error == cudaErrorInvalidValue ? "invalid argument" : faulted ? "the test's fault" : "the test's launch failed";
}
const char* cudaGetErrorName(cudaError_t error) { return error == cudaErrorIllegalInstruction ? "cudaErrorIllegalInstruction" : "cudaErrorUnknown"; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** args) {
  if (fault != cudaSuccess) {
    faulted = true;
    return fault;
  }
  const auto asked = shared_asked().find(host);
  if (config->dynamicSmemBytes > (asked == shared_asked().end() ? kSharedWithoutAsking : asked->second)) return cudaErrorInvalidValue;
  const dim3 g = config->gridDim, b = config->blockDim;
  if (!g.x || !g.y || !g.z || g.x > INT32_MAX || g.y > 65535 || g.z > 65535 || b.x * b.y * b.z > 1024) return cudaErrorInvalidConfiguration;
  const unsigned sizes[6] = {g.x, g.y, g.z, b.x, b.y, b.z};
  return launch_fn(names().at(host).c_str(), sizes, config->dynamicSmemBytes, args) ? cudaErrorUnknown : cudaSuccess;
}

void host_begin(LaunchFn launch, AllocateFn allocate) {
  launch_fn = launch;
  allocate_fn = allocate;
}
// The device at hand from now on.
void host_device(int number, int major, int minor, int captured) {
  device = number;
  capability[0] = major;
  capability[1] = minor;
  capturing = captured;
}
// Every launch from now on ends the context with this error; 0: a context in order.
void host_fault(int error) {
  fault = static_cast<cudaError_t>(error);
  faulted = false;
}
const char* host_sm90_status() {
  static std::string kept;
  kept = gingham::cuda::sm90_status();
  return kept.c_str();
}
int host_sm90_checked(int* on) {
  return guarded(false, [&](const gingham::Stream& stream) { *on = gingham::cuda::sm90_checked(stream); });
}
const char* host_message() { return message.c_str(); }
int host_bytes_of_tail() { return sizeof(gingham::Tail); }  // as host.py declares it too

using gingham::Matrix;
using gingham::Tail;

int host_gemm(const Matrix* a, const Matrix* b, const Matrix* c, const Tail* tail, int accumulate, int tf32) {
  return guarded(tf32, [&](const gingham::Stream& stream) { gingham::cuda::gemm(*a, *b, *c, accumulate, *tail, stream); });
}
int host_cast(const Matrix* from, const Matrix* to) {
  return guarded(false, [&](const gingham::Stream& stream) { gingham::cuda::cast(*from, *to, stream); });
}
int host_fill_zero(const Matrix* m) {
  return guarded(false, [&](const gingham::Stream& stream) { gingham::cuda::fill_zero(*m, stream); });
}
int host_accumulate_into(const Matrix* a, const Matrix* b, const Matrix* out) {
  return guarded(false, [&](const gingham::Stream& stream) { gingham::cuda::accumulate_into(*a, *b, *out, stream); });
}
int host_accumulate(const Matrix* a, const Matrix* b) {
  return guarded(false, [&](const gingham::Stream& stream) { gingham::cuda::accumulate(*a, *b, stream); });
}
int host_column_sums(const Matrix* a, const Matrix* out, int add) {
  return guarded(false, [&](const gingham::Stream& stream) { gingham::cuda::column_sums(*a, *out, add, stream); });
}
int host_epilogue(const Matrix* c, const Tail* tail) {
  return guarded(false, [&](const gingham::Stream& stream) { gingham::cuda::epilogue(*c, *tail, stream); });
}
int host_activation_backward(const Matrix* dy, const Matrix* z, const Matrix* dz, int kind) {
  return guarded(
      false, [&](const gingham::Stream& stream) { gingham::cuda::activation_backward(*dy, *z, *dz, static_cast<gingham::Epilogue>(kind), stream); });
}
int host_dropout(const void* x, void* y, int dtype, int dims, const int64_t* sizes, double p) {
  const std::vector<int64_t> local(sizes, sizes + dims), global(sizes + dims, sizes + 2 * dims), offset(sizes + 2 * dims, sizes + 3 * dims);
  return guarded(false, [&](const gingham::Stream& stream) {
    gingham::cuda::dropout(x, y, static_cast<gingham::DType>(dtype), local, global, offset, {7, 5, 3, p}, stream);
  });
}
// The CPU's twin, to compare with.
int host_cpu_dropout(const void* x, void* y, int dtype, int dims, const int64_t* sizes, double p) {
  const std::vector<int64_t> local(sizes, sizes + dims), global(sizes + dims, sizes + 2 * dims), offset(sizes + 2 * dims, sizes + 3 * dims);
  try {
    gingham::dropout(x, y, static_cast<gingham::DType>(dtype), local, global, offset, {7, 5, 3, p}, gingham::CpuStream{});
    return 0;
  } catch (const std::exception& error) {
    return failed(error);
  }
}

}  // extern "C"
