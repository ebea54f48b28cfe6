// Host memory that a device reads and writes, and the driver's operations on it in the order of a stream: a wait polls, since another
// process writes. Memory must be registered when an operation is queued and still be when it is done.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "stream.h"

namespace fake {
namespace {

std::mutex mutex;
struct Registered {
  size_t bytes;
  std::vector<uint32_t> began_with;  // where a trace is written
};
std::map<const char*, Registered> registered;  // by their first byte

bool holds(const void* p, size_t bytes) {
  const std::lock_guard lock(mutex);
  const char* at = static_cast<const char*>(p);
  auto next = registered.upper_bound(at);
  if (next == registered.begin()) return false;
  const auto& [first, found] = *std::prev(next);
  return at + bytes <= first + found.bytes;
}

std::atomic<uint32_t>& word(CUdeviceptr address) {
  auto* p = reinterpret_cast<std::atomic<uint32_t>*>(address);
  if (!holds(p, sizeof(*p))) {
    fprintf(stderr, "fake runtime: a queued operation names host memory that was unregistered meanwhile\n");
    abort();
  }
  return *p;
}

// A word of memory that several processes map: its file and place there, and what it held when it was registered.
std::string name_of(CUdeviceptr address) {
  const std::lock_guard lock(mutex);
  const char* at = reinterpret_cast<const char*>(address);
  const auto& [first, found] = *std::prev(registered.upper_bound(at));
  FILE* maps = fopen("/proc/self/maps", "r");
  char line[512];
  unsigned long long begin = 0, end = 0, offset = 0, inode = 0;
  while (maps && fgets(line, sizeof(line), maps))
    if (sscanf(line, "%llx-%llx %*s %llx %*s %llu", &begin, &end, &offset, &inode) == 4 && begin <= address && address < end) break;
  if (maps) fclose(maps);
  return std::to_string(inode) + "+" + std::to_string(offset + address - begin) + " " +
         std::to_string(found.began_with.at(static_cast<size_t>(at - first) / sizeof(uint32_t)));
}

bool good(CUdeviceptr address, unsigned flags) { return flags == 0 && address % 4 == 0 && holds(reinterpret_cast<void*>(address), sizeof(uint32_t)); }

CUresult wait_value(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned flags) {
  if (!good(address, flags)) return CUDA_ERROR_INVALID_VALUE;
  enqueue(stream, [address, value] {
    for (int looks = 0; static_cast<int32_t>(word(address).load() - value) < 0; looks++) nap(looks < 20 ? 1 : 50);
  });
  return CUDA_SUCCESS;
}
// FAKE_CUDA_LOSE=device,n: the n-th flag that a device's streams should set is not set.
bool is_lost() {
  static std::atomic<int> count{0};
  int device = -1, number = -1;
  const char* text = getenv("FAKE_CUDA_LOSE");
  return text && sscanf(text, "%d,%d", &device, &number) == 2 && device == current_device && count++ == number;
}

CUresult batch(CUstream stream, unsigned count, CUstreamBatchMemOpParams* operations, unsigned flags) {
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < count; i++) {
    const auto& wait = operations[i].waitValue;
    const auto& write = operations[i].writeValue;
    const bool waits = operations[i].operation == CU_STREAM_MEM_OP_WAIT_VALUE_32;
    const CUdeviceptr address = waits ? wait.address : write.address;
    const uint32_t value = waits ? wait.value : write.value;
    if ((waits ? wait.flags != CU_STREAM_WAIT_VALUE_EQ : write.flags != CU_STREAM_WRITE_VALUE_DEFAULT) || !good(address, 0))
      return CUDA_ERROR_INVALID_VALUE;
    if (!waits && value == 1 && is_lost()) continue;
    if (tracing()) trace(stream_of(stream), waits ? 'T' : 'S', name_of(address) + " " + std::to_string(value));
    enqueue(stream, [address, value, waits] {
      if (!waits) word(address).store(value);
      for (int looks = 0; waits && word(address).load() != value; looks++) nap(looks < 20 ? 1 : 50);
    });
  }
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
  fake::Registered found{bytes, {}};
  if (fake::tracing()) found.began_with.assign(static_cast<uint32_t*>(p), static_cast<uint32_t*>(p) + bytes / sizeof(uint32_t));
  return fake::registered.emplace(static_cast<const char*>(p), std::move(found)).second ? cudaSuccess : cudaErrorHostMemoryAlreadyRegistered;
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
    if (strcmp(name, "cuStreamBatchMemOp") == 0) *function = reinterpret_cast<void*>(fake::batch);
  }
  *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
