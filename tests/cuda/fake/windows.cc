#include "windows.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <list>
#include <map>
#include <mutex>
#include <string>

#include "stream.h"

namespace fake {
namespace {

struct Block {
  int fd = -1;  // of its own memory
  size_t bytes = 0;
  int device = 0;
};
struct Handle {
  int pid, fd, device;
  size_t bytes;
};
static_assert(sizeof(Handle) <= sizeof(cudaIpcMemHandle_t));

std::mutex mutex;
std::map<const char*, Block> made, opened;  // by their first byte

bool holds(const std::map<const char*, Block>& blocks, const void* p, size_t bytes) {
  const char* at = static_cast<const char*>(p);
  auto next = blocks.upper_bound(at);
  return next != blocks.begin() && at + bytes <= std::prev(next)->first + std::prev(next)->second.bytes;
}

bool told(const char* word) {
  const char* text = getenv("FAKE_CUDA_WINDOWS");
  return text && std::string(text) == word;
}

}  // namespace

bool release(void* p) {
  const std::lock_guard lock(mutex);
  const auto at = made.find(static_cast<char*>(p));
  if (at == made.end()) return false;
  munmap(p, at->second.bytes);
  close(at->second.fd);
  made.erase(at);
  return true;
}

bool in_window(const void* p, size_t bytes) {
  const std::lock_guard lock(mutex);
  return holds(made, p, bytes) || holds(opened, p, bytes);
}

int device_of_opened(const void* p) {
  const std::lock_guard lock(mutex);
  return holds(opened, p, 1) ? std::prev(opened.upper_bound(static_cast<const char*>(p)))->second.device : -1;
}

// P stream device bytes: into another's window; L stream bytes: to or from this device's own.
void trace_copy(const Stream& stream, const void* to, const void* from, size_t bytes) {
  if (!tracing()) return;
  const int device = device_of_opened(to);
  if (device >= 0)
    trace(stream, 'P', std::to_string(device) + " " + std::to_string(bytes));
  else if (in_window(to, bytes) || in_window(from, bytes))
    trace(stream, 'L', std::to_string(bytes));
}

namespace {
std::mutex& copies_mutex = *new std::mutex;
std::list<const PendingCopy*>& copies = *new std::list<const PendingCopy*>;
}  // namespace

PendingCopy::PendingCopy(void* to, const void* from, size_t bytes)
    : to_(static_cast<const char*>(to)), from_(static_cast<const char*>(from)), bytes_(bytes) {
  const std::lock_guard lock(copies_mutex);
  copies.push_back(this);
}

PendingCopy::~PendingCopy() {
  const std::lock_guard lock(copies_mutex);
  copies.remove(this);
}

bool PendingCopy::any(const void* p, size_t bytes) {
  const char* begin = static_cast<const char*>(p);
  const std::lock_guard lock(copies_mutex);
  return std::any_of(copies.begin(), copies.end(), [&](const PendingCopy* each) {
    const auto meets = [&](const char* at) { return at < begin + bytes && begin < at + each->bytes_; };
    return meets(each->to_) || meets(each->from_);
  });
}

}  // namespace fake

extern "C" {

cudaError_t cudaMalloc(void** out, size_t bytes) {
  const cudaError_t refused = fake::refused_beside_capture();
  if (refused != cudaSuccess) return refused;
  const int fd = memfd_create("fake device", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) return cudaErrorMemoryAllocation;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (p == MAP_FAILED) return cudaErrorMemoryAllocation;
  if (bytes <= size_t{1} << 20) memset(p, 0xff, bytes);
  const std::lock_guard lock(fake::mutex);
  fake::made[static_cast<char*>(p)] = {fd, bytes, fake::current_device};
  *out = p;
  return cudaSuccess;
}
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* p) {
  const std::lock_guard lock(fake::mutex);
  const auto at = fake::made.find(static_cast<char*>(p));
  if (at == fake::made.end() || (fake::told("none") && at->second.device > 0)) return cudaErrorInvalidValue;
  const fake::Handle made{getpid(), at->second.fd, at->second.device, at->second.bytes};
  memset(handle, 0, sizeof(*handle));
  memcpy(handle, &made, sizeof(made));
  return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void** out, cudaIpcMemHandle_t handle, unsigned flags) {
  if (flags != cudaIpcMemLazyEnablePeerAccess) return cudaErrorInvalidValue;
  if (fake::told("closed") && fake::current_device > 0) return cudaErrorPeerAccessUnsupported;
  fake::Handle made{};
  memcpy(&made, &handle, sizeof(made));
  const int fd = open(("/proc/" + std::to_string(made.pid) + "/fd/" + std::to_string(made.fd)).c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return cudaErrorMapBufferObjectFailed;
  const bool alone = fake::told("private") && fake::current_device > 0;
  void* p = mmap(nullptr, made.bytes, PROT_READ | PROT_WRITE, (alone ? MAP_PRIVATE : MAP_SHARED) | MAP_NORESERVE, fd, 0);
  close(fd);
  if (p == MAP_FAILED) return cudaErrorMapBufferObjectFailed;
  const std::lock_guard lock(fake::mutex);
  fake::opened[static_cast<char*>(p)] = {-1, made.bytes, made.device};
  *out = p;
  return cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void* p) {
  const std::lock_guard lock(fake::mutex);
  const auto at = fake::opened.find(static_cast<char*>(p));
  if (at == fake::opened.end()) return cudaErrorInvalidValue;
  munmap(p, at->second.bytes);
  fake::opened.erase(at);
  return cudaSuccess;
}

}  // extern "C"
