// The CUDA runtime for rung 4: a launch hands the kernel's mangled name, its grid and its arguments to a function of the test's, which runs
// the kernel's PTX; memory is the test's. The host code of csrc/kernels/*.cu runs as nvcc compiled it. Below: the kernels' public
// functions under plain names.
#include <cuda_runtime_api.h>

#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "kernels/dropout.h"
#include "kernels/epilogue.h"
#include "kernels/gemm.h"

namespace {

using LaunchFn = int (*)(const char* name, const unsigned* sizes, size_t shared, void** args);
using AllocateFn = void* (*)(size_t bytes);

LaunchFn launch_fn = nullptr;
AllocateFn allocate_fn = nullptr;
std::string message;

std::unordered_map<const void*, std::string>& names() {
  static std::unordered_map<const void*, std::string> map;
  return map;
}

class TestStream : public gingham::Stream {
 public:
  gingham::Device device() const override { return gingham::Device::cuda; }
  void* allocate(size_t bytes, gingham::Heap::Kind) const override { return allocate_fn(bytes); }
  void free(void*) const override {}
};

template <class Fn>
int guarded(bool tf32, Fn fn) {
  TestStream stream;
  stream.math = tf32 ? gingham::Math::tf32 : gingham::Math::exact;
  try {
    fn(stream);
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

}  // namespace

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
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the test's launch failed"; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** args) {
  const dim3 g = config->gridDim, b = config->blockDim;
  const unsigned sizes[6] = {g.x, g.y, g.z, b.x, b.y, b.z};
  return launch_fn(names().at(host).c_str(), sizes, config->dynamicSmemBytes, args) ? cudaErrorUnknown : cudaSuccess;
}

void host_begin(LaunchFn launch, AllocateFn allocate) {
  launch_fn = launch;
  allocate_fn = allocate;
}
const char* host_message() { return message.c_str(); }

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
    message = error.what();
    return 1;
  }
}

}  // extern "C"
