// Host memory that a device reads and writes, and the driver's operations on it in the order of a stream: a wait polls, since another
// process writes. Memory must be registered when an operation is queued and still be when it is done.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <mutex>

#include "fake.h"

namespace fake {
namespace {

std::mutex mutex;
std::map<const char*, size_t> registered;  // by their first byte

bool holds(const void* p, size_t bytes) {
  const std::lock_guard lock(mutex);
  const char* at = static_cast<const char*>(p);
  auto next = registered.upper_bound(at);
  if (next == registered.begin()) return false;
  const auto& [first, size] = *std::prev(next);
  return at + bytes <= first + size;
}

std::atomic<uint32_t>& word(CUdeviceptr address) {
  auto* p = reinterpret_cast<std::atomic<uint32_t>*>(address);
  if (!holds(p, sizeof(*p))) {
    fprintf(stderr, "fake runtime: a queued operation names host memory that was unregistered meanwhile\n");
    abort();
  }
  return *p;
}

bool good(CUdeviceptr address, unsigned flags) { return flags == 0 && address % 4 == 0 && holds(reinterpret_cast<void*>(address), sizeof(uint32_t)); }

CUresult wait_value(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned flags) {
  if (!good(address, flags)) return CUDA_ERROR_INVALID_VALUE;
  enqueue(stream, [address, value] {
    for (int looks = 0; static_cast<int32_t>(word(address).load() - value) < 0; looks++) nap(looks < 20 ? 1 : 50);
  });
  return CUDA_SUCCESS;
}
CUresult write_value(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned flags) {
  if (!good(address, flags)) return CUDA_ERROR_INVALID_VALUE;
  enqueue(stream, [address, value] { word(address).store(value); });
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace fake

extern "C" {

cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  const std::lock_guard lock(fake::mutex);
  return fake::registered.emplace(static_cast<const char*>(p), bytes).second ? cudaSuccess : cudaErrorHostMemoryAlreadyRegistered;
}
cudaError_t cudaHostUnregister(void* p) {
  const std::lock_guard lock(fake::mutex);
  return fake::registered.erase(static_cast<const char*>(p)) ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return fake::holds(host, 1) ? cudaSuccess : cudaErrorInvalidValue;
}
// FAKE_CUDA_OLD_DRIVER=1: the driver has none of them.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const char* old = getenv("FAKE_CUDA_OLD_DRIVER");
  *function = nullptr;
  if (!(old && atoi(old))) {
    if (strcmp(name, "cuStreamWaitValue32") == 0) *function = reinterpret_cast<void*>(fake::wait_value);
    if (strcmp(name, "cuStreamWriteValue32") == 0) *function = reinterpret_cast<void*>(fake::write_value);
  }
  *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
